"""Whether bytes may come in."""

from __future__ import annotations

import pytest

from imgsvc.errors import NoSpace, TooLarge, Unavailable
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import UNKNOWN_SIZE, new_id
from imgsvc.room import Room
from imgsvc.values import Reserve
from tests.images.helpers import put


@pytest.fixture
def images() -> MemoryImageStore:
    """Of 1,000 bytes, 400 are taken."""
    images = MemoryImageStore(capacity=1_000)
    images.mark("records")
    put(images, new_id(), bytes(400))
    return images


def test_size(images: MemoryImageStore) -> None:
    """The limit itself is allowed, a byte more is not, and an unknown size is not known to be too much."""
    room = Room(images, 500, Reserve().of)
    for size in (UNKNOWN_SIZE, 0, 500):
        room.check_size(size)
    with pytest.raises(TooLarge, match="500 bytes"):
        room.check_size(501)


def test_no_limit(images: MemoryImageStore) -> None:
    """0 is none."""
    Room(images, 0, Reserve().of).check_size(10**18)


@pytest.mark.parametrize(("reserve", "left"), [(0, 600), (100, 500), ("10%", 500), ("60%", 0)])
def test_space(images: MemoryImageStore, reserve: object, left: int) -> None:
    """The reserve, in bytes or as a part of the whole, stays free to the byte."""
    room = Room(images, 0, Reserve.parse(reserve).of)
    room.check_space(left)
    with pytest.raises(NoSpace, match=f"no space for {left + 1} bytes"):
        room.check_space(left + 1)


def test_less_than_the_reserve(images: MemoryImageStore) -> None:
    """Then nothing may come in, not even an empty image."""
    with pytest.raises(NoSpace):
        Room(images, 0, Reserve.parse("61%").of).check_space(0)


def test_a_disk_that_does_not_tell(images: MemoryImageStore) -> None:
    """It is not taken for one with space."""
    images.close()
    with pytest.raises(Unavailable):
        Room(images, 0, Reserve().of).check_space(0)
