"""Which images are in transfer, in a mirror."""

from __future__ import annotations

import dataclasses

from imgsvc.metadata.image import Image, ImageType, Status, new_id
from imgsvc.metadata.mirror import Known, Mirror


def known(status: Status, image_id: str = "") -> Known:
    image = Image(image_id or new_id(), ImageType.KVM, status=status)
    return Known(image.id, image.to_json(), 1, status, ImageType.KVM, 0)


def in_transfer(mirror: Mirror) -> set[str]:
    return {each.id for each in mirror.in_transfer()}


def test_whatever_happens_to_images() -> None:
    """All that are pending or downloading, and no others: as they come, end, begin again, lose their record, and go."""
    mirror = Mirror()
    pending, complete = known(Status.PENDING), known(Status.COMPLETE)
    mirror.replace([pending, complete], [], 5)
    assert in_transfer(mirror) == {pending.id}
    downloading = known(Status.DOWNLOADING)
    mirror.note(downloading.id, downloading, 6)
    assert in_transfer(mirror) == {pending.id, downloading.id}
    mirror.follow(pending.id, lambda _: known(Status.ERROR, pending.id), 7)
    assert in_transfer(mirror) == {downloading.id}
    mirror.follow(pending.id, lambda _: pending, 8)
    mirror.follow(downloading.id, lambda now: now and dataclasses.replace(now, document="", owner="a"), 9)
    assert in_transfer(mirror) == {pending.id}
    mirror.remove(pending.id)
    assert in_transfer(mirror) == set()
    mirror.note(downloading.id, downloading, 20)
    mirror.replace([pending, complete], [], 10)
    assert in_transfer(mirror) == {pending.id, downloading.id}
