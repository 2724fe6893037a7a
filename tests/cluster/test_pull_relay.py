"""Images that pass through a member which has no room for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgsvc.cluster import parts
from imgsvc.errors import Unavailable
from imgsvc.metadata.image import Image
from tests.cluster.members import MIB, Members, Reading, some
from tests.flaky import FULL
from tests.rooms import wait_until
from tests.source import Resource


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Members]:
    """The one can write nothing."""
    with Members(tmp_path / "images") as members:
        members.one.faults.always("write", fault=FULL)
        yield members


def parts_of(size: int) -> list[tuple[int, int]]:
    """What is asked for, by who wants all."""
    return [(first, min(first + MIB, size) - 1) for first in range(0, size, MIB)]


def asked_parts(members: Members, image: Image, member: str) -> list[tuple[int, int | None]]:
    """In order; what is asked for without a range is the pull that finds no room."""
    ranges = [each.range for each in members.asked(image, member) if each.range is not None]
    return sorted(ranges, key=lambda each: each[0])


def test_few_connections_for_many_parts(members: Members) -> None:
    """They are kept from part to part, of which one is read ahead, and nothing of the image is kept."""
    body = some(9 * MIB + 3)
    image = members.image(body)
    other = members.serve(image, Resource(body, keep=True))
    assert members.read(image).whole() == body
    assert asked_parts(members, image, other) == parts_of(len(body))
    assert members.others[other].most_connections <= 3  # the pull's, which found no room, and these
    assert set(members.one.disk.ids()) == members.one.claims() == set()


def test_many_clients_share_the_parts(members: Members) -> None:
    """Each is asked for once, by whoever comes first, and no pull is tried for each of them. When all have left, none is
    in memory."""
    body = some(5 * MIB + 3)
    image = members.image(body)
    other = members.serve(image, Resource(body, keep=True))
    assert members.read(image, 0, 1).whole() == body[:1]  # which finds out that there is no room
    before = len(members.asked(image, other))
    opened = [members.one.pulls.open(image) for _ in range(40)]
    readers = [Reading(each) for each in opened]
    assert all(reader.whole() == body for reader in readers)
    assert asked_parts(members, image, other)[1:] == parts_of(len(body))
    assert len(members.asked(image, other)) == before + 6
    wait_until(lambda: not members.one.pulls._parts._kept)


def test_who_came_before_it_was_known(members: Members) -> None:
    """That there is no room: a client that opened the image before, and reads it afterwards, tries no other pull."""
    body = some(2 * MIB)
    image = members.image(body)
    other = members.serve(image, Resource(body, keep=True))
    opened = [members.one.pulls.open(image) for _ in range(3)]
    assert members.read(image, 0, 1).whole() == body[:1]
    wait_until(lambda: not members.one.pulls.running)
    assert all(Reading(each).whole() == body for each in opened)
    assert sum(exchange.range is None for exchange in members.asked(image, other)) == 1


def test_a_slow_client_holds_nobody_up(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wants in the end is asked for again."""
    monkeypatch.setattr(parts, "_KEPT", 4)
    body = some(8 * MIB)
    image = members.image(body)
    other = members.serve(image, Resource(body, keep=True))
    slow = members.one.pulls.open(image)
    first = Reading(slow, 0, 1, close=False)
    assert first.whole() == body[:1]
    assert members.read(image).whole() == body
    assert Reading(slow, 1).whole() == body[1:]
    assert asked_parts(members, image, other).count((MIB, 2 * MIB - 1)) == 2


def test_a_client_that_leaves(members: Members) -> None:
    """While all wait for the part that was asked for when it came: they get it."""
    body = some(2 * MIB)
    image = members.image(body)
    members.serve(image, Resource(body, keep=True))
    assert members.read(image, 0, 1).whole() == body[:1]
    members.resources["a"].hold = True
    leaving = members.one.pulls.open(image)
    leaving.wait(0, len(body), lambda: None)
    wait_until(lambda: len(members.asked(image, "a")) == 3)
    readers = [members.read(image) for _ in range(3)]
    leaving.close()
    members.resources["a"].begin()
    assert all(reader.whole() == body for reader in readers)


@pytest.mark.parametrize("broken", [Resource(cut_after=100), Resource(stall_after=100), Resource(status=503)])
def test_another_member_goes_on(members: Members, broken: Resource) -> None:
    """With the very next byte."""
    members.be_patient(1.0)
    body = some(MIB)
    image = members.image(body)
    members.serve(image, dataclasses.replace(broken, body=body), "a")
    members.serve(image, Resource(body, keep=True), "b")
    assert members.read(image).whole() == body


def test_nobody_goes_on(members: Members) -> None:
    """The client is cut."""
    body = some(6 * MIB)
    image = members.image(body)
    other = members.serve(image, body)
    members.others[other].serve(
        members.path(image),
        lambda asked: members.resources[other].answer_to(asked) if asked.number < 4 else Resource(status=500),
    )
    reader = members.read(image)
    with pytest.raises(Unavailable, match=other):
        reader.whole()
    assert 0 < len(reader.body) < 6 * MIB
    assert body.startswith(reader.body)


@pytest.mark.parametrize("size", [1000, MIB, 3 * MIB])
def test_wrong_bytes(members: Members, size: int) -> None:
    """Nobody gets all of them; who has got none gets right ones. The member is told."""
    body, wrong = some(size), some(size)
    image = members.image(body)
    members.serve(image, Resource(wrong, keep=True), "a")
    reader = members.read(image)
    with pytest.raises(Unavailable):
        reader.whole()
    assert len(reader.body) < size
    wait_until(lambda: ("a", image.id) in members.one.accused)
    members.serve(image, Resource(body, keep=True), "b")
    assert members.read(image).whole() == body


def test_wrong_parts_are_forgotten(members: Members) -> None:
    """Also while somebody goes on reading the image: who comes then gets right ones."""
    body, wrong = some(3 * MIB), some(3 * MIB)
    image = members.image(body)
    members.serve(image, Resource(wrong, keep=True), "a")
    staying = members.one.pulls.open(image)
    assert Reading(staying, 0, 1, close=False).whole() == wrong[:1]
    with pytest.raises(Unavailable, match="wrong digest"):
        members.read(image).whole()
    members.serve(image, Resource(body, keep=True), "b")
    assert members.read(image).whole() == body
    staying.close()


def test_wrong_bytes_behind_what_was_kept(members: Members) -> None:
    """The digest is of all, wherever each part came from."""
    body = some(3 * MIB)
    image = members.image(body)
    members.one.faults.heal()
    resource = Resource(body, stall_after=MIB, keep=True)
    other = members.serve(image, resource)
    reader = members.read(image)
    wait_until(lambda: len(reader.body) == MIB)
    members.one.faults.always("write", fault=FULL)
    wrong = dataclasses.replace(members.resources[other], body=body[:-1] + bytes([body[-1] ^ 1]), stall_after=None)
    members.others[other].serve(members.path(image), wrong)
    resource.resume()
    with pytest.raises(Unavailable, match="wrong digest"):
        reader.whole()
    assert 2 * MIB < len(reader.body) < 3 * MIB


def test_parts_in_any_order(members: Members) -> None:
    """A range is served from what it needs, and no more is asked for."""
    body = some(2 * MIB)
    image = members.image(body)
    other = members.serve(image, Resource(body, keep=True))
    assert members.read(image, 5, 10).whole() == body[5:10]
    assert members.asked(image, other)[-1].range == (5, 9)
    assert members.read(image, MIB).whole() == body[MIB:]
