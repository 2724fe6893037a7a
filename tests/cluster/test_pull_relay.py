"""Images that pass through a member which has no room for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgsvc.errors import Unavailable
from tests.cluster.members import MIB, Members, some
from tests.flaky import FULL
from tests.rooms import wait_until
from tests.source import Resource


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Members]:
    """The one can write nothing."""
    with Members(tmp_path / "images") as members:
        members.one.faults.always("write", fault=FULL)
        yield members


def test_one_connection_for_many_parts(members: Members) -> None:
    """It is kept from part to part, and nothing of the image is."""
    body = some(2 * MIB + 3)
    image = members.image(body)
    other = members.serve(image, Resource(body, keep=True))
    assert members.read(image).whole() == body
    asked = [exchange.range for exchange in members.asked(image, other)[1:]]
    assert asked[0] == (0, 256 * 1024 - 1)
    assert asked[-1] == (2 * MIB, 2 * MIB + 2)
    assert members.others[other].most_connections <= 2  # the pull's, which found no room, and this
    assert set(members.one.disk.ids()) == members.one.claims() == set()


@pytest.mark.parametrize("broken", [Resource(cut_after=100), Resource(stall_after=100), Resource(status=503)])
def test_another_member_goes_on(members: Members, broken: Resource) -> None:
    """With the very next byte."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, dataclasses.replace(broken, body=body), "a")
    members.serve(image, Resource(body, keep=True), "b")
    assert members.read(image).whole() == body


def test_nobody_goes_on(members: Members) -> None:
    """The client is cut."""
    body = some(2 * MIB)
    image = members.image(body)
    other = members.serve(image, body)
    members.others[other].serve(
        members.path(image),
        lambda asked: members.resources[other].answer_to(asked) if asked.number < 4 else Resource(status=500),
    )
    reader = members.read(image)
    with pytest.raises(Unavailable, match=other):
        reader.whole()
    assert 0 < len(reader.body) < 2 * MIB
    assert body.startswith(reader.body)


@pytest.mark.parametrize("size", [1000, MIB])
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
    if size < MIB:
        assert members.read(image).whole() == body


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
