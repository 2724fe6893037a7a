"""What every metadata store makes of calls that are repeated, or come at the same time."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest

from imgsvc.errors import Conflict, NotFound, SourceTaken
from imgsvc.metadata.image import Image
from imgsvc.metadata.store import MetadataStore
from tests.metadata.conftest import Kind
from tests.metadata.helpers import SOURCE, at_once, entry, image, listed


class TestRepeating:
    def test_create(self, store: MetadataStore) -> None:
        """The same create once more, after an outcome that was not known, succeeds and adds nothing."""
        wanted = image(SOURCE)
        assert store.create(wanted) == store.create(wanted)
        assert len(listed(store)) == 1

    def test_update(self, store: MetadataStore) -> None:
        """The same update once more succeeds, and gives the revision that the next one needs."""
        downloading = store.create(image()).started(7)
        first = store.update(downloading)
        again = store.update(downloading)
        assert again == first == store.get(first.id)
        store.update(again.progressed(3))

    def test_update_that_another_has_followed(self, store: MetadataStore) -> None:
        """Once somebody else has changed the record, the same update once more is a conflict."""
        downloading = store.create(image()).started(7)
        current = store.update(store.update(downloading).progressed(3))
        with pytest.raises(Conflict):
            store.update(downloading)
        assert store.get(current.id) == current

    def test_hold_and_release(self, kind: Kind, store: MetadataStore) -> None:
        """Both may be repeated. Where no other host could hold it, a complete image is here whatever they say."""
        current = store.update(store.create(image()).completed(5, "ab"))
        store.release(current.id)
        store.release(current.id)
        assert entry(store, current.id).here is not kind.shared
        store.hold(current)
        store.hold(current)
        assert entry(store, current.id).here


class TestConcurrently:
    def test_creates_of_one_source(self, store: MetadataStore) -> None:
        """Of 32 creates of one source one makes an image, and the others are told which."""
        outcomes = at_once([partial(store.create, image(SOURCE)) for _ in range(32)])
        (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Image)]
        losers = [outcome for outcome in outcomes if isinstance(outcome, SourceTaken)]
        assert len(losers) == 31
        assert all(loser.image == winner for loser in losers)
        assert listed(store) == [winner] == [store.get_by_source(SOURCE)]

    def test_creates_of_one_id(self, store: MetadataStore) -> None:
        """Of 16 creates of one id one wins; the others get Conflict."""
        wanted = image()
        outcomes = at_once(
            [partial(store.create, dataclasses.replace(wanted, comment=str(number))) for number in range(16)]
        )
        assert [type(outcome) for outcome in outcomes].count(Conflict) == 15
        assert listed(store) == [outcome for outcome in outcomes if isinstance(outcome, Image)]

    def test_updates_of_one_revision(self, store: MetadataStore) -> None:
        """Of 16 updates of one state one wins; the others get Conflict."""
        created = store.create(image())
        outcomes = at_once([partial(store.update, created.progressed(number)) for number in range(16)])
        assert [type(outcome) for outcome in outcomes].count(Conflict) == 15
        assert [store.get(created.id)] == [outcome for outcome in outcomes if isinstance(outcome, Image)]

    def test_increments(self, store: MetadataStore) -> None:
        """Eight threads that each add one 10 times, trying again after a conflict, add 80."""
        created = store.create(image())

        def add_ten(who: str) -> None:
            for number in range(10):
                while True:
                    # The comment tells each write from every other: of two that are the same, both succeed.
                    current = dataclasses.replace(store.get(created.id), comment=f"{who} {number}")
                    try:
                        store.update(current.progressed(current.size + 1))
                        break
                    except Conflict:
                        continue

        assert at_once([partial(add_ten, str(number)) for number in range(8)]) == [None] * 8
        assert store.get(created.id).size == 80

    def test_delete_against_updates(self, store: MetadataStore) -> None:
        """Whatever a delete runs into, the record is gone afterwards, and its source is free."""
        for _ in range(10):
            created = store.create(image(SOURCE))
            updates = [partial(store.update, created.progressed(number)) for number in range(3)]
            at_once([*updates, partial(store.delete, created.id)])
            with pytest.raises(NotFound):
                store.get(created.id)
            with pytest.raises(NotFound):
                store.get_by_source(SOURCE)

    def test_deletes_of_one_image(self, store: MetadataStore) -> None:
        """Of eight deletes of one image one returns it; the others get NotFound."""
        created = store.create(image())
        outcomes = at_once([partial(store.delete, created.id)] * 8)
        assert [outcome for outcome in outcomes if isinstance(outcome, Image)] == [created]
        assert [type(outcome) for outcome in outcomes].count(NotFound) == 7
