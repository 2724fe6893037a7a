"""Members that fail in the middle of an image, or give wrong bytes: others go on, and nobody takes what is wrong."""

from __future__ import annotations

import dataclasses
import time

import pytest

from imgsvc.cluster.course import HELD_BACK
from imgsvc.errors import Unavailable
from imgsvc.metadata.mirror import LiveMember
from tests.cluster.members import MIB, Members, check_kept, check_not_kept, some
from tests.rooms import wait_until
from tests.source import Resource


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
    members.be_patient(1.0)
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
    members.be_patient(1.0)
    body = some(2 * MIB)
    image = members.image(body)
    answers = iter([dataclasses.replace(broken, body=body)])
    other = members.serve(image, body)
    members.others[other].serve(members.path(image), lambda _exchange: next(answers, Resource(status=500)))
    members.hold(image, "dead")
    reader = members.read(image)
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
    next_one = members.one.supply.choice.best(image, ())
    assert next_one is not None
    assert next_one.id == good


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


def test_wrong_bytes_and_nobody_can_be_told(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else goes wrong meanwhile, nobody has all of them."""
    image = members.image(some(2 * MIB))
    wrong = some(2 * MIB)
    members.serve(image, Resource(wrong, keep=True))

    def accuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(members.one.supply, "accuse", accuse)
    reader = members.read(image)
    with pytest.raises(Unavailable):
        reader.whole()
    assert wrong[:-HELD_BACK].startswith(reader.body)
    check_not_kept(members, image.id)
