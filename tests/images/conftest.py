"""Every image store, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.memory import MemoryImageStore
from imgsvc.images.store import ImageStore
from imgsvc.metadata.image import new_id

RECORDS = "the records of this test"

IMAGE_STORES: dict[type, Callable[[Path], ImageStore]] = {
    FilesystemImageStore: FilesystemImageStore,
    MemoryImageStore: lambda directory: MemoryImageStore(),
}


@pytest.fixture(params=IMAGE_STORES, ids=lambda kind: kind.__name__)
def fresh_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ImageStore]:
    """An image store that has not been marked."""
    store = IMAGE_STORES[request.param](tmp_path / "images")
    yield store
    store.close()


@pytest.fixture
def store(fresh_store: ImageStore) -> ImageStore:
    fresh_store.mark(RECORDS)
    return fresh_store


@pytest.fixture
def image_id() -> str:
    return new_id()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the file system store is: named so that a message which leaks it can be told."""
    return tmp_path / "images-directory"


@pytest.fixture
def filesystem_store(directory: Path) -> Iterator[FilesystemImageStore]:
    store = FilesystemImageStore(directory)
    store.mark(RECORDS)
    yield store
    store.close()
