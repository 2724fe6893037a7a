"""What a client reads of a pull that finds out, at any moment, that all that came was wrong."""

from __future__ import annotations

import threading
from typing import cast

import pytest

from imgsvc.cluster.course import HELD_BACK, Course
from imgsvc.cluster.follower import Follower
from imgsvc.cluster.pull import Pull
from imgsvc.cluster.relay import Relay
from imgsvc.errors import Unavailable
from imgsvc.images.memory import MemoryImageStore
from imgsvc.images.store import ImageReader
from imgsvc.metadata.image import Image, ImageType, new_id
from tests.images.helpers import put

SIZE = 10 * HELD_BACK


class Turning(Course):
    """Begins anew right after it was asked what has arrived, once it is `armed`; the file still has what was wrong."""

    armed = False

    def arrived(self, offset: int) -> int:
        count = super().arrived(offset)
        if self.armed:
            self.armed = False
            self.begin_anew()
        return count


@pytest.fixture
def course() -> Turning:
    disk = MemoryImageStore()
    disk.mark("these records")
    image_id = new_id()
    put(disk, image_id, bytes(SIZE))
    course = Turning(SIZE)
    course.begin(lambda: disk.open(image_id))
    course.advance(SIZE)
    return course


def follow(course: Course) -> ImageReader:
    def relay(_offset: int, _digest: object | None) -> Relay:
        raise AssertionError("what follows wrong bytes is of no use")

    class Pulling:
        def __init__(self) -> None:
            self.course = course

    image = Image(new_id(), ImageType.KVM).started(SIZE)
    follower = Follower(image, lambda: cast("Pull", Pulling()), relay)
    woken = threading.Event()
    follower.wait(0, SIZE, woken.set)
    assert woken.is_set()
    return follower


def test_a_turn_between_a_look_and_the_reading(course: Turning) -> None:
    """None of it is given out as what comes now."""
    follower = follow(course)
    course.armed = True
    with pytest.raises(Unavailable, match="wrong digest"):
        follower.read(0, HELD_BACK)


def test_a_turn_that_ends_without_a_copy(course: Turning) -> None:
    """Who has read of it is cut, and gets no rest of another attempt."""
    follower = follow(course)
    assert follower.read(0, HELD_BACK) == bytes(HELD_BACK)
    course.begin_anew()
    course.pass_on("digest")
    woken = threading.Event()
    follower.wait(HELD_BACK, SIZE, woken.set)
    assert woken.is_set()
    with pytest.raises(Unavailable, match="wrong digest"):
        follower.arrived(HELD_BACK)
