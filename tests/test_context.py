"""How the parts are put together, where that takes a decision."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from imgsvc.config import load
from imgsvc.context import Context
from imgsvc.stores import reachable


@pytest.mark.parametrize(("images", "records"), [("fs", "memory"), ("memory", "sqlite")])
def test_the_data_directory_is_made_only_for_what_is_put_into_it(tmp_path: Path, images: str, records: str) -> None:
    """A default that the type of the other store makes no use of does not count."""
    environ = {
        "IMGSVC_DATA_DIR": str(tmp_path / "data"),
        "IMGSVC_IMAGE_STORE_TYPE": images,
        "IMGSVC_METADATA_STORE_TYPE": records,
    }
    elsewhere = {
        "fs": {"IMGSVC_IMAGE_STORE_CONFIG_DIR": str(tmp_path / "images")},
        "sqlite": {"IMGSVC_METADATA_STORE_CONFIG_FILENAME": str(tmp_path / "imgsvc.db")},
    }
    for given in (elsewhere.get(images, {}) | elsewhere.get(records, {}), {}):
        assert not (tmp_path / "data").exists()
        Context(load(None, {}, environ | given), port=0).close()
    assert (tmp_path / "data").is_dir()


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("images.example", "images.example"),
        ("fd00::1", "[fd00::1]"),
        *((every, socket.gethostname()) for every in ("", "0.0.0.0", "::")),
    ],
)
def test_what_other_hosts_are_told_of_the_address(host: str, shown: str) -> None:
    """It is for a URL, and an address that stands for all of them leads nowhere."""
    assert reachable(host) == shown
