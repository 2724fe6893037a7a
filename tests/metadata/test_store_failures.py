"""What every metadata store refuses, and that a refusal leaves no trace."""

from __future__ import annotations

import dataclasses

import pytest

from imgsvc.errors import Conflict, Invalid, NotFound, SourceTaken
from imgsvc.metadata.image import ImageType, new_id
from imgsvc.metadata.store import MetadataStore
from tests.metadata.helpers import SOURCE, image, listed


class TestFailures:
    def test_get_of_a_missing_image(self, store: MetadataStore) -> None:
        """A missing id raises NotFound, whatever it looks like."""
        for missing in (new_id(), "", "../etc/passwd", "é'\"\\"):
            with pytest.raises(NotFound):
                store.get(missing)

    def test_get_by_source_of_a_missing_source(self, store: MetadataStore) -> None:
        """A source that no image has raises NotFound; so does the empty one, which claims nothing."""
        store.create(image())
        for missing in (SOURCE, ""):
            with pytest.raises(NotFound):
                store.get_by_source(missing)

    def test_delete_of_a_missing_image(self, store: MetadataStore) -> None:
        """Deleting raises NotFound for an id that never was, and the second time."""
        created = store.create(image())
        store.delete(created.id)
        for missing in (created.id, new_id()):
            with pytest.raises(NotFound):
                store.delete(missing)

    def test_update_of_a_missing_image(self, store: MetadataStore) -> None:
        """An update never creates."""
        missing = dataclasses.replace(image(SOURCE), revision=1)
        with pytest.raises(NotFound):
            store.update(missing)
        assert listed(store) == []

    def test_update_after_delete(self, store: MetadataStore) -> None:
        """Whoever still works on a deleted image gets NotFound, and nothing comes back."""
        created = store.create(image(SOURCE))
        store.delete(created.id)
        with pytest.raises(NotFound):
            store.update(created.completed(1, "ab"))
        with pytest.raises(NotFound):
            store.get(created.id)
        with pytest.raises(NotFound):
            store.get_by_source(SOURCE)

    def test_update_of_an_old_revision(self, store: MetadataStore) -> None:
        """An update of a state that is not the stored one raises Conflict and changes nothing."""
        created = store.create(image())
        current = store.update(created.started(10))
        with pytest.raises(Conflict):
            store.update(created.failed("too late"))
        assert store.get(created.id) == current

    def test_create_with_an_id_in_use(self, store: MetadataStore) -> None:
        """A second record with one id raises Conflict, writes nothing and claims no source."""
        created = store.create(image(comment="first"))
        with pytest.raises(Conflict) as conflict:
            store.create(dataclasses.replace(created, comment="second", source=SOURCE))
        assert not isinstance(conflict.value, SourceTaken)
        assert store.get(created.id) == created
        with pytest.raises(NotFound):
            store.get_by_source(SOURCE)

    def test_create_with_a_source_taken(self, store: MetadataStore) -> None:
        """A second record of one source raises SourceTaken with the first as it is now, and writes nothing."""
        first = store.create(image(SOURCE))
        first = store.update(first.started(5))
        second = image(SOURCE, ImageType.CONTAINER)
        with pytest.raises(SourceTaken) as taken:
            store.create(second)
        assert taken.value.image == first
        assert listed(store) == [first]

    def test_text_that_is_none(self, store: MetadataStore) -> None:
        """JSON can escape half a character (a lone surrogate), which no UTF-8 can hold: Invalid, and no trace."""
        with pytest.raises(Invalid):
            store.create(image(SOURCE, comment="\ud800"))
        with pytest.raises(Invalid):
            store.create(image(SOURCE + "\udfff"))
        created = store.create(image(SOURCE))
        with pytest.raises(Invalid):
            store.update(created.failed("\ud800"))
        assert listed(store) == [created]

    def test_hold_of_a_missing_image(self, store: MetadataStore) -> None:
        """Nobody can hold, and nobody is asked who holds, what is not there; letting go of it is fine."""
        with pytest.raises(NotFound):
            store.hold(image())
        with pytest.raises(NotFound):
            store.holders(new_id())
        store.release(new_id())

    def test_close_twice(self, store: MetadataStore) -> None:
        """The second close does nothing."""
        store.close()
        store.close()
