"""imgsvc: the guest image service of a mistify cluster."""

__version__ = "0.1.0"
