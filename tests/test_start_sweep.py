"""The start sweep on records in etcd, interrupted before each of its steps, when this host's lease is over: only what
is on the disk then tells which transfers were its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

from imgsvc.errors import Unavailable
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.metadata.image import Status, new_id
from imgsvc.metadata.store import Member
from tests.etcd_cluster import EtcdCluster
from tests.flaky import LOST
from tests.metadata.etcd_store import open_store
from tests.rooms import SITE, Rooms, feed_and_finish

OpenRooms = Callable[[], AbstractContextManager[Rooms]]
Leave = Callable[[Rooms], str]


@pytest.fixture
def open_rooms(etcd: EtcdCluster, etcd_prefix: str, tmp_path: Path) -> OpenRooms:
    """Opens the same place again and again; once it is closed, nobody owns anything in etcd."""

    @contextmanager
    def opened() -> Iterator[Rooms]:
        with closing(FilesystemImageStore(tmp_path / "images")) as images:
            member = Member(images.member, SITE, "http://one.example:20000")
            with closing(open_store(etcd.endpoints, etcd_prefix, member)) as records:
                yield Rooms(images, records)

    return opened


def uploading(rooms: Rooms) -> str:
    """In the middle of an upload."""
    transfer = rooms.upload()
    transfer.feed(b"half")
    return transfer.image.id


def uploaded(rooms: Rooms) -> str:
    """Between the rename and the record's last step."""
    rooms.faults.always("update")
    transfer = rooms.upload()
    with pytest.raises(Unavailable):
        feed_and_finish(transfer)
    return transfer.image.id


def fetched(rooms: Rooms) -> str:
    """The same, of a fetch."""
    transfer = rooms.transfers.fetch(rooms.queued(f"http://source.example/{new_id()}"))
    transfer.start(5)
    rooms.faults.always("update")
    with pytest.raises(Unavailable):
        feed_and_finish(transfer)
    return transfer.image.id


@pytest.mark.parametrize("leave", [uploading, uploaded, fetched])
def test_interrupted_before_each_step(open_rooms: OpenRooms, leave: Leave) -> None:
    """Whichever step is not taken: the next sweep settles the transfer."""
    final, claimed = (Status.PENDING, True) if leave is fetched else (Status.ERROR, False)
    for step in itertools.count():
        with open_rooms() as rooms:
            rooms.maintenance.start_sweep()
            image_id = leave(rooms)
        with open_rooms() as rooms:
            interrupted = sweep_but(rooms, step)
        with open_rooms() as rooms:
            rooms.maintenance.start_sweep()
            assert rooms.listed()[image_id].status is final, f"interrupted before step {step}"
            assert (image_id in rooms.claims()) == claimed
            assert list(rooms.disk.ids()) == []
            rooms.service.delete(image_id)
        if not interrupted:
            break
    assert step > 5


def sweep_but(rooms: Rooms, step: int) -> bool:
    """Sweeps, but for this step and those that follow; whether there was such a step."""
    rooms.faults.plan = lambda number, _name: LOST if number >= step else None
    with contextlib.suppress(Unavailable):
        rooms.maintenance.start_sweep()
    return len(rooms.faults.calls) > step
