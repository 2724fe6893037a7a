"""What tests of image stores do with one."""

from __future__ import annotations

import itertools
import random
from contextlib import closing
from pathlib import Path

from imgsvc.images.store import ImageStore

BLOCK = 1024 * 1024


def content_of(image_id: str, size: int) -> bytes:
    """Bytes that follow from the id, so that whoever finds an image knows what it must hold."""
    return random.Random(image_id).randbytes(size)


def size_of(image_id: str) -> int:
    """A size between nothing and 2 MiB that follows from the id."""
    return random.Random(f"size of {image_id}").randrange(2 * BLOCK)


def put(store: ImageStore, image_id: str, content: bytes, block: int = BLOCK) -> None:
    """Stores the content in blocks, as a transfer does."""
    with closing(store.writer(image_id)) as writer:
        for offset in range(0, len(content), block):
            writer.write(content[offset : offset + block])
        writer.commit()


def content(store: ImageStore, image_id: str) -> bytes:
    """Reads the whole image in blocks, as a download does."""
    with closing(store.open(image_id)) as reader:
        offsets = itertools.takewhile(lambda offset: offset < reader.size, itertools.count(step=BLOCK))
        return b"".join(reader.read(offset, BLOCK) for offset in offsets)


def tree(directory: Path) -> set[str]:
    """Everything in the directory, hidden or not."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}
