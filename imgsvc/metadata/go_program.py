"""Records that the Go program left."""

from __future__ import annotations

import dataclasses

from imgsvc.metadata.image import Image, Status

_INTERRUPTED = "mistify-image-service stopped before the image was whole"
_NO_REASON = "mistify-image-service could not get the image, and did not record why"


def taken_over(image: Image) -> Image:
    """The record as it goes on from here: nobody transfers it any more, and if it is in error, it says why."""
    if image.in_transfer:
        return image.failed(_INTERRUPTED)
    if image.status is Status.ERROR and not image.error:
        return dataclasses.replace(image, error=_NO_REASON)
    return image


def ended_here(image: Image) -> bool:
    """Whether it is in error because the Go program had not ended it, as far as its record says: there may be bytes of
    it, and they may be all."""
    return image.status is Status.ERROR and image.error in (_INTERRUPTED, _NO_REASON)
