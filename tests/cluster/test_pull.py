"""Images that are brought here while they are read: whole and right, or not at all."""

from __future__ import annotations

import time

import pytest

from imgsvc.cluster import pulls
from imgsvc.cluster.course import HELD_BACK
from imgsvc.errors import Elsewhere, Unavailable
from tests.cluster.members import MIB, Members, Reading, check_kept, check_not_kept, some
from tests.flaky import FULL
from tests.rooms import wait_until
from tests.source import Resource


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
