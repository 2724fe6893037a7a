"""Two hosts and one image, over records in a real etcd: what one has missed must not undo what the other does."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from imgsvc.errors import ConfigError, Conflict, FetchFailed, ImgsvcError, PeerFailed, Unavailable
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import Image, ImageType, Status
from imgsvc.metadata.store import Member
from imgsvc.scrub import Outcome, Scrub
from imgsvc.transfer import Transfer
from imgsvc.whole import Pace
from tests.etcd_cluster import EtcdCluster
from tests.flaky import DAMAGED, FULL, LOST, UNKNOWN, Fault, Killed
from tests.harness import wait_for
from tests.images.helpers import content, put
from tests.left_behind import BODY, complete
from tests.metadata.etcd_store import OwnedEtcdStore, new_member, open_store
from tests.rooms import Rooms, feed_and_finish

SOURCE = "http://source.example/image"


@pytest.fixture
def hosts(etcd: EtcdCluster, etcd_prefix: str) -> Iterator[list[Rooms]]:
    with ExitStack() as opened:
        yield [opened_host(opened, etcd, etcd_prefix, new_member(name)) for name in ("one", "two")]


@pytest.fixture
def namesakes(etcd: EtcdCluster, etcd_prefix: str) -> Iterator[list[Rooms]]:
    """Two hosts that are called the same, with their images at the same path."""
    with ExitStack() as opened:
        members = [dataclasses.replace(new_member(), site="localhost:/images") for _ in range(2)]
        yield [opened_host(opened, etcd, etcd_prefix, member) for member in members]


def opened_host(opened: ExitStack, etcd: EtcdCluster, etcd_prefix: str, member: Member) -> Rooms:
    images = MemoryImageStore()
    member = dataclasses.replace(member, id=images.member)
    records = opened.enter_context(closing(open_store(etcd.endpoints, etcd_prefix, member)))
    images.mark(records.identity)
    return Rooms(images, records)


def begun(host: Rooms) -> Transfer:
    return host.transfers.fetch(host.service.fetch(SOURCE, ImageType.KVM, ""))


def failed_unheard(host: Rooms) -> str:
    """A fetch of the host fails; that is stored, and the host does not hear of it."""
    transfer = begun(host)
    host.faults.next("update", UNKNOWN)
    transfer.abort(FetchFailed("gone"))
    host.faults.heal()
    return transfer.image.id


def lose_owner(host: Rooms, image_id: str) -> None:
    """As when the lease of the member that is transferring is over."""
    assert isinstance(host.base, OwnedEtcdStore)
    assert host.base.etcd.delete(host.base._layout.owner(image_id))


def test_a_late_settlement_does_not_end_another_members_fetch(hosts: list[Rooms]) -> None:
    """The image that failed at one is fetched again at two; then one is back, and settles what it believes open."""
    one, two = hosts
    image_id = failed_unheard(one)
    again = begun(two)
    assert again.image.id == image_id
    again.start(5)
    one.settlements.retry()
    assert two.base.get(image_id).status is Status.DOWNLOADING
    assert feed_and_finish(again).status is Status.COMPLETE
    assert not one.settlements.waiting(image_id)


def test_bytes_of_an_ended_transfer_do_not_stand_for_the_image(hosts: list[Rooms]) -> None:
    """Somebody ends the record while a transfer commits, and another member fetches other content of the same size:
    nobody is served the first bytes under the digest of the second."""
    one, two = hosts
    first = begun(one)
    first.start(3)
    first.feed(b"abc")
    first.commit()
    stored = two.base.get(first.image.id)
    lose_owner(two, stored.id)
    two.base.update(stored.failed("by hand"))
    with pytest.raises(Conflict):
        first.complete()
    second = begun(two)
    second.start(3)
    second.feed(b"xyz")
    second.finish()
    assert set(one.disk.ids()) == set()
    assert content(two.disk, second.image.id) == b"xyz"
    with pytest.raises(ImgsvcError):
        one.service.open(second.image.id)


def left_by_a_fetch(host: Rooms) -> Image:
    """The image of a fetch that a host finished, and died before its record said so."""
    transfer = begun(host)
    transfer.start(3)
    transfer.feed(b"old")
    transfer.commit()
    return transfer.image


def test_bytes_of_an_interrupted_fetch_go_when_another_member_fetches(hosts: list[Rooms]) -> None:
    """The successor may be given other bytes by the source; what the first has left is gone with its next start."""
    one, two = hosts
    image = left_by_a_fetch(one)
    end_ownership(one)
    two.base.update(two.base.get(image.id).requeued())
    one.maintenance.start_sweep()
    assert set(one.disk.ids()) == set()


def test_bytes_without_a_note_are_not_served_unseen(hosts: list[Rooms]) -> None:
    """What lies here under the image's name, while records do not say that this member holds it, may be anything: it is
    held against the digest first, and is noted, or set aside."""
    one, two = hosts
    image = left_by_a_fetch(one)
    end_ownership(one)
    again = two.transfers.fetch(two.base.update(two.base.get(image.id).requeued()))
    again.start(3)
    again.feed(b"new")
    again.finish()
    with pytest.raises(ImgsvcError):
        one.service.open(image.id)
    one.digests.start()
    wait_for(lambda: list(one.disk.quarantined()) == [image.id], 5, "it is set aside")
    one.digests.close()
    assert one.base.get(image.id).replicas == (member_of(two),)


def end_ownership(host: Rooms) -> None:
    """As if its lease had run out."""
    store = host.base
    assert isinstance(store, OwnedEtcdStore)
    store.membership.close()


def member_of(host: Rooms) -> str:
    assert isinstance(host.base, OwnedEtcdStore)
    return host.base.member.id


def before_writing(host: Rooms, image_id: str, happens: Callable[[], object]) -> None:
    """Right before the host's next write to keys of the image, something else happens."""
    assert isinstance(host.base, OwnedEtcdStore)
    etcd = host.base.etcd
    writes: dict[str, Callable[..., Any]] = {"transact": etcd.transact, "delete": etcd.delete}

    def late(name: str) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            if image_id in str(args):
                vars(etcd).update(writes)
                happens()
            return writes[name](*args, **kwargs)

        return write

    vars(etcd).update({name: late(name) for name in writes})


def scrub(host: Rooms) -> None:
    list(Scrub(host.images, host.records, Pace(0), threading.Event()).run())


def sweep(host: Rooms) -> None:
    host.maintenance.start_sweep()


@pytest.mark.parametrize("find", [scrub, sweep])
def test_a_copy_that_comes_while_the_last_one_is_condemned(hosts: list[Rooms], find: Callable[[Rooms], None]) -> None:
    """It is the last one then: the image stays complete, and who has it on record."""
    one, two = hosts
    image = complete(one)
    one.disk.delete(image.id)
    put(two.disk, image.id, BODY)
    before_writing(one, image.id, lambda: two.base.hold(image.id))
    find(one)
    found = one.base.get(image.id)
    assert (found.status, found.replicas) == (Status.COMPLETE, (member_of(two),))


@pytest.mark.parametrize("other", [scrub, sweep])
@pytest.mark.parametrize("find", [scrub, sweep])
def test_two_that_lose_it_at_once(
    hosts: list[Rooms], find: Callable[[Rooms], None], other: Callable[[Rooms], None]
) -> None:
    """Neither relies on the other: the image is in error, and can be fetched again."""
    one, two = hosts
    image = complete(one)
    two.base.hold(image.id)
    one.disk.delete(image.id)
    before_writing(one, image.id, lambda: other(two))
    find(one)
    found = one.base.get(image.id)
    assert (found.status, found.replicas) == (Status.ERROR, ())


@pytest.mark.parametrize("find", [scrub, sweep])
def test_namesakes(namesakes: list[Rooms], find: Callable[[Rooms], None]) -> None:
    """What one holds, the other does not miss, and says who has it."""
    one, two = namesakes
    image = complete(one)
    find(two)
    assert one.base.get(image.id) == image
    assert two.base.holders(image.id) == [f"{member_of(one)} at http://some.example:20000"]


def test_bytes_that_a_namesake_has_noted(namesakes: list[Rooms]) -> None:
    """Its note does not vouch for those here."""
    one, two = namesakes
    image = complete(one)
    put(two.disk, image.id, BODY)
    sweep(two)
    assert two.digests.doubts(image.id)


def test_a_namesake_without_a_marker(namesakes: list[Rooms]) -> None:
    """It may be a directory that is not mounted: then the service does not start."""
    one, two = namesakes
    complete(one)
    with pytest.raises(ConfigError):
        Rooms(MemoryImageStore(), two.base).maintenance.start_sweep()


def pulled(host: Rooms, image: Image) -> None:
    """What the end of a pull does."""
    put(host.disk, image.id, BODY)
    host.base.hold(image.id)


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("early", [True, False])
def test_a_copy_that_comes_back_while_it_is_scrubbed(hosts: list[Rooms], *, early: bool, others: bool) -> None:
    """A client asks for the image when its damaged bytes have just been set aside: what it has brought here stays on
    record, whether others hold it or do no longer."""
    one, two = hosts
    image = complete(one)
    if others:
        two.base.hold(image.id)
    assert isinstance(one.disk, MemoryImageStore)
    one.disk._images[image.id][:1] = b"T"
    if early:
        one.faults.at("lose_copy", 1, lambda: pulled(one, image))
    else:
        one.faults.at("lose_copy", 1, lambda: before_writing(one, image.id, lambda: pulled(one, image)))
    scrub(one)
    found = one.base.get(image.id)
    assert (found.status, set(found.replicas or ())) == (
        Status.COMPLETE,
        {member_of(one), member_of(two)} if others else {member_of(one)},
    )
    assert content(one.disk, image.id) == BODY
    assert list(one.disk.quarantined()) == [image.id]


@pytest.mark.parametrize("right", [True, False])
def test_a_copy_is_wanted_where_there_are_bytes_without_a_note(hosts: list[Rooms], *, right: bool) -> None:
    """They are read: right ones are noted, and wrong ones make way, without a new start."""
    one, two = hosts
    image = complete(one)
    put(two.disk, image.id, BODY if right else BODY.upper())
    two.digests.start()
    with pytest.raises(Unavailable):
        two.pulls.copy(image)
    wait_for(lambda: not two.digests.doubts(image.id), 5, "they are read")
    two.digests.close()
    assert (member_of(two) in (one.base.get(image.id).replicas or ())) == right
    assert list(two.disk.quarantined()) == ([] if right else [image.id])
    if right:
        two.pulls.copy(two.base.get(image.id))
    else:
        with pytest.raises(PeerFailed):  # nobody is live in its mirror here
            two.pulls.copy(image)


@pytest.mark.parametrize("held", [True, False])
def test_doubted_bytes_that_are_wrong(hosts: list[Rooms], monkeypatch: pytest.MonkeyPatch, *, held: bool) -> None:
    """The only copy on record takes the image with it, as soon as etcd answers. Where none is, a member that is away may
    have the bytes."""
    monkeypatch.setattr("imgsvc.digests._RETRY_INTERVAL", 0.01)
    one, two = hosts
    image = complete(one)
    assert isinstance(one.disk, MemoryImageStore)
    one.disk._images[image.id][:1] = b"T"
    if not held:
        one.base.release(image.id)
    one.faults.next("lose_copy", LOST)
    one.digests.submit(image.id, doubted=True)
    one.digests.start()
    wait_for(lambda: not one.digests.doubts(image.id), 5, "they are read")
    one.digests.close()
    found = two.base.get(image.id)
    assert (found.status, found.replicas) == (Status.ERROR if held else Status.COMPLETE, ())
    assert list(one.disk.quarantined()) == [image.id]


def held_by_both(one: Rooms, two: Rooms, body: bytes) -> Image:
    """At two its bytes are these."""
    image = complete(one)
    put(two.disk, image.id, body)
    two.base.hold(image.id)
    return one.base.get(image.id)


def read_again(host: Rooms) -> None:
    """As an image that came without a digest, and got one from another member."""
    image_id = next(iter(host.disk.ids()))
    host.digests.submit(image_id, doubted=True)
    read_all(host)


def read_all(host: Rooms) -> None:
    host.digests.start()
    wait_for(lambda: not host.digests._waiting, 5, "all is read")
    host.digests.close()


ROTTEN = BODY.upper()


@pytest.mark.parametrize("find", [scrub, sweep, read_again])
def test_a_good_copy_does_not_go_for_a_damaged_one(hosts: list[Rooms], find: Callable[[Rooms], None]) -> None:
    """Another member is short of space at the very moment at which the damaged one is set aside."""
    one, two = hosts
    image = held_by_both(one, two, ROTTEN[:-1] if find is sweep else ROTTEN)

    def drop() -> None:
        if one.base.drop_copy(image.id, [member_of(two)]):
            one.disk.delete(image.id)

    two.faults.at("quarantine", 1, drop)
    find(two)
    found = one.base.get(image.id)
    assert (found.status, found.replicas) == (Status.COMPLETE, (member_of(one),))
    assert content(one.disk, image.id) == BODY
    assert list(two.disk.quarantined()) == [image.id]


@pytest.mark.parametrize("applied", [True, False])
def test_killed_while_a_damaged_copy_is_set_aside(hosts: list[Rooms], *, applied: bool) -> None:
    """After the next start and pass nobody is served what is damaged, and the image is as the other member has it."""
    one, two = hosts
    for step in range(20):
        image = held_by_both(one, two, ROTTEN)
        two.faults.kill(len(two.faults.calls) + step, applied=applied)
        try:
            scrub(two)
        except Killed:
            two = Rooms(two.disk, two.base)
            two.maintenance.start_sweep()
            read_all(two)
            scrub(two)
        else:
            break
        assert one.base.get(image.id) == dataclasses.replace(image, replicas=(member_of(one),))
        assert (set(two.disk.ids()), list(two.disk.quarantined()).count(image.id)) == (set(), 1)
    assert step > 5


def test_a_disk_that_is_gone_keeps_its_notes(hosts: list[Rooms], monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read now may be there again soon."""
    monkeypatch.setattr("imgsvc.scrub._READ_AGAIN", 0.01)
    one, two = hosts
    image = held_by_both(one, two, BODY)
    two.faults.always("read", "quarantine", fault=DAMAGED)
    scrub(two)
    assert one.base.get(image.id) == dataclasses.replace(image, replicas=tuple(sorted(map(member_of, hosts))))


def test_other_bytes_than_those_that_were_read(hosts: list[Rooms]) -> None:
    """A copy that was brought here again stays, and so does its note."""
    one, two = hosts
    image = held_by_both(one, two, ROTTEN)

    def bring_again() -> None:
        two.disk.delete(image.id)
        pulled(two, image)

    two.faults.at("drop_copy", 1, bring_again)
    list(Scrub(two.disk, two.records, Pace(0), threading.Event()).run())
    assert one.base.get(image.id).replicas == tuple(sorted(map(member_of, hosts)))
    assert list(two.disk.ids()) == [image.id]


@pytest.mark.parametrize("call", ["get", "open", "read"])
def test_a_copy_that_is_dropped_while_it_is_scrubbed(hosts: list[Rooms], call: str) -> None:
    """It is not missed."""
    one, two = hosts
    image = held_by_both(one, two, BODY)

    def drop() -> None:
        assert two.base.drop_copy(image.id, [member_of(one)])
        two.disk.delete(image.id)

    two.faults.at(call, 1, drop)
    found = [finding.outcome for finding in Scrub(two.images, two.records, Pace(0), threading.Event()).run()]
    assert found == [Outcome.MATCHES if call == "read" else Outcome.LEFT]
    assert one.base.get(image.id).replicas == (member_of(one),)


@pytest.mark.parametrize("fault", [LOST, UNKNOWN])
def test_a_damaged_copy_when_records_are_away(
    hosts: list[Rooms], monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """It is set aside all the same, and is called damaged, for that brings a good one."""
    monkeypatch.setattr("imgsvc.scrub._RETRY_INTERVAL", 0.01)
    one, two = hosts
    image = held_by_both(one, two, ROTTEN)
    two.faults.next("drop_copy", fault, times=3)
    found = [finding.outcome for finding in Scrub(two.images, two.records, Pace(0), threading.Event()).run()]
    assert (found, list(two.disk.quarantined())) == ([Outcome.DAMAGED], [image.id])
    assert one.base.get(image.id).replicas == (member_of(one),)


@pytest.mark.parametrize("marker", ["these records", "others"])
def test_bytes_of_a_transfer_that_another_member_has_ended(hosts: list[Rooms], marker: str) -> None:
    """They go with the next start, in a directory that belongs to these records."""
    one, two = hosts
    image = left_by_a_fetch(one)
    end_ownership(one)
    two.base.update(two.base.get(image.id).failed("no member has room for it"))
    if marker == "others":
        one.disk.mark("others")
    sweep(one)
    assert set(one.disk.ids()) == (set() if marker == "these records" else {image.id})


@pytest.mark.parametrize("find", [scrub, sweep])
def test_bytes_of_an_image_that_was_complete(hosts: list[Rooms], find: Callable[[Rooms], None]) -> None:
    """Those that could not be set aside, or are back on a disk that was away, are left to a person."""
    one, _ = hosts
    image = complete(one)
    assert isinstance(one.disk, MemoryImageStore)
    if find is scrub:
        one.disk._images[image.id][:1] = b"T"
        one.faults.always("quarantine", fault=FULL)
        find(one)
    else:
        one.disk.delete(image.id)
        find(one)
        put(one.disk, image.id, BODY)
    one.faults.heal()
    sweep(one)
    assert one.base.get(image.id).status is Status.ERROR
    assert list(one.disk.ids()) == [image.id]


def test_an_image_that_was_brought_here_and_is_condemned_meanwhile(hosts: list[Rooms]) -> None:
    """It does not stop the start."""
    one, two = hosts
    image = complete(one, sha256="")
    put(two.disk, image.id, BODY)
    two.faults.at("hold", 1, lambda: one.base.update(one.base.get(image.id).failed("by hand")))
    sweep(two)
    found = two.base.get(image.id)
    assert (found.status, found.replicas) == (Status.ERROR, ())
