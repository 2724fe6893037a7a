"""Who owns an image, and who holds it, in every metadata store."""

from __future__ import annotations

import pytest

from imgsvc.errors import Conflict, NotFound
from imgsvc.metadata.store import Entry, MetadataStore
from tests.metadata.conftest import MEMBER, Kind
from tests.metadata.helpers import SOURCE, entry, image


class TestSurroundings:
    def test_a_transfer(self, store: MetadataStore) -> None:
        """Who writes a record in transfer owns it; who completes it holds it."""
        current = store.create(image(SOURCE))
        assert entry(store, current.id) == Entry(current, owner=MEMBER.id, here=False)
        current = store.update(current.started(5))
        assert entry(store, current.id) == Entry(current, owner=MEMBER.id, here=False)
        current = store.update(current.completed(5, "ab"))
        assert entry(store, current.id) == Entry(current, owner=None, here=True)

    def test_a_failure(self, store: MetadataStore) -> None:
        """An image in error has neither owner nor holder, even one that was whole; fetched again it has an owner."""
        current = store.update(store.create(image(SOURCE)).completed(5, "ab"))
        current = store.update(current.failed("the bytes have rotted"))
        assert entry(store, current.id) == Entry(current, owner=None, here=False)
        current = store.update(current.requeued())
        assert entry(store, current.id) == Entry(current, owner=MEMBER.id, here=False)

    def test_deletion_forgets_who_held(self, store: MetadataStore) -> None:
        """A record that comes later with the same id is held by nobody."""
        current = store.update(store.create(image()).completed(5, "ab"))
        store.delete(current.id)
        store.create(current.requeued())
        assert not entry(store, current.id).here

    def test_holding_is_no_change_of_the_record(self, store: MetadataStore) -> None:
        """A note of who holds leaves the revision alone: whoever read the record can still update it."""
        created = store.update(store.create(image()).completed(1, "ab"))
        store.hold(created)
        store.release(created.id)
        store.update(created.failed("an update of what was created"))

    def test_the_last_copy_is_lost(self, store: MetadataStore, kind: Kind) -> None:
        """The image goes with it, also when that is said twice, but not at another revision. Others are told whose copy
        it was."""
        current = store.update(store.create(image(SOURCE)).completed(5, "ab"))
        failed = current.failed("the bytes have rotted")
        assert store.lose_copy(failed, lambda: True)
        found = entry(store, current.id)
        whose = f"; held by {MEMBER.id} at {MEMBER.url}" if kind.shared else ""
        assert found.image.error == "the bytes have rotted" + whose
        assert (found.owner, found.here) == (None, False)
        with pytest.raises(Conflict):
            store.lose_copy(current.failed("for another reason"), lambda: True)
        assert store.get(current.id) == found.image
        with pytest.raises(NotFound):
            store.lose_copy(image().failed("never there"), lambda: True)

    def test_a_copy_that_is_not_lost(self, store: MetadataStore) -> None:
        """Who finds at the last moment that the bytes are there changes nothing."""
        current = store.update(store.create(image(SOURCE)).completed(5, "ab"))
        with pytest.raises(Conflict):
            store.lose_copy(current.failed("the bytes have rotted"), lambda: False)
        assert entry(store, current.id) == Entry(current, owner=None, here=True)

    def test_holders_names_others_only(self, store: MetadataStore) -> None:
        """This member is no other."""
        current = store.update(store.create(image()).completed(5, "ab"))
        assert list(store.holders(current.id)) == []
