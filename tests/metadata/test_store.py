"""What every metadata store promises of the records that it keeps, over restarts too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from imgsvc.errors import NotFound, SourceTaken
from imgsvc.metadata.image import ImageType, Status
from imgsvc.metadata.store import MetadataStore
from imgsvc.settings import MetadataStoreSettings
from tests.metadata.conftest import KINDS, Opener
from tests.metadata.helpers import SOURCE, entry, image, listed


def test_every_store_type_is_in_this_suite() -> None:
    """Whatever `metadataStoreType` may be in the settings passes this suite."""
    (field,) = [field for field in dataclasses.fields(MetadataStoreSettings) if field.name == "type"]
    expected: str = field.metadata["setting"].kind.expects
    assert set(expected.removeprefix("one of ").split(", ")) == set(KINDS)


class TestRecords:
    @pytest.mark.parametrize("status", Status)
    def test_comes_back_as_it_went_in(self, store: MetadataStore, status: Status) -> None:
        """Every field survives, sizes of a petabyte and times to the microsecond included."""
        created = store.create(image(SOURCE))
        changed = dataclasses.replace(
            created,
            comment="a comment",
            status=status,
            size=10**15,
            expected_size=-1,
            download_start=datetime(2026, 11, 23, 7, 4, 35, 123456, UTC),
            download_end=datetime(2026, 11, 23, 7, 4, 35, 1, UTC),
            sha256="ab" * 32,
            error="a sentence",
        )
        updated = store.update(changed)
        assert updated == dataclasses.replace(changed, revision=updated.revision, replicas=updated.replicas)
        assert updated.revision != created.revision
        assert store.get(created.id) == store.get_by_source(SOURCE) == updated
        assert listed(store) == [updated]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "'; DROP TABLE imgsvc_images; --",
            '"\\"',
            "a\0b",
            "\0",
            "é\u2028漢字🐧",
            "e\u0301",
            "%_*?",
            " x ",
            "x" * 100_000,
        ],
        ids=["empty", "quote", "double", "nul", "only nul", "unicode", "combining", "wildcards", "blanks", "long"],
    )
    def test_text_stays_as_it_is(self, store: MetadataStore, text: str) -> None:
        """Comment and source may be any text, and a source is found by exactly its own."""
        created = store.create(image(SOURCE + text, comment=text))
        assert store.get(created.id).comment == text
        assert store.get_by_source(SOURCE + text) == created
        with pytest.raises(NotFound):
            store.get_by_source(SOURCE + text + "\0")
        with pytest.raises(NotFound):
            store.get_by_source((SOURCE + text).upper())

    def test_images_without_source_do_not_meet(self, store: MetadataStore) -> None:
        """Uploads have no source; any number of them may be there."""
        created = [store.create(image()) for _ in range(3)]
        assert sorted(created, key=lambda image: image.id) == listed(store)

    def test_delete_returns_the_image_as_it_was(self, store: MetadataStore) -> None:
        """The last state comes back, and the source can be claimed again."""
        current = store.update(store.create(image(SOURCE)).completed(3, "ab"))
        assert store.delete(current.id) == current
        again = store.create(image(SOURCE))
        assert store.get_by_source(SOURCE) == again

    def test_update_keeps_the_claim(self, store: MetadataStore) -> None:
        """An image that failed still has its source, so that a new request can find and fetch it again."""
        failed = store.update(store.create(image(SOURCE)).failed("no route"))
        assert store.get_by_source(SOURCE) == failed
        with pytest.raises(SourceTaken):
            store.create(image(SOURCE))

    def test_ping(self, store: MetadataStore) -> None:
        """A store in order says nothing, and shows nothing of the question."""
        store.ping()
        assert listed(store) == []


class TestReopening:
    def test_records_stay(self, reopen: Opener) -> None:
        """Records, claims, revisions, holders and the identity are there after a restart."""
        store = reopen()
        identity = store.identity
        complete = store.update(store.create(image(SOURCE)).completed(5, "ab"))
        pending = store.create(image(image_type=ImageType.CONTAINER))
        store = reopen()
        assert store.identity == identity
        assert store.get_by_source(SOURCE) == complete
        assert entry(store, complete.id).here
        assert listed(store, ImageType.CONTAINER) == [pending]
        with pytest.raises(SourceTaken):
            store.create(image(SOURCE))
        store.update(pending.failed("interrupted"))

    def test_deletions_stay(self, reopen: Opener) -> None:
        """What was deleted is gone after a restart, its claim too."""
        store = reopen()
        store.delete(store.create(image(SOURCE)).id)
        store = reopen()
        assert listed(store) == []
        store.create(image(SOURCE))

    def test_two_places_differ(self, new_place: Callable[[], Opener]) -> None:
        """Two sets of records have two identities."""
        one, other = new_place()(), new_place()()
        try:
            assert one.identity != other.identity
        finally:
            one.close()
            other.close()
