"""The start sweep on records in etcd, interrupted before each of its steps, when this host's lease is over: only what
is on the disk then tells which transfers were its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from imgsvc.errors import Unavailable
from imgsvc.etcd import Etcd
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.metadata.image import Image, Status, new_id
from imgsvc.metadata.store import Member
from tests.etcd_cluster import EtcdCluster
from tests.flaky import LOST
from tests.lossy_proxy import LossyProxy
from tests.metadata.etcd_store import OwnedEtcdStore, open_store
from tests.rooms import SITE, Rooms, feed_and_finish, wait_until

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


@pytest.mark.parametrize("source", ["", "http://source.example/late"], ids=["an upload", "a fetch"])
def test_the_last_step_comes_late(etcd: EtcdCluster, etcd_prefix: str, tmp_path: Path, source: str) -> None:
    """The process was killed when its `complete` was on its way to etcd, which takes it between the look of the next
    start at the record and its end: the image is whole, as this member is on record as holding it."""
    with ExitStack() as opened:
        images = opened.enter_context(closing(FilesystemImageStore(tmp_path / "images")))
        member = Member(images.member, SITE, "http://one.example:20000")
        proxy = opened.enter_context(closing(LossyProxy(etcd.endpoints[0])))
        connection = Etcd([proxy.url], timeout=1, attempt_timeout=0.5)
        killed = Rooms(images, opened.enter_context(closing(OwnedEtcdStore(connection, etcd_prefix, member))))
        killed.maintenance.start_sweep()
        image = last_step_under_way(killed, source, proxy)
        images.close()
        again = opened.enter_context(closing(FilesystemImageStore(tmp_path / "images")))
        rooms = Rooms(again, opened.enter_context(closing(open_store(etcd.endpoints, etcd_prefix, member))))

        def arrives() -> None:
            proxy.deliver()
            wait_until(lambda: rooms.base.get(image.id).status is Status.COMPLETE)

        rooms.faults.at("update", 1, arrives)
        rooms.maintenance.start_sweep()
        assert rooms.base.get(image.id).replicas == (member.id,)
        rooms.check_settled()
        assert rooms.take_turns() == []


def last_step_under_way(rooms: Rooms, source: str, proxy: LossyProxy) -> Image:
    """Between the rename and the answer to the record's last step."""
    transfer = rooms.transfers.fetch(rooms.queued(source)) if source else rooms.upload()
    if source:
        transfer.start(5)
    proxy.delay(b'"complete"')
    with pytest.raises(Unavailable):
        feed_and_finish(transfer)
    return transfer.image


def test_completed_by_another(open_rooms: OpenRooms, etcd: EtcdCluster, etcd_prefix: str) -> None:
    """It took the fetch over, and ended it, after this start had looked at the record: ours were other bytes."""
    with open_rooms() as rooms:
        rooms.maintenance.start_sweep()
        image_id = fetched(rooms)
    with open_rooms() as rooms, closing(open_store(etcd.endpoints, etcd_prefix)) as other:

        def ends() -> None:
            other.update(other.update(other.get(image_id).requeued()).completed(5, "ab" * 32))

        rooms.faults.at("update", 1, ends)
        rooms.maintenance.start_sweep()
        assert rooms.base.get(image_id).replicas == (other.member.id,)
        assert (list(rooms.disk.ids()), rooms.claims(), rooms.take_turns()) == ([], set(), [])
