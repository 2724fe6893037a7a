"""Metadata store type "memory": records in a dict. It keeps the protocol honest, and makes tests fast."""

from __future__ import annotations

import dataclasses
import heapq
import threading
import uuid
from collections.abc import Iterator, Sequence

from imgsvc.errors import Conflict, Invalid, NotFound, SourceTaken
from imgsvc.metadata.image import Image, ImageType
from imgsvc.metadata.store import Entry, Member
from imgsvc.metadata.unshared import Unshared

_PAGE = 1_000


class MemoryMetadataStore(Unshared):
    """Records that live as long as this object; a `MetadataStore`."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._identity = str(uuid.uuid4())
        self._lock = threading.Lock()
        self._images: dict[str, Image] = {}
        self._ids_by_source: dict[str, str] = {}

    @property
    def identity(self) -> str:
        return self._identity

    def list(self, image_type: ImageType | None = None) -> Iterator[Sequence[str]]:
        for page in self._pages():
            if documents := [entry.image.to_json() for entry in page if image_type in (None, entry.image.type)]:
                yield documents

    def survey(self) -> Iterator[Sequence[Entry]]:
        yield from self._pages()

    def get(self, image_id: str) -> Image:
        with self._lock:
            return self._find(image_id)

    def peek(self, image_id: str) -> str | None:
        image = self._images.get(image_id)
        return None if image is None else image.to_json()

    def get_by_source(self, source: str) -> Image:
        with self._lock:
            image_id = self._ids_by_source.get(source)
            if image_id is None:
                raise NotFound(f"there is no image from {source}")
            return self._images[image_id]

    def create(self, image: Image) -> Image:
        created = dataclasses.replace(image, revision=1)
        _check_text(image)
        with self._lock:
            stored = self._images.get(image.id)
            if stored is not None:
                if dataclasses.replace(stored, revision=1) == created:
                    return stored  # the same call, once more
                raise Conflict(f"the id {image.id} is in use")
            if image.source in self._ids_by_source:
                raise SourceTaken(self._images[self._ids_by_source[image.source]])
            if image.source:
                self._ids_by_source[image.source] = image.id
            self._images[image.id] = created
            return created

    def update(self, image: Image) -> Image:
        updated = dataclasses.replace(image, revision=image.revision + 1)
        _check_text(image)
        with self._lock:
            stored = self._find(image.id)
            if stored == updated:
                return updated  # the same call, once more
            if stored.revision != image.revision:
                raise Conflict(f"image {image.id} has changed since it was read")
            self._images[image.id] = updated
            return updated

    def delete(self, image_id: str) -> Image:
        with self._lock:
            image = self._find(image_id)
            del self._images[image_id]
            if self._ids_by_source.get(image.source) == image_id:
                del self._ids_by_source[image.source]
            return image

    def ping(self) -> None:
        """Memory is always there."""

    def close(self) -> None:
        """There is nothing to let go of."""

    def _pages(self) -> Iterator[Sequence[Entry]]:
        after = ""
        while page := self._page(after):
            yield page
            after = page[-1].image.id

    def _page(self, after: str) -> Sequence[Entry]:
        with self._lock:
            ids = heapq.nsmallest(_PAGE, (image_id for image_id in self._images if image_id > after))
            return [self._entry(self._images[image_id]) for image_id in ids]

    def _find(self, image_id: str) -> Image:
        image = self._images.get(image_id)
        if image is None:
            raise NotFound(f"there is no image {image_id}")
        return image


def _check_text(image: Image) -> None:
    """Every other store writes UTF-8."""
    try:
        image.to_json().encode()
    except UnicodeEncodeError as error:
        raise Invalid("the text of an image must be Unicode without lone surrogates") from error
