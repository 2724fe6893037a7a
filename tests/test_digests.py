"""Images that are read in the background: for a digest, or to be held against the one that they should have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from imgsvc.errors import Elsewhere, ImgsvcError
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.store import Member
from tests.flaky import LOST
from tests.images.helpers import put
from tests.left_behind import BODY, complete
from tests.rooms import SITE, Rooms, feed_and_finish, wait_until
from tests.shared_records import OTHER, SharedRecords


@pytest.fixture
def records(images: MemoryImageStore) -> SharedRecords:
    return SharedRecords(Member(images.member, SITE, "http://one.example:20000"))


@pytest.fixture
def images() -> MemoryImageStore:
    return MemoryImageStore()


@pytest.fixture
def rooms(images: MemoryImageStore, records: SharedRecords) -> Iterator[Rooms]:
    images.mark(records.identity)
    rooms = Rooms(images, records)
    with closing(rooms.digests):
        yield rooms


def read(rooms: Rooms) -> None:
    """All that was submitted has had its turn."""
    rooms.digests.start()
    wait_until(lambda: not rooms.digests._waiting)


def test_one_reading_however_often_it_is_asked_for(rooms: Rooms) -> None:
    """A start that waits for etcd submits every image again with each attempt."""
    image = complete(rooms, sha256="")
    for _ in range(5):
        rooms.maintenance.start_sweep()
    read(rooms)
    assert rooms.faults.calls.count("open") == 1
    rooms.maintenance.start_sweep()
    wait_until(lambda: not rooms.digests._waiting)
    assert rooms.faults.calls.count("open") == 1
    assert rooms.base.get(image.id).sha256


def test_a_digest_waits_for_its_record(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the metadata store is away at the end of a long reading, the image is not read again for that."""
    monkeypatch.setattr("imgsvc.digests._RETRY_INTERVAL", 0.01)
    image = complete(rooms, sha256="")
    rooms.faults.next("update", LOST, times=3)
    rooms.digests.submit(image.id)
    read(rooms)
    assert rooms.base.get(image.id).sha256
    assert rooms.faults.calls.count("open") == 1


def test_an_image_that_cannot_be_read(rooms: Rooms) -> None:
    """It is given up until the next start, and the others have their turn."""
    first, second = complete(rooms, sha256=""), complete(rooms, sha256="")
    rooms.faults.next("read", LOST)
    for image in (first, second):
        rooms.digests.submit(image.id)
    read(rooms)
    assert rooms.base.get(first.id).sha256 == ""
    assert rooms.base.get(second.id).sha256


def test_a_shutdown_in_the_middle_of_an_image(rooms: Rooms) -> None:
    """It is not read to its end, and the next start begins it anew."""
    image = complete(rooms, bytes(3 << 20), sha256="")
    rooms.faults.plan = lambda _number, name: rooms.digests._closing.set() if name == "read" else None
    rooms.digests.submit(image.id)
    read(rooms)
    assert rooms.faults.calls.count("read") == 1
    assert rooms.base.get(image.id) == image


def test_a_doubt_about_what_is_brought_in_anew(rooms: Rooms) -> None:
    """It is not about the bytes that come then."""
    transfer = rooms.upload()
    rooms.digests.submit(transfer.image.id, doubted=True)
    read(rooms)
    image = feed_and_finish(transfer)
    with closing(rooms.service.open(image.id)[1]) as reader:
        assert reader.size == image.size


@pytest.mark.parametrize("right", [True, False])
def test_bytes_whose_record_has_a_digest(rooms: Rooms, records: SharedRecords, *, right: bool) -> None:
    """A file of the right name and size is not served for the image, nor put on record as a copy of it, before its
    digest was found right; a wrong one goes."""
    image = complete(rooms, BODY, sha256=None if right else "0" * 64)
    records.holding = {image.id: {OTHER.id}}
    rooms.maintenance.start_sweep()
    with pytest.raises(Elsewhere):
        rooms.service.open(image.id)
    assert records.holding == {image.id: {OTHER.id}}
    read(rooms)
    if right:
        reader = rooms.service.open(image.id)[1]
        reader.close()
        assert records.holding == {image.id: {OTHER.id, rooms.disk.member}}
    else:
        with pytest.raises(ImgsvcError):
            rooms.service.open(image.id)
        assert (list(rooms.disk.ids()), list(rooms.disk.quarantined())) == ([], [image.id])
        assert records.holding == {image.id: {OTHER.id}}
    assert rooms.base.get(image.id) == image


def test_doubted_bytes_that_are_gone(rooms: Rooms) -> None:
    """What comes in their place is served."""
    image = complete(rooms)
    rooms.disk.delete(image.id)
    rooms.digests.submit(image.id, doubted=True)
    read(rooms)
    put(rooms.disk, image.id, BODY)
    with closing(rooms.service.open(image.id)[1]) as reader:
        assert reader.size == len(BODY)
