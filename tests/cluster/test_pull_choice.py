"""Which member is asked for bytes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from imgsvc.cluster import choice
from imgsvc.cluster.choice import Choice
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from imgsvc.metadata.mirror import Known, LiveMember, Mirror

MEMBERS = {name: LiveMember(name, f"http://{name}.example") for name in ("a", "b", "c", "me")}


@pytest.fixture
def mirror() -> Mirror:
    mirror = Mirror()
    mirror.replace([], MEMBERS.values())
    return mirror


@pytest.fixture
def chosen(mirror: Mirror) -> Choice:
    return Choice(mirror, "me")


def held_by(*members: str) -> Image:
    return Image(new_id(), ImageType.KVM, size=1, status=Status.COMPLETE, replicas=members)


def asked(chosen: Choice, image: Image, times: int) -> Sequence[str]:
    """One after the other."""
    names = []
    for _ in range(times):
        member = chosen.best(image, ())
        assert member is not None
        with chosen.asking(member):
            names.append(member.id)
    return names


def test_who_holds_it(chosen: Choice, mirror: Mirror) -> None:
    """Live ones, by the record or by the mirror, and never this member."""
    image = held_by("b", "dead", "me")
    assert [member.id for member in chosen.holders(image)] == ["b"]
    mirror.put(Known(image.id, image.to_json(), 1, Status.COMPLETE, ImageType.KVM, 1, replicas=("a", "me")))
    assert [member.id for member in chosen.holders(image)] == ["a", "b"]
    mirror.leave("a")
    mirror.leave("b")
    assert chosen.best(image, ()) is None


def test_turns(chosen: Choice) -> None:
    """Those that have nothing to do are asked in turn."""
    assert asked(chosen, held_by("a", "b", "c"), 6) == ["a", "b", "c", "a", "b", "c"]


def test_the_least_loaded(chosen: Choice) -> None:
    """By what this member takes from them itself, and by what they say that they do besides."""
    image = held_by("a", "b")
    with chosen.asking(MEMBERS["a"]):
        chosen.said(MEMBERS["a"], "1")  # which is our own
        assert asked(chosen, image, 2) == ["b", "b"]
        chosen.said(MEMBERS["b"], "7")
        assert asked(chosen, image, 2) == ["a", "a"]
        chosen.said(MEMBERS["a"], "9")
        assert asked(chosen, image, 2) == ["b", "b"]


@pytest.mark.parametrize("said", ["", "-1", "many", "9" * 40])
def test_what_says_nothing(chosen: Choice, said: str) -> None:
    """Another program may answer anything."""
    chosen.said(MEMBERS["a"], said)
    assert asked(chosen, held_by("a", "b"), 2) == ["a", "b"]


def test_what_was_said_is_forgotten(chosen: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, so that a member is not left alone for what it did once."""
    chosen.said(MEMBERS["a"], "100")
    chosen.failed(MEMBERS["b"])
    image = held_by("a", "b")
    assert asked(chosen, image, 2) == ["a", "a"]
    monkeypatch.setattr(choice, "_FAILED", 0.0)
    assert asked(chosen, image, 2) == ["b", "b"]
    monkeypatch.setattr(choice, "_SAID", 0.0)
    assert asked(chosen, image, 2) == ["a", "b"]


def test_those_that_failed_are_the_last(chosen: Choice) -> None:
    """But better than nobody."""
    chosen.failed(MEMBERS["a"])
    image = held_by("a", "b")
    assert asked(chosen, image, 2) == ["b", "b"]
    member = chosen.best(image, {"b"})
    assert member is not None
    assert member.id == "a"
