"""What every metadata store lists, by pages, whatever is written meanwhile."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from imgsvc.metadata.image import Image, ImageType
from imgsvc.metadata.store import MetadataStore
from tests.metadata.helpers import SOURCE, image, listed


class TestListing:
    def test_empty(self, store: MetadataStore) -> None:
        """Without images there is no page."""
        assert list(store.list()) == []
        assert list(store.survey()) == []
        assert list(store.held()) == []

    def test_held(self, store: MetadataStore) -> None:
        """Those that are complete, in order, and no others."""
        store.create(image())
        store.update(store.create(image()).failed("gone"))
        complete = [store.update(store.create(image()).completed(5, "ab")) for _ in range(3)]
        store.delete(complete.pop().id)
        assert [each for page in store.held() for each in page] == sorted(image.id for image in complete)

    def test_pages(self, store: MetadataStore) -> None:
        """2,500 images come in three pages, ordered by id, and so do they with their surroundings."""
        with ThreadPoolExecutor(8) as pool:
            created = sorted(pool.map(store.create, [image() for _ in range(2_500)]), key=lambda image: image.id)
        pages = list(store.list())
        assert [len(page) for page in pages] == [1_000, 1_000, 500]
        assert [document for page in pages for document in page] == [image.to_json() for image in created]
        assert [entry.image for page in store.survey() for entry in page] == created

    def test_type(self, store: MetadataStore) -> None:
        """A type lists its own images; both together are all."""
        kvm = [store.create(image()) for _ in range(3)]
        container = [store.create(image(image_type=ImageType.CONTAINER)) for _ in range(2)]
        assert listed(store, ImageType.KVM) == sorted(kvm, key=lambda image: image.id)
        assert listed(store, ImageType.CONTAINER) == sorted(container, key=lambda image: image.id)
        assert len(listed(store)) == 5

    def test_changes_between_pages(self, store: MetadataStore) -> None:
        """What exists throughout is listed exactly once, whatever comes and goes between the pages."""
        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(store.create, [image() for _ in range(2_200)]))
        doomed, kept = created[:400], {image.id for image in created[400:]}
        seen: list[str] = []
        for page in store.list():
            seen += [Image.from_json(document).id for document in page]
            for _ in range(100):
                store.delete(doomed.pop().id)
                store.create(image())
        assert len(seen) == len(set(seen))
        assert kept <= set(seen)

    def test_writes_while_a_list_waits(self, store: MetadataStore) -> None:
        """A list that nobody reads on holds up no writer."""
        for _ in range(3):
            store.create(image())
        waiting = [iter(store.list()) for _ in range(20)]
        for pages in waiting:
            next(pages)
        created = store.create(image(SOURCE))
        assert store.delete(created.id) == created
