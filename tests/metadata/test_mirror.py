"""The mirror by itself: what is newer wins, whoever says it first."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest

from imgsvc.errors import NotFound
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from imgsvc.metadata.mirror import Carrier, Known, LiveMember, Mirror

ONE = LiveMember("one", "http://one.example")
TWO = LiveMember("two", "http://two.example")


def known(image_id: str = "", revision: int = 1, size: int = 0, replicas: tuple[str, ...] = ()) -> Known:
    image = Image(id=image_id or new_id(), type=ImageType.KVM, size=size)
    return Known(image.id, image.to_json(), revision, image.status, image.type, image.size, replicas=replicas)


@pytest.fixture
def mirror() -> Mirror:
    return Mirror()


def sizes(mirror: Mirror) -> dict[str, int]:
    return {each.id: each.size for page in mirror.pages() for each in page}


class TestOrder:
    def test_a_late_event_does_not_undo_a_write(self, mirror: Mirror) -> None:
        """Nor does it bring back what was deleted here; one that is newer counts."""
        first = known(revision=3)
        mirror.follow(first.id, lambda _: first, 3)
        mirror.note(first.id, dataclasses.replace(first, size=7, revision=9), 9)
        mirror.follow(first.id, lambda _: dataclasses.replace(first, size=5), 5)
        assert sizes(mirror) == {first.id: 7}
        mirror.note(first.id, None, 11)
        for revision in (9, 10, 11):
            mirror.follow(first.id, lambda _: first, revision)
            mirror.followed(revision)
        assert sizes(mirror) == {}
        assert mirror.is_deleted(first.id)
        mirror.follow(first.id, lambda _: first, 12)
        assert sizes(mirror) == {first.id: 0}

    def test_a_late_note_does_not_undo_an_event(self, mirror: Mirror) -> None:
        """An answer that took its time is older than what was told meanwhile, also in the middle of a message."""
        first, second = known(), known()
        mirror.follow(first.id, lambda _: dataclasses.replace(first, size=8), 8)
        mirror.note(first.id, dataclasses.replace(first, size=7), 7)
        assert sizes(mirror) == {first.id: 8}
        mirror.follow(second.id, lambda _: second, 9)
        mirror.note(first.id, None, 8)
        assert set(sizes(mirror)) == {first.id, second.id}

    def test_an_older_note(self, mirror: Mirror) -> None:
        """Of two answers the newer one counts."""
        first = known()
        mirror.note(first.id, dataclasses.replace(first, size=7), 7)
        mirror.note(first.id, dataclasses.replace(first, size=6), 6)
        assert sizes(mirror) == {first.id: 7}

    def test_a_replacement(self, mirror: Mirror) -> None:
        """What was written here after the moment that it shows stays, and what it lacks is deleted."""
        kept, gone, added, removed = known(), known(), known(), known()
        mirror.replace([kept, gone, removed], [ONE], 10)
        mirror.note(added.id, added, 15)
        mirror.note(removed.id, None, 16)
        mirror.replace([kept, removed], [TWO], 14)
        assert set(sizes(mirror)) == {kept.id, added.id}
        assert mirror.is_deleted(gone.id)
        assert set(mirror.members()) == {"two"}
        mirror.follow(removed.id, lambda _: removed, 15)
        assert set(sizes(mirror)) == {kept.id, added.id}

    def test_revisions_that_begin_again(self, mirror: Mirror) -> None:
        """After etcd was set up anew, small revisions are new ones."""
        mirror.replace([known()], [], 100)
        mirror.note(new_id(), known(), 150)
        mirror.replace([], [], 5, anew=True)
        added = known()
        mirror.note(added.id, added, 6)
        assert set(sizes(mirror)) == {added.id}
        mirror.follow(added.id, lambda _: None, 7)
        assert sizes(mirror) == {}

    def test_any_order(self, mirror: Mirror) -> None:
        """Random histories of images, told by a watch that lags and by notes in between: the end is that of etcd, and
        no reader ever sees a state go back."""
        chance = random.Random(4)
        ids = [new_id() for _ in range(5)]
        history: list[tuple[str, int | None]] = []
        states: dict[str, list[tuple[int, int | None]]] = {image_id: [(0, None)] for image_id in ids}
        told = 0
        seen = dict.fromkeys(ids, 0)
        for revision in range(1, 2_000):
            image_id = chance.choice(ids)
            size = None if chance.random() < 0.2 else revision
            history.append((image_id, size))
            states[image_id].append((revision, size))
            while told < revision and chance.random() < 0.5:
                told += 1
                follow(mirror, *history[told - 1], told)
            if chance.random() < 0.5:
                at = chance.randint(max(1, revision - 10), revision)
                whom = chance.choice(ids)
                last = [state for when, state in states[whom] if when <= at][-1]
                mirror.note(whom, None if last is None else known(whom, size=last), at)
            for whom, size_now in sizes(mirror).items():
                assert size_now >= seen[whom]
                seen[whom] = size_now
        for revision in range(told + 1, len(history) + 1):
            follow(mirror, *history[revision - 1], revision)
        assert sizes(mirror) == {
            image_id: state[-1][1] for image_id, state in states.items() if state[-1][1] is not None
        }
        assert mirror._ahead == {}


def follow(mirror: Mirror, image_id: str, size: int | None, revision: int) -> None:
    mirror.follow(image_id, lambda _: None if size is None else known(image_id, size=size), revision)
    mirror.followed(revision)


class TestReading:
    def test_an_image_without_a_record(self, mirror: Mirror) -> None:
        """Its owner may be noted before it; nobody sees it, and nothing of it is lost."""
        first = dataclasses.replace(known(), owner="one", carrier=Carrier("one", "http://one.example"))
        mirror.follow(first.id, lambda _: dataclasses.replace(first, document=""), 1)
        assert sizes(mirror) == {}
        with pytest.raises(NotFound):
            mirror.get(first.id)
        mirror.follow(first.id, lambda now: now and dataclasses.replace(now, document=first.document), 2)
        assert mirror.get(first.id).owner == "one"
        mirror.follow(first.id, lambda now: now and dataclasses.replace(now, document=""), 3)
        assert sizes(mirror) == {}
        assert mirror.is_deleted(first.id)

    def test_documents(self, mirror: Mirror) -> None:
        """The replicas follow the other keys, as `Image.to_json` writes them."""
        for replicas in ((), ("a",), ("a", "b")):
            mirror.put(known(replicas=replicas))
        for document, page in zip(
            itertools.chain.from_iterable(mirror.list()), itertools.chain.from_iterable(mirror.pages()), strict=True
        ):
            assert document == page.image.to_json() == page.to_json()
            assert json.loads(document)["replicas"] == list(page.replicas)

    def test_types(self, mirror: Mirror) -> None:
        """A type lists its own, and a page without any is none."""
        for image_type in (ImageType.KVM, ImageType.CONTAINER, ImageType.KVM):
            image = Image(id=new_id(), type=image_type)
            mirror.put(Known(image.id, image.to_json(), 1, Status.PENDING, image_type, 0))
        assert [len(page) for page in mirror.list()] == [3]
        assert [len(page) for page in mirror.list(ImageType.CONTAINER)] == [1]
        mirror.replace([], [])
        assert list(mirror.list(ImageType.KVM)) == []

    def test_what_was_deleted_is_remembered_for_a_while(self, mirror: Mirror) -> None:
        """In a bounded memory; an id that never was is not among it."""
        ids = [new_id() for _ in range(10_001)]
        for image_id in ids:
            mirror.put(known(image_id))
            mirror.remove(image_id)
            mirror.remove(image_id)
        assert not mirror.is_deleted(ids[0])
        assert all(map(mirror.is_deleted, ids[1:]))
        assert not mirror.is_deleted(new_id())

    def test_members(self, mirror: Mirror) -> None:
        """Who is live, since when who is not, and one that comes back."""
        mirror.replace([], [ONE, TWO])
        mirror.leave("two")
        assert set(mirror.members()) == {"one"}
        assert mirror.gone_for("one") == 0.0
        assert 0.0 <= mirror.gone_for("two") < 5
        mirror.join(TWO)
        assert mirror.gone_for("two") == 0.0

    def test_listeners(self, mirror: Mirror) -> None:
        """They hear of each change, and nothing of what changes nothing."""
        heard: list[str] = []
        mirror.listen(heard.append)
        first = known()
        mirror.follow(first.id, lambda _: first, 5)
        mirror.note(first.id, None, 4)
        mirror.join(ONE)
        mirror.leave("one")
        mirror.replace([], [])
        assert heard == [first.id, "", "", ""]

    def test_a_look_that_finds_nothing_new(self, mirror: Mirror) -> None:
        """Nobody hears of it, and it still counts as what was known then."""
        first = known(revision=3, size=1)
        mirror.note(first.id, first, 3)
        heard: list[str] = []
        mirror.listen(heard.append)
        mirror.note(first.id, first, 8)
        mirror.note(new_id(), None, 9)
        assert heard == []
        mirror.follow(first.id, lambda _: dataclasses.replace(first, size=5), 7)
        assert mirror.get(first.id).size == 1

    def test_staleness(self, mirror: Mirror) -> None:
        """None while the store is heard, seconds when it is lost."""
        said = [mirror.stale]
        mirror.heard()
        said.append(mirror.stale)
        mirror.lost()
        said.append(mirror.stale)
        assert [age is None for age in said] == [False, True, False]
        assert mirror.age < 5
