"""Who takes over what a lost member was transferring, over records in a real etcd."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest

from imgsvc.cluster.rendezvous import ranked
from imgsvc.cluster.takeover import Takeover
from imgsvc.errors import Conflict
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import Image, ImageType, Status
from imgsvc.transfer import Transfer
from tests.etcd_cluster import EtcdCluster
from tests.flaky import FULL, LOST, UNKNOWN, Fault
from tests.metadata.etcd_store import OwnedEtcdStore, new_member, open_store
from tests.rooms import Rooms, report_now, wait_until

# What stands for a lease's seconds: turns are told from each other, and none is long.
TTL = 0.4


class Host:
    """A member; `look` is what its thread does again and again."""

    def __init__(self, records: OwnedEtcdStore) -> None:
        images = MemoryImageStore()
        images.mark(records.identity)
        self.records = records
        self.id, self.url = records.member.id, records.member.url
        self.rooms = Rooms(images, records)
        self.may_work = True
        self.takeover = Takeover(
            self.id,
            records.mirror,
            self.rooms.records,
            self.rooms.fetcher,
            self.rooms.transfers,
            uploads=self.rooms.uploads,
            may_work=lambda: self.may_work,
            lease_ttl=TTL,
        )

    def post(self, count: int = 1) -> list[Image]:
        """New pending images, which nobody fetches yet."""
        sources = (f"http://source.example/{self.id}/{number}" for number in range(count))
        return [self.rooms.service.fetch(source, ImageType.KVM, "") for source in sources]

    def die(self) -> None:
        """As its lease runs out; its process goes on, as if it had been frozen."""
        self.records.membership.close()

    def look_for(self, seconds: float) -> None:
        latest = time.monotonic() + seconds
        while time.monotonic() < latest:
            self.takeover.look()
            time.sleep(0.02)

    def sees(self, condition: Callable[[OwnedEtcdStore], bool]) -> None:
        wait_until(lambda: condition(self.records))


@pytest.fixture
def hosts(etcd: EtcdCluster, etcd_prefix: str) -> Iterator[list[Host]]:
    with ExitStack() as opened:
        stores = [
            opened.enter_context(closing(open_store(etcd.endpoints, etcd_prefix, new_member(name))))
            for name in ("one", "two", "three")
        ]
        hosts = [Host(store) for store in stores]
        for host in hosts:
            host.sees(lambda records: len(records.mirror.members()) == len(stores))
        yield hosts


def lose(host: Host, *others: Host) -> None:
    """The host, of which the others know soon."""
    host.die()
    for other in others:
        other.sees(lambda records: host.id not in records.mirror.members())
        other.sees(lambda records: all(known.owner != host.id for known in records.mirror.in_transfer()))


def stored(host: Host, image: Image) -> Image:
    return host.records.get(image.id)


def test_each_fetch_is_taken_over_by_one(hosts: list[Host]) -> None:
    """Each by another part of those that are left, though all look at once."""
    lost, *others = hosts
    images = lost.post(12)
    lose(lost, *others)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda host: host.look_for(TTL), others))
    taken = [host.rooms.claims() for host in others]
    assert set().union(*taken) == {image.id for image in images}
    assert all(taken)
    assert not taken[0] & taken[1]
    assert [set(host.rooms.take_turns()) for host in others] == taken


def test_the_next_one_has_its_turn(hosts: list[Host]) -> None:
    """When the first is there and does nothing, soon."""
    lost, *others = hosts
    (image,) = lost.post()
    lose(lost, *others)
    last = max(others, key=lambda host: ranked(image.id, [each.id for each in others]).index(host.id))
    last.look_for(0.5 * TTL)
    assert last.rooms.claims() == set()
    last.look_for(0.5 * TTL)
    assert last.rooms.claims() == {image.id}


@pytest.mark.parametrize("blind", [True, False])
def test_who_cannot_know_does_nothing(hosts: list[Host], *, blind: bool) -> None:
    """Without a lease to rely on, or without news of the records; and once that is over, it counts from then."""
    lost, other, _ = hosts
    (image,) = lost.post()
    lose(lost, other)
    other.look_for(0.1 * TTL)
    if blind:
        other.records.close()
        other.records.mirror.lost()
    other.may_work = blind
    other.look_for(2 * TTL)
    assert other.rooms.claims() == set()
    other.may_work = True
    other.records.mirror.heard()
    other.takeover.look()
    assert other.rooms.claims() == set()
    other.look_for(TTL)
    assert other.rooms.claims() == {image.id}


def test_a_fetch_that_another_is_quicker_with(hosts: list[Host]) -> None:
    """Nothing of it is left here, and it is not tried again."""
    lost, one, other = hosts
    (image,) = lost.post()
    lose(lost, one, other)
    one.rooms.faults.at("update", 1, lambda: other.rooms.fetcher.take(stored(other, image)))
    one.look_for(2 * TTL)
    assert one.rooms.faults.calls.count("update") == 1
    assert one.rooms.claims() == set()
    assert one.rooms.take_turns() == []
    assert other.rooms.take_turns() == [image.id]


@pytest.mark.parametrize("fault", [LOST, UNKNOWN], ids=["lost", "unknown"])
def test_etcd_fails_at_that_moment(hosts: list[Host], fault: Fault) -> None:
    """Whether it was taken over is found out, and it is fetched once."""
    lost, other, _ = hosts
    (image,) = lost.post()
    lose(lost, other)
    other.rooms.faults.next("update", fault)
    other.look_for(2 * TTL)
    other.rooms.settlements.retry()
    other.look_for(TTL)
    assert other.rooms.take_turns() == [image.id]
    assert other.rooms.claims() == {image.id}
    assert not other.records.owner(image.id)


@pytest.mark.parametrize("call", ["claim", "space"])
def test_a_member_without_room(hosts: list[Host], call: str) -> None:
    """It leaves a fetch to the others, for as long as they have their turns; when none has room, that is the end."""
    lost, one, other = hosts
    one.rooms.faults.always(call, fault=FULL if call == "claim" else Fault(FULL.error))
    images = lost.post(2)
    lose(lost, one, other)
    one.look_for(1.9 * TTL)
    assert {stored(one, image).status for image in images} == {Status.PENDING}
    other.rooms.fetcher.take(stored(other, images[0]))
    one.look_for(0.5 * TTL)
    assert stored(one, images[0]).status is Status.PENDING
    failed = stored(one, images[1])
    assert failed.status is Status.ERROR
    assert lost.id in failed.error
    assert str(FULL.error) in failed.error
    assert one.rooms.claims() == set()


def test_an_upload(hosts: list[Host]) -> None:
    """It is in error, which names the member; that one is told when it goes on, and keeps nothing."""
    lost, other, _ = hosts
    transfer = lost.rooms.upload(10)
    transfer.feed(b"bytes")
    lose(lost, other)
    other.look_for(2 * TTL)
    failed = stored(other, transfer.image)
    assert (failed.status, failed.size) == (Status.ERROR, 0)
    assert f"{lost.id} at {lost.url}" in failed.error
    report_now(transfer)
    assert_gives_way(lost, transfer)
    assert stored(other, failed) == failed


def test_an_upload_that_can_wait(hosts: list[Host]) -> None:
    """Nobody ends it before it has expired."""
    lost, other, _ = hosts
    lost.rooms.uploads._expire = 2.0
    image = lost.rooms.uploads.create(ImageType.KVM, "", 10, "", "").image
    began = time.monotonic()
    lose(lost, other)
    other.look_for(2 * TTL)
    assert stored(other, image).in_transfer
    while stored(other, image).in_transfer:
        other.takeover.look()
        assert time.monotonic() < began + 4.0
    assert time.monotonic() >= began + 2.0
    lost.records.mirror.lost()
    lost.takeover.look()
    assert lost.rooms.claims() == {image.id}
    lost.records.mirror.heard()
    lost.takeover.look()
    assert lost.rooms.claims() == set()


def test_what_is_taken_over_is_let_go(hosts: list[Host]) -> None:
    """By a fetch that runs, as soon as its member sees it, and by one that waits for its turn; and by nothing else."""
    lost, other, _ = hosts
    running, waiting, kept = lost.post(3)
    transfers = {image.id: lost.rooms.transfers.fetch(image) for image in (running, kept)}
    for transfer in transfers.values():
        transfer.start(10)
    lose(lost, other)
    for image in (running, waiting):
        other.rooms.fetcher.take(stored(other, image).requeued())
    lost.sees(lambda records: records.mirror.get(running.id).owner == other.id)
    lost.takeover.look()
    assert_gives_way(lost, transfers[running.id])
    assert transfers[kept.id].cancelled is None
    for turn in list(lost.rooms.fetcher._turns._waiting):
        if turn[-1].image_id == waiting.id:
            assert lost.rooms.fetcher._begin(turn[-1]) is None
    assert lost.rooms.claims() == {kept.id}
    for image in (running, waiting):
        assert stored(other, image).status is Status.PENDING
    assert other.rooms.claims() == {running.id, waiting.id}


def test_what_this_member_transfers_is_not_taken_over(hosts: list[Host]) -> None:
    """Though its own lease has just ended, and nobody is on record as the owner: it will be again."""
    host, *_ = hosts
    waiting, running = host.post(2)
    transfer = host.rooms.transfers.fetch(running)
    upload = host.rooms.uploads.create(ImageType.KVM, "", 10, "", "").image
    host.die()
    host.sees(lambda records: all(known.owner is None for known in records.mirror.in_transfer()))
    host.look_for(3 * TTL)
    assert host.rooms.claims() == {waiting.id, running.id, upload.id}
    assert transfer.cancelled is None
    assert host.rooms.take_turns().count(waiting.id) == 1


def assert_gives_way(host: Host, transfer: Transfer) -> None:
    """It was cancelled; and once its owner has noticed, nothing of it is left."""
    assert isinstance(transfer.cancelled, Conflict)
    transfer.abort(transfer.cancelled)
    assert transfer.image.id not in host.rooms.claims()
