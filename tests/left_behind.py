"""What a service that ended in the middle of things leaves: states for the start sweep."""

from __future__ import annotations

import hashlib

import pytest

from imgsvc.errors import Unavailable
from imgsvc.metadata.image import Image, ImageType, new_id
from tests.flaky import LOST
from tests.images.helpers import put
from tests.rooms import Rooms, feed_and_finish, report_now

BODY = b"the bytes of an image"


def complete(rooms: Rooms, body: bytes = BODY, sha256: str | None = None) -> Image:
    """A whole image, which may have come without a digest."""
    image = rooms.base.create(Image(id=new_id(), type=ImageType.KVM).started(len(body)))
    put(rooms.disk, image.id, body)
    return rooms.base.update(image.completed(len(body), hashlib.sha256(body).hexdigest() if sha256 is None else sha256))


def interrupted(rooms: Rooms, *fed: bytes, source: str = "") -> Image:
    """The process ended in mid-transfer: a fetch of the source, or an upload."""
    transfer = rooms.transfers.fetch(rooms.queued(source)) if source else rooms.upload()
    if fed and source:
        transfer.start(100)
    for block in fed:
        transfer.feed(block)
        report_now(transfer)
    rooms.let_go()
    return transfer.image


def committed(rooms: Rooms, source: str = "") -> Image:
    """The process ended between the image's rename and its record's last step."""
    transfer = rooms.transfers.fetch(rooms.queued(source)) if source else rooms.upload()
    if source:
        transfer.start(5)
    rooms.faults.next("update", LOST)
    with pytest.raises(Unavailable):
        feed_and_finish(transfer)
    return rooms.base.get(transfer.image.id)
