"""Writing around the page cache: the same bytes, wherever the file system lets us do it and wherever it does not."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from imgsvc.images.direct import DirectWrites

PAGE = 4096


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """On a disk, and on a file system that has no disk to write to directly, or may have none."""
    if request.param == "disk":
        yield tmp_path
    else:
        with TemporaryDirectory(dir="/dev/shm") as shared:
            yield Path(shared)


@pytest.fixture
def descriptor(directory: Path) -> Iterator[int]:
    opened = os.open(directory / "image", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def aligned(content: bytes, skew: int = 0) -> memoryview:
    """The content in memory that begins at a page, or so many bytes behind its beginning."""
    buffer = memoryview(mmap.mmap(-1, len(content) + skew))
    buffer[skew:] = content
    return buffer[skew:]


@pytest.mark.parametrize("skew", [0, 1, 512])
@pytest.mark.parametrize("seed", range(3))
def test_the_bytes(descriptor: int, seed: int, skew: int) -> None:
    """Blocks that are aligned and blocks that are not, in any order, are all where they belong."""
    chance = random.Random(seed)
    direct, written = DirectWrites(descriptor), b""
    for _ in range(20):
        block = chance.randbytes(chance.choice([1, PAGE - 1, PAGE, 3 * PAGE, 64 * PAGE, PAGE - len(written) % PAGE]))
        direct.write(aligned(block, skew), len(written))
        written += block
    direct.stop()
    assert os.pread(descriptor, len(written) + 1, 0) == written


def test_around_the_page_cache(tmp_path: Path) -> None:
    """Where the file system can, what is aligned goes directly, and nothing else does."""
    descriptor = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
        except OSError:
            pytest.skip("the file system of temporary files has no O_DIRECT")
        fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
        direct = DirectWrites(descriptor)
        seen = []
        for size in (PAGE, 1, PAGE - 1, 2 * PAGE):
            direct.write(aligned(bytes(size)), os.fstat(descriptor).st_size)
            seen.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        assert seen == [True, False, False, True]
    finally:
        os.close(descriptor)
