"""What tests of metadata stores do with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

from imgsvc.errors import ImgsvcError
from imgsvc.metadata.image import Image, ImageType, new_id
from imgsvc.metadata.store import Entry, MetadataStore

_T = TypeVar("_T")

SOURCE = "http://source.example/image.gz"


def image(source: str = "", image_type: ImageType = ImageType.KVM, comment: str = "") -> Image:
    return Image(id=new_id(), type=image_type, source=source, comment=comment)


def listed(store: MetadataStore, image_type: ImageType | None = None) -> list[Image]:
    """The images of a list, which has their documents, while nobody writes."""
    documents = [document for page in store.list(image_type) for document in page]
    images = [store.get(Image.from_json(document).id) for document in documents]
    assert documents == [image.to_json() for image in images]
    return images


def entry(store: MetadataStore, image_id: str) -> Entry:
    return next(entry for page in store.survey() for entry in page if entry.image.id == image_id)


def at_once(calls: Sequence[Callable[[], _T]]) -> list[_T | ImgsvcError]:
    """What each call returned or raised; they begin together, each in a thread of its own."""
    start = Barrier(len(calls))

    def run(call: Callable[[], _T]) -> _T | ImgsvcError:
        start.wait()
        try:
            return call()
        except ImgsvcError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))
