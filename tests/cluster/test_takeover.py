"""Who takes over what a lost member was transferring, over records in a real etcd."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest

from imgsvc.cluster import takeover
from imgsvc.cluster.rendezvous import ranked
from imgsvc.cluster.takeover import Takeover
from imgsvc.errors import Conflict
from imgsvc.etcd_layout import Layout
from imgsvc.etcd_messages import put
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from imgsvc.transfer import Transfer
from tests.etcd_cluster import EtcdCluster
from tests.flaky import FULL, LOST, UNKNOWN, Fault
from tests.metadata.etcd_store import OwnedEtcdStore, new_member, open_store
from tests.rooms import Rooms, report_now, wait_until

TTL = 10.0


class Clock:
    """One for all members, which stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Host:
    """A member, whose thread of the takeover does not run: the test has it look, at moments that it names."""

    def __init__(self, records: OwnedEtcdStore, prefix: str, clock: Clock) -> None:
        self.prefix = prefix
        self.clock = clock
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

    def look(self, after: float = 0.0) -> None:
        """So many lease times after the last look of anybody."""
        self.clock.now += after * TTL
        self.takeover.look()

    def sees(self, condition: Callable[[OwnedEtcdStore], bool]) -> None:
        wait_until(lambda: condition(self.records))


@pytest.fixture
def hosts(etcd: EtcdCluster, etcd_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Host]]:
    clock = Clock()
    monkeypatch.setattr(takeover, "_now", clock)
    with ExitStack() as opened:
        stores = [
            opened.enter_context(closing(open_store(etcd.endpoints, etcd_prefix, new_member(name))))
            for name in ("one", "two", "three")
        ]
        hosts = [Host(store, etcd_prefix, clock) for store in stores]
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
    """Each by the one that is the first of those that are left, and only by that."""
    lost, *others = hosts
    images = lost.post(24)
    lose(lost, *others)
    for after in (0.0, 0.6):
        others[0].clock.now += after * TTL
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Host.look, others))
    taken = [host.rooms.claims() for host in others]
    for host, mine in zip(others, taken, strict=True):
        assert mine
        assert mine == {image.id for image in images if ranked(image.id, [each.id for each in others])[0] == host.id}
        assert set(host.rooms.take_turns()) == mine


def test_the_next_one_has_its_turn(hosts: list[Host]) -> None:
    """When the first is there and does nothing, soon."""
    lost, *others = hosts
    (image,) = lost.post()
    lose(lost, *others)
    last = max(others, key=lambda host: ranked(image.id, [each.id for each in others]).index(host.id))
    last.look()
    last.look(after=0.62)
    assert last.rooms.claims() == set()
    last.look(after=0.01)
    assert last.rooms.claims() == {image.id}


@pytest.mark.parametrize("source", ["", "http://source.example/foreign"], ids=["upload", "fetch"])
def test_an_image_that_cannot_be_taken_over(hosts: list[Host], source: str) -> None:
    """As one of somebody else whose record is larger than any of ours may be: the others have their turns, it has
    another one later, and nothing of it is left here that the next start would stumble over."""
    lost, other, third = hosts
    foreign = Image(id=new_id(), type=ImageType.KVM, source=source, comment="x" * 1_200_000)
    other.records.etcd.transact([], [put(Layout(lost.prefix).record(foreign.id), foreign.to_json())])
    other.sees(lambda records: foreign.id in [known.id for known in records.mirror.in_transfer()])
    images = lost.post(20)
    third.die()
    lose(lost, other, third)
    for after in (0.0, 0.7, 0.0, 0.7):
        other.look(after)
        other.rooms.settlements.retry()
    assert other.rooms.claims() == {image.id for image in images}
    other.look()
    other.rooms.maintenance.start_sweep()
    assert stored(other, foreign).in_transfer


def test_a_live_member_without_its_keys(hosts: list[Host]) -> None:
    """It may be about to own its transfers again, as all are after etcd was frozen, and has longer for that."""
    host, other, _ = hosts
    (image,) = host.post()
    other.sees(lambda records: [known.owner for known in records.mirror.in_transfer()] == [host.id])
    host.records.etcd.delete(Layout(host.prefix).owner(image.id))
    other.sees(lambda records: records.mirror.get(image.id).owner is None)
    other.look()
    other.look(after=1.49)
    assert other.rooms.claims() == set()
    other.look(after=0.3)
    assert other.rooms.claims() == {image.id}


@pytest.mark.parametrize("blind", [True, False])
def test_who_cannot_know_does_nothing(hosts: list[Host], *, blind: bool) -> None:
    """Without a lease to rely on, or without news of the records; and once that is over, it counts from then."""
    lost, other, _ = hosts
    (image,) = lost.post()
    lose(lost, other)
    other.look()
    other.look(after=0.1)
    if blind:
        other.records.close()
        other.records.mirror.lost()
    other.may_work = blind
    other.look(after=2)
    assert other.rooms.claims() == set()
    other.may_work = True
    other.records.mirror.heard()
    other.look()
    assert other.rooms.claims() == set()
    other.look(after=0.7)
    assert other.rooms.claims() == {image.id}


def test_a_fetch_that_another_is_quicker_with(hosts: list[Host]) -> None:
    """Nothing of it is left here, and it is not tried again."""
    lost, one, other = hosts
    (image,) = lost.post()
    lose(lost, one, other)
    one.rooms.faults.at("update", 1, lambda: other.rooms.fetcher.take(stored(other, image)))
    one.look()
    one.look(after=0.7)
    one.look(after=0.1)
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
    other.look()
    other.look(after=0.7)
    other.look(after=0.1)
    other.rooms.settlements.retry()
    other.look(after=1)
    assert other.rooms.take_turns() == [image.id]
    assert other.rooms.claims() == {image.id}
    assert not other.records.carrier(image.id)


@pytest.mark.parametrize("call", ["claim", "space"])
def test_a_member_without_room(hosts: list[Host], call: str) -> None:
    """It leaves a fetch to the others, for as long as they have their turns; when none has room, that is the end."""
    lost, one, other = hosts
    one.rooms.faults.always(call, fault=FULL if call == "claim" else Fault(FULL.error))
    images = lost.post(2)
    lose(lost, one, other)
    one.look()
    for after in (0.7, 0.5, 0.5):
        one.look(after)
    assert {stored(one, image).status for image in images} == {Status.PENDING}
    other.rooms.fetcher.take(stored(other, images[0]))
    one.look(after=0.1)
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
    report_now(transfer)
    assert stored(other, transfer.image).size == 5
    lose(lost, other)
    other.look()
    other.look(after=0.7)
    failed = stored(other, transfer.image)
    assert (failed.status, failed.size) == (Status.ERROR, 0)
    assert f"{lost.id} at {lost.url}" in failed.error
    report_now(transfer)
    assert_gives_way(lost, transfer)
    assert stored(other, failed) == failed


def test_an_upload_that_can_wait(hosts: list[Host]) -> None:
    """Nobody ends it before it has expired."""
    lost, other, _ = hosts
    lost.rooms.uploads._expire = 1.0
    image = lost.rooms.uploads.create(ImageType.KVM, "", 10, "", "").image
    began = time.time()
    lose(lost, other)
    for _ in range(10):
        other.look(after=1)
    assert stored(other, image).in_transfer
    while stored(other, image).in_transfer:
        other.look(after=1)
        time.sleep(0.02)
    assert began + 1.0 <= time.time() < began + 5.0
    lost.sees(lambda records: not records.mirror.get(image.id).in_transfer)
    lost.may_work = False
    lost.look()
    assert lost.rooms.claims() == {image.id}
    lost.may_work = True
    lost.look()
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
    lost.look()
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
    """Though nobody is on record as the owner, as when its lease has just ended: it will be again."""
    host, *_ = hosts
    waiting, running = host.post(2)
    fetch, upload = host.rooms.transfers.fetch(running), host.rooms.upload(10)
    fetch.start(10)
    images = [stored(host, each) for each in (waiting, running, upload.image)]
    for image in images:
        host.records.etcd.delete(Layout(host.prefix).owner(image.id))
    host.sees(lambda records: all(known.owner is None for known in records.mirror.in_transfer()))
    # As news may come late of how it was before this transfer.
    known = host.records.mirror.get(running.id)
    host.records.mirror.put(dataclasses.replace(known, status=Status.ERROR, revision=known.revision - 1))
    for _ in range(4):
        host.look(after=1)
    assert [stored(host, image) for image in images] == images
    assert (fetch.cancelled, upload.cancelled) == (None, None)
    assert host.rooms.claims() == {image.id for image in images}
    host.rooms.fetcher.submit(waiting.id)
    assert host.rooms.take_turns() == [waiting.id, running.id]


def assert_gives_way(host: Host, transfer: Transfer) -> None:
    """It was cancelled; and once its owner has noticed, nothing of it is left."""
    assert isinstance(transfer.cancelled, Conflict)
    transfer.abort(transfer.cancelled)
    assert transfer.image.id not in host.rooms.claims()


def test_a_late_write_of_our_own_is_no_other_member(hosts: list[Host]) -> None:
    """A report that was delivered when its answer had been given up, and a lease that ended: the record is newer than
    what this member knows and has no owner, and the transfer goes on all the same."""
    host, *_ = hosts
    transfer = host.rooms.upload(100)
    transfer.feed(b"x" * 10)
    late, layout = transfer.image.progressed(10), Layout(host.prefix)
    host.records.etcd.transact([], [put(layout.record(late.id), late.to_json())])
    host.records.etcd.delete(layout.owner(late.id))
    host.sees(lambda records: records.mirror.get(late.id).owner is None)
    host.look()
    assert transfer.cancelled is None
    transfer.feed(b"x" * 90)
    assert transfer.finish().status is Status.COMPLETE


def test_what_a_member_owns_and_does_not_know_of(hosts: list[Host]) -> None:
    """As after a mistake of ours: it takes it up itself."""
    host, *_ = hosts
    image = host.records.create(Image(id=new_id(), type=ImageType.KVM, source="http://source.example/forgotten"))
    host.look()
    host.look(after=2)
    assert host.rooms.take_turns() == [image.id]
    assert not host.records.carrier(image.id)
