"""What one member keeps of the images that lack copies, however many there are."""

from __future__ import annotations

import math
import time

import pytest

from imgsvc.cluster import shortages
from imgsvc.cluster.presence import Presence
from imgsvc.cluster.shortages import Shortages
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from imgsvc.metadata.mirror import Known, LiveMember, Mirror

PATIENCE = 0.01


def lacking(*holders: str) -> Known:
    image = Image(new_id(), ImageType.KVM).started(1).completed(1, "00" * 32)
    return Known(image.id, image.to_json(), 1, Status.COMPLETE, ImageType.KVM, 1, replicas=holders)


def live(*members: str) -> Presence:
    mirror = Mirror()
    mirror.replace([], [LiveMember(name, f"http://{name}.example") for name in members])
    mirror.heard()
    return Presence(mirror, 0.0)


def of_b(*, room: bool = True) -> Shortages:
    return Shortages("b", 3, lambda _size: PATIENCE, lambda member, _size: room or member.id != "b")


def test_images_that_nobody_can_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three members is gone for good, and all images have as many copies as there can be: a new one gets its
    own all the same."""
    monkeypatch.setattr(shortages, "_MOST", 10)
    known, presence = of_b(), live("a", "b")
    for _ in range(20):
        known.look(lacking("a", "b"), presence)
    new = known.look(lacking("a"), presence)
    assert new is not None
    assert new.due < math.inf
    for _ in range(20):
        known.look(lacking("a"), presence)
    assert len(known) == 10


def test_a_turn_that_is_far_away() -> None:
    """To look again and again, while there is no room here, does not put it off: each time of its own would be
    remembered."""
    known, presence, image = of_b(room=False), live("a", "b", "d"), lacking("c", "a")
    shortage = known.look(image, presence)
    assert shortage is not None
    time.sleep(30 * PATIENCE)
    due: set[float] = set()
    while True:
        shortage = known.look(image, presence)
        assert shortage is not None
        if due and time.monotonic() >= min(due):
            break  # this look may have come when the time had
        due.add(shortage.due)
    assert len(due) == 1
