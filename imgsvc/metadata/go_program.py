"""Records that the Go program left."""

from __future__ import annotations

import dataclasses

from imgsvc.metadata.image import INTERRUPTED, NO_REASON, Image, Status


def taken_over(image: Image) -> Image:
    """The record as it goes on from here: nobody transfers it any more, and if it is in error, it says why."""
    if image.in_transfer:
        return image.failed(INTERRUPTED)
    if image.status is Status.ERROR and not image.error:
        return dataclasses.replace(image, error=NO_REASON)
    return image
