"""Images that are brought here while they are read: whole and right, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imgsvc.cluster import pulls
from imgsvc.cluster.course import HELD_BACK
from imgsvc.errors import Conflict, Elsewhere, ImgsvcError, Stopping, Unavailable
from imgsvc.metadata.image import ImageType, Status
from imgsvc.metadata.mirror import LiveMember
from imgsvc.throttle import Throttle
from tests.cluster.members import MIB, Members, Reading, some
from tests.flaky import FULL, LOST
from tests.images.helpers import content, put
from tests.rooms import wait_until
from tests.source import Resource


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Members]:
    with Members(tmp_path / "images") as members:
        yield members


def check_kept(members: Members, image_id: str, body: bytes) -> None:
    """Here, on record, and with nothing half beside it."""
    wait_until(lambda: not members.one.pulls.running)
    assert content(members.one.disk, image_id) == body
    assert members.one.disk.member in members.records.holding[image_id]
    assert members.one.claims() == set()


def check_not_kept(members: Members, image_id: str) -> None:
    wait_until(lambda: not members.one.pulls.running)
    assert image_id not in set(members.one.disk.ids())
    assert members.one.disk.member not in members.records.holding.get(image_id, set())
    assert members.one.claims() == set()


@pytest.mark.parametrize("size", [1, HELD_BACK, HELD_BACK + 1, 5 * MIB + 7])
def test_read_and_kept(members: Members, size: int) -> None:
    """Who reads gets the bytes, and then they are here."""
    body = some(size)
    image = members.image(body)
    other = members.serve(image, body)
    assert members.read(image).whole() == body
    check_kept(members, image.id, body)
    (asked,) = members.asked(image, other)
    assert (asked.headers["if-match"], asked.range) == (f'"{image.sha256}"', None)
    assert asked.headers["x-imgsvc-peer"] == members.one.disk.member


def test_no_live_holder(members: Members) -> None:
    """It is said at once: none on record, none live, or it is this member itself."""
    image = members.image(b"bytes")
    with pytest.raises(Elsewhere):
        members.one.pulls.open(image)
    members.hold(image, "dead")
    members.hold(image, members.one.disk.member)
    with pytest.raises(Elsewhere):
        members.one.pulls.open(image)


def test_many_readers_and_one_pull(members: Members) -> None:
    """Who comes later joins, whatever it wants."""
    body = some(4 * MIB)
    image = members.image(body)
    resource = Resource(body, stall_after=2 * MIB)
    other = members.serve(image, resource)
    readers = [members.read(image) for _ in range(40)]
    wait_until(lambda: all(len(reader.body) == 2 * MIB for reader in readers))
    part, rest = members.read(image, 100, MIB), members.read(image, 3 * MIB)
    assert part.whole() == body[100:MIB]
    resource.resume()
    for reader in readers:
        assert reader.whole() == body
    assert rest.whole() == body[3 * MIB :]
    check_kept(members, image.id, body)
    assert len(members.asked(image, other)) == 1


def test_the_last_bytes_wait_for_the_digest(members: Members) -> None:
    """However slow the end is: what is not known to be right is not whole."""
    body = some(MIB)
    image = members.image(body)
    resource = Resource(body, stall_after=MIB - 1)
    members.serve(image, resource)
    reader = members.read(image)
    wait_until(lambda: len(reader.body) == MIB - HELD_BACK)
    time.sleep(0.1)
    assert len(reader.body) == MIB - HELD_BACK
    resource.resume()
    assert reader.whole() == body


def test_first_bytes_at_once(members: Members) -> None:
    """A slow member's bytes do not wait for a block."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, Resource(body, rate=100_000))
    began = time.monotonic()
    reader = members.read(image)
    wait_until(lambda: bool(reader.body))
    assert time.monotonic() - began < 0.3  # a block would take ten seconds
    for _ in range(3):
        before = len(reader.body)
        time.sleep(0.3)
        assert len(reader.body) > before


@pytest.mark.parametrize(
    "broken",
    [
        Resource(cut_after=700_000),
        Resource(cut_after=700_000, reset=True),
        Resource(stall_after=700_000),
        Resource(hold=True),
        Resource(garbage=b"220 mail.example\r\n\r\n"),
        Resource(status=503),
        Resource(chunked=True),
        Resource(announce=17),
    ],
)
def test_another_member_goes_on(members: Members, broken: Resource) -> None:
    """From where the first one stopped, without a gap or a byte twice."""
    body = some(2 * MIB)
    image = members.image(body)
    bad = members.serve(image, dataclasses.replace(broken, body=body), "a")
    good = members.serve(image, body, "b")
    assert members.read(image).whole() == body
    check_kept(members, image.id, body)
    assert len(members.asked(image, bad)) == 1
    (asked,) = members.asked(image, good)
    some_came = broken.cut_after or broken.stall_after
    assert asked.first <= 700_000 if some_came else asked.first == 0
    assert asked.first > 0 or not some_came or broken.reset
    assert members.one.accused == []


def test_a_dead_member_is_skipped(members: Members) -> None:
    """Though it is still on record as live; and it is asked after the others for a while."""
    body = some(MIB)
    images = [members.image(body), members.image(body)]
    for image in images:
        members.hold(image, "a")
        members.serve(image, body, f"b{image.id}")
    members.one.mirror.join(LiveMember("a", "http://127.0.0.1:1"))
    began = time.monotonic()
    for image in images:
        assert members.read(image).whole() == body
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("broken", [Resource(cut_after=700_000), Resource(stall_after=700_000)])
def test_nobody_goes_on(members: Members, broken: Resource) -> None:
    """Those who have some of it are cut, and it is not kept."""
    body = some(2 * MIB)
    image = members.image(body)
    answers = iter([dataclasses.replace(broken, body=body)])
    other = members.serve(image, body)
    members.others[other].serve(members.path(image), lambda _exchange: next(answers, Resource(status=500)))
    reader = members.read(image)
    members.hold(image, "dead")
    with pytest.raises(Unavailable, match=f"{other} at {members.others[other].url}, dead, which is not live"):
        reader.whole()
    assert body.startswith(reader.body)
    check_not_kept(members, image.id)


@pytest.mark.parametrize("size", [1000, 2 * MIB])
def test_wrong_bytes(members: Members, size: int) -> None:
    """The member is told. Who has had none of them gets right ones, everybody else is cut, nobody has all of them."""
    body, wrong = some(size), some(size)
    image = members.image(body)
    bad = members.serve(image, Resource(wrong, stall_after=size - 1), "a")
    good = members.serve(image, Resource(body, hold=True), "b")
    reader = members.read(image)
    last = members.read(image, size - 1)
    wait_until(lambda: len(reader.body) == max(size - HELD_BACK, 0))
    members.resources[bad].resume()
    wait_until(lambda: bool(members.asked(image, good)))
    late = members.read(image)
    members.resources[good].begin()
    assert (late.whole(), last.whole()) == (body, body[-1:])
    if size < HELD_BACK:
        assert reader.whole() == body
    else:
        with pytest.raises(Unavailable):
            reader.whole()
        assert reader.body == wrong[:-HELD_BACK]
    check_kept(members, image.id, body)
    wait_until(lambda: members.one.accused == [(bad, image.id)])


def test_wrong_bytes_of_one_of_two(members: Members) -> None:
    """Nobody knows whose were wrong: both are told, and each is asked for all."""
    body = some(2 * MIB)
    image = members.image(body)
    bad = members.serve(image, Resource(bytes(MIB) + body[MIB:], cut_after=MIB), "a")
    good = members.serve(image, body, "b")
    reader = members.read(image)
    with pytest.raises(Unavailable):
        reader.whole()
    check_kept(members, image.id, body)
    wait_until(lambda: {(bad, image.id), (good, image.id)} <= set(members.one.accused))


def test_wrong_bytes_everywhere(members: Members) -> None:
    image = members.image(some(2 * MIB))
    for member in ("a", "b"):
        members.serve(image, some(2 * MIB), member)
    with pytest.raises(Unavailable):
        members.read(image).whole()
    check_not_kept(members, image.id)
    assert [len(members.asked(image, member)) for member in ("a", "b")] == [1, 1]


def test_a_reader_that_leaves(members: Members) -> None:
    """The pull goes on without it."""
    body = some(MIB)
    image = members.image(body)
    resource = Resource(body, stall_after=MIB // 2)
    members.serve(image, resource)
    reader = members.read(image, 0, MIB // 2)
    assert reader.whole() == body[: MIB // 2]
    resource.resume()
    check_kept(members, image.id, body)


def test_deleted(members: Members) -> None:
    """All ends at once."""
    image = members.image(some(MIB))
    members.serve(image, Resource(some(MIB), stall_after=MIB // 2))
    readers = members.read(image), members.read(image, MIB - 1)
    wait_until(lambda: len(readers[0].body) == MIB // 2)
    members.one.service.delete(image.id)
    for reader in readers:
        with pytest.raises(Conflict):
            reader.whole()
    check_not_kept(members, image.id)


@pytest.mark.parametrize("call", ["commit", "hold", "get"])
def test_deleted_at_the_end(members: Members, call: str) -> None:
    """However late: nothing of it stays."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, body)
    members.one.faults.at(call, 1, lambda: members.one.base.delete(image.id))
    with pytest.raises(ImgsvcError):
        members.one.pulls.copy(image)
    check_not_kept(members, image.id)


def test_fetched_again_meanwhile(members: Members) -> None:
    """What was right when it came is dropped when the image has other bytes by now."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, body)
    other = dataclasses.replace(image, sha256="0" * 64)
    members.one.faults.at("hold", 1, lambda: members.one.base.update(other))
    with pytest.raises(Conflict):
        members.one.pulls.copy(image)
    check_not_kept(members, image.id)


@pytest.mark.parametrize("call", ["space", "writer", "write", "commit"])
@pytest.mark.parametrize("time", [1, 2])
def test_no_room(members: Members, call: str, time: int) -> None:
    """The bytes are passed on from where the copy ended, and none of them stays."""
    body = some(3 * MIB)
    image = members.image(body)
    members.serve(image, Resource(body, keep=True))
    members.one.faults.at(call, time, lambda: members.one.faults.always(call, fault=FULL))
    readers = [members.read(image) for _ in range(3)]
    part = members.read(image, 100, 2 * MIB)
    for reader in readers:
        assert reader.whole() == body
    assert part.whole() == body[100 : 2 * MIB]
    if members.one.faults.calls.count(call) > time:
        check_not_kept(members, image.id)


def test_records_away_at_the_end(members: Members) -> None:
    """The bytes stay, and are on record when the records answer again."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, body)
    members.one.faults.always("hold", fault=LOST)
    with pytest.raises(Unavailable):
        members.one.pulls.copy(image)
    assert content(members.one.disk, image.id) == body
    members.one.faults.heal()
    members.one.settlements.retry()
    check_kept(members, image.id, body)


def test_read_before_it_is_on_record(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the records are away one pull is enough for all, and nothing is read again for what it has found right."""
    body = some(MIB)
    image = members.image(body)
    other = members.serve(image, body)
    remembered = dataclasses.replace(image, replicas=(other,))
    monkeypatch.setattr(members.records, "look", lambda _id: (remembered, 1.0))
    members.one.faults.always("hold", fault=LOST)
    for _ in range(3):
        assert Reading(members.one.service.open(image.id)[1]).whole() == body
        wait_until(lambda: not members.one.pulls.running)
    assert len(members.asked(image, other)) == 1
    assert Reading(members.one.service.open(image.id, own=True)[1]).whole() == body
    assert not members.one.digests.doubts(image.id)
    changed = dataclasses.replace(remembered, sha256="0" * 64)
    monkeypatch.setattr(members.records, "look", lambda _id: (changed, 1.0))
    with pytest.raises(Elsewhere):
        members.one.service.open(image.id, own=True)


@pytest.mark.parametrize("noted", [True, False])
def test_read_after_another_pull_was_over(members: Members, *, noted: bool) -> None:
    """Who asked before has the image from here, though nobody else can give it any more, and nothing fits."""
    body = some(MIB)
    image = members.image(body)
    other = members.serve(image, body)
    late = members.one.pulls.open(image)
    if not noted:
        members.one.faults.always("hold", fault=LOST)
    assert members.read(image).whole() == body
    wait_until(lambda: not members.one.pulls.running)
    if noted:
        members.hold(image, members.one.disk.member)
    members.one.mirror.leave(other)
    members.one.faults.always("space", "writer", "hold", fault=LOST)
    assert Reading(late).whole() == body
    assert len(members.asked(image, other)) == 1
    if not noted:
        with pytest.raises(Unavailable):
            members.one.pulls.copy(image)


def test_a_look_from_before_it_was_on_record(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been noted since is served, and not doubted."""
    body = some(MIB)
    image = members.image(body)
    other = members.serve(image, body)
    monkeypatch.setattr(members.records, "look", lambda _id: (dataclasses.replace(image, replicas=(other,)), None))
    members.one.pulls.copy(image)
    members.hold(image, members.one.disk.member)
    assert Reading(members.one.service.open(image.id, own=True)[1]).whole() == body
    assert not members.one.digests.doubts(image.id)


def test_copy(members: Members) -> None:
    """Without a client, and no faster than it may be; a client that comes is not made to wait."""
    body = some(3 * MIB)
    images = [members.image(body), members.image(body)]
    for image in images:
        members.serve(image, body, image.id)
    began = time.monotonic()
    members.one.pulls.copy(images[0], Throttle(6 * MIB))
    assert 0.3 < time.monotonic() - began < 2
    check_kept(members, images[0].id, body)
    copying = threading.Thread(target=members.one.pulls.copy, args=(images[1], Throttle(10_000)))
    copying.start()
    assert members.read(images[1]).whole() == body
    copying.join()
    check_kept(members, images[1].id, body)


def test_a_copy_that_somebody_waits_for(members: Members) -> None:
    """One that goes on slowly in the background becomes as fast as it can be."""
    body = some(4 * MIB)
    image = members.image(body)
    members.serve(image, body)
    copying = threading.Thread(target=members.one.pulls.copy, args=(image, Throttle(100_000)))
    copying.start()
    wait_until(lambda: bool(members.one.pulls.running))
    began = time.monotonic()
    members.one.pulls.copy(image)
    assert time.monotonic() - began < 5
    copying.join()
    check_kept(members, image.id, body)


def test_copy_of_nothing(members: Members) -> None:
    """An image without a byte needs none."""
    image = members.image(b"")
    members.one.pulls.copy(image)
    check_kept(members, image.id, b"")


def test_the_service_stops(members: Members) -> None:
    """Pulls end, and leave nothing."""
    image = members.image(some(MIB))
    members.serve(image, Resource(some(MIB), stall_after=MIB // 2))
    reader = members.read(image)
    wait_until(lambda: len(reader.body) == MIB // 2)
    members.one.pulls.close()
    with pytest.raises(Stopping):
        reader.whole()
    check_not_kept(members, image.id)


def test_an_image_without_a_digest(members: Members) -> None:
    """Nobody could tell whether a copy is right, so there is none."""
    body = some(MIB)
    image = members.image(body, "")
    members.serve(image, Resource(body, keep=True))
    assert members.read(image).whole() == body
    check_not_kept(members, image.id)
    with pytest.raises(Unavailable):
        members.one.pulls.copy(image)


def test_too_many_pass_through(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next is told to come back; when one has gone there is room again."""
    monkeypatch.setattr(pulls, "_RELAYS", 2)
    body = some(MIB)
    image = members.image(body)
    members.serve(image, Resource(body, keep=True))
    members.one.faults.always("writer", fault=FULL)
    readers = [members.one.pulls.open(image), members.one.pulls.open(image)]
    slow = [Reading(reader, 0, 1, close=False) for reader in readers]
    for reading in slow:
        reading.whole()
    with pytest.raises(Unavailable, match="too many"):
        members.read(image).whole()
    readers[0].close()
    assert members.read(image).whole() == body
    readers[1].close()


def test_copy_of_what_is_here(members: Members) -> None:
    """It is held, and nobody is asked."""
    body = some(MIB)
    image = members.image(body)
    other = members.serve(image, body)
    for _ in range(2):
        members.one.pulls.copy(image)
        members.hold(image, members.one.disk.member)
    assert len(members.asked(image, other)) == 1


def test_copies_stop(members: Members) -> None:
    """At once, before the service stops; those for which clients wait go on."""
    images = [members.image(some(MIB)), members.image(some(MIB))]
    resources = [Resource(some(MIB), stall_after=100_000), Resource(some(MIB), stall_after=100_000)]
    for image, resource in zip(images, resources, strict=True):
        members.serve(image, resource, image.id)
    reader = members.read(images[0])
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(members.one.pulls.copy, images[1])
        wait_until(lambda: len(reader.body) > 0 and bool(members.asked(images[1], images[1].id)))
        members.one.pulls.stop_copies()
        with pytest.raises(Stopping):
            copying.result(5)
    assert members.one.pulls.running == 1
    with pytest.raises(Stopping):
        members.one.pulls.copy(images[1])


def test_copies_from_a_slow_member_stop(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its bytes trickle in without a pause, and a block takes long to be full."""
    monkeypatch.setattr("imgsvc.cluster.line.TICK", 0.5)
    image = members.image(some(8 * MIB))
    member = members.serve(image, Resource(some(8 * MIB), rate=200_000))
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(members.one.pulls.copy, image)
        wait_until(lambda: bool(members.asked(image, member)))
        time.sleep(0.1)
        members.one.pulls.stop_copies()
        with pytest.raises(Stopping):
            copying.result(2)


def test_copies_stop_that_a_slow_client_reads(members: Members) -> None:
    """They do not, though it has more than it takes at the moment: as all downloads it has time to end."""
    body = some(2 * MIB)
    image = members.image(body)
    resource = Resource(body, stall_after=MIB)
    member = members.serve(image, resource)
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(members.one.pulls.copy, image)
        wait_until(lambda: bool(members.asked(image, member)))
        reader = members.one.pulls.open(image)
        first = Reading(reader, 0, 1, close=False)
        first.whole()
        members.one.pulls.stop_copies()
        members.resources[member].resume()
        assert first.body + Reading(reader, 1).whole() == body
        with contextlib.suppress(Stopping):
            copying.result(5)
    check_kept(members, image.id, body)


def test_a_deletion_that_was_missed(members: Members) -> None:
    """What has no record is not brought here any longer than until somebody looks."""
    image = members.image(some(MIB))
    members.serve(image, Resource(some(MIB), stall_after=MIB // 2))
    reader = members.read(image)
    wait_until(lambda: bool(reader.body))
    members.one.pulls.reconcile()
    assert members.one.pulls.running == 1
    members.one.base.delete(image.id)
    members.one.pulls.reconcile()
    with pytest.raises(Conflict):
        reader.whole()
    check_not_kept(members, image.id)


def test_a_file_that_has_changed(members: Members) -> None:
    """It is not served, though on record; others have the image."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, Resource(body, keep=True))
    put(members.one.disk, image.id, body[1:])
    members.hold(image, members.one.disk.member)
    _, reader, _ = members.one.service.open(image.id)
    assert Reading(reader).whole() == body
    with pytest.raises(Unavailable):
        members.one.service.open(image.id, own=True)


def test_fetched_again_here(members: Members) -> None:
    """What failed is fetched anew, though what it was is still on its way here."""
    members.one.start()
    body = some(MIB)
    image = members.image(body, source=members.source.serve("/image", b"new"))
    members.serve(image, Resource(body, stall_after=MIB // 2))
    reader = members.read(image)
    wait_until(lambda: bool(reader.body))
    members.records.update(image.failed("it was lost"))
    assert members.one.service.fetch(image.source, ImageType.KVM, "").id == image.id
    with pytest.raises(Conflict):
        reader.whole()
    wait_until(lambda: members.records.get(image.id).status is Status.COMPLETE)
    assert content(members.one.disk, image.id) == b"new"


def test_what_is_not_complete_any_more(members: Members) -> None:
    """It ends with the news; what happens to others does not concern it."""
    image, other = members.image(some(MIB)), members.image(b"other")
    members.serve(image, Resource(some(MIB), stall_after=MIB // 2))
    reader = members.read(image)
    wait_until(lambda: bool(reader.body))
    members.one.mirror.remove(other.id)
    members.one.pulls.changed(other.id)
    members.one.pulls.changed(image.id)
    assert members.one.pulls.running == 1
    members.one.mirror.remove(image.id)
    members.one.pulls.changed(image.id)
    with pytest.raises(Conflict):
        reader.whole()
    check_not_kept(members, image.id)
