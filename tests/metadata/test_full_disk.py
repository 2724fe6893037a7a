"""The SQLite metadata store on real disks that are small and completely full: a tmpfs, and a ZFS quota."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgsvc.errors import NoSpace, NotFound
from imgsvc.metadata.ballast import BALLAST_SIZE
from imgsvc.metadata.image import Image, ImageType, new_id
from imgsvc.metadata.sqlite import SqliteMetadataStore
from tests.metadata.conftest import MEMBER
from tests.zfs import ZfsPool


@pytest.fixture
def filename(tmpfs: Path) -> Path:
    return tmpfs / "imgsvc.db"


@pytest.fixture
def store(filename: Path) -> Iterator[SqliteMetadataStore]:
    with contextlib.closing(SqliteMetadataStore(filename, MEMBER)) as store:
        yield store


@pytest.fixture
def ballast(filename: Path) -> Path:
    return filename.with_name(filename.name + ".ballast")


def fill(directory: Path) -> None:
    """Leaves not one block free."""
    with (directory / "filler").open("ab", buffering=0) as filler, pytest.raises(OSError) as full:
        for_ever(lambda: filler.write(os.urandom(4096)))
    assert full.value.errno in (errno.ENOSPC, errno.EDQUOT)


def for_ever(call: Callable[[], object]) -> None:
    """Until it raises."""
    while True:
        call()


def image() -> Image:
    image_id = new_id()
    # As long as real ones are: a few of them fill a page.
    return Image(id=image_id, type=ImageType.KVM, source=f"http://source.example/{image_id}", comment="x" * 500)


def test_new_records_find_no_space(store: SqliteMetadataStore, tmpfs: Path, ballast: Path) -> None:
    """A create and a transfer's progress raise NoSpace, change nothing, and leave the ballast to others."""
    current = store.update(store.create(image()).started(5))
    use_up_the_log(store, tmpfs)
    with pytest.raises(NoSpace) as full:
        store.create(image())
    assert str(tmpfs) not in str(full.value)
    with pytest.raises(NoSpace):
        store.update(current.progressed(1))
    assert store.get(current.id) == current
    assert ballast.stat().st_size == BALLAST_SIZE


def use_up_the_log(store: SqliteMetadataStore, tmpfs: Path) -> None:
    """Fills the disk, and what the log has allocated before: until a small write finds no space."""
    fill(tmpfs)
    with pytest.raises(NoSpace):
        for_ever(lambda: store.create(Image(id=new_id(), type=ImageType.KVM)))


def test_everything_can_be_finished_and_deleted(store: SqliteMetadataStore, tmpfs: Path) -> None:
    """Each of 300 records can be failed, and then deleted, while nothing is free but what the ballast gave."""
    images = [store.create(image()) for _ in range(300)]
    fill(tmpfs)
    for each in images:
        failed = store.update(each.failed("no space left on the disk, " + "and so on " * 20))
        assert store.get(each.id) == failed
    for each in images:
        store.delete(each.id)
        with pytest.raises(NotFound):
            store.get(each.id)


def test_an_interrupted_fetch_can_wait_again(store: SqliteMetadataStore, tmpfs: Path) -> None:
    """A start puts what was being fetched back into the queue, and must get through that on a full disk."""
    current = store.update(store.create(image()).started(5))
    use_up_the_log(store, tmpfs)
    store.update(current.requeued())


def test_room_is_taken_again(store: SqliteMetadataStore, tmpfs: Path, ballast: Path) -> None:
    """The ballast goes when it is needed, and is back with the first write after there is space again."""
    images = [store.create(image()) for _ in range(50)]
    fill(tmpfs)
    for each in images[:-1]:
        store.delete(each.id)
    assert not ballast.exists()
    (tmpfs / "filler").unlink()
    store.delete(images[-1].id)
    assert ballast.stat().st_size == BALLAST_SIZE


def test_room_that_somebody_else_took(store: SqliteMetadataStore, tmpfs: Path, ballast: Path) -> None:
    """When even the ballast's room is gone, a delete raises NoSpace and loses nothing, and it works again later."""
    created = store.create(image())
    ballast.unlink()
    use_up_the_log(store, tmpfs)
    with pytest.raises(NoSpace):
        store.delete(created.id)
    assert store.get(created.id) == created
    store.ping()
    (tmpfs / "filler").unlink()
    store.delete(created.id)
    assert ballast.exists()


def test_start_on_a_full_disk(filename: Path, tmpfs: Path) -> None:
    """A service that is started while its disk is full comes up, and images can be deleted."""
    with contextlib.closing(SqliteMetadataStore(filename, MEMBER)) as store:
        created = store.create(image())
    fill(tmpfs)
    with contextlib.closing(SqliteMetadataStore(filename, MEMBER)) as store:
        assert store.delete(created.id) == created


def test_ballast_cut_short_is_made_whole(filename: Path, ballast: Path) -> None:
    """A ballast that a crash left half written counts for nothing, and is written anew."""
    ballast.write_bytes(b"half")
    SqliteMetadataStore(filename, MEMBER).close()
    assert ballast.stat().st_size == BALLAST_SIZE
    assert len(set(ballast.read_bytes())) == 256  # all zeros would take no space where files are compressed


def test_zfs_quota(zfs_pool: ZfsPool) -> None:
    """Under a full quota on ZFS, which compresses and never writes in place, records are finished and deleted too."""
    directory = zfs_pool.create("records", quota="12M", compression="on")
    with contextlib.closing(SqliteMetadataStore(directory / "imgsvc.db", MEMBER)) as store:
        images = [store.create(image()) for _ in range(100)]
        fill(directory)
        with pytest.raises(NoSpace):
            for_ever(lambda: store.create(image()))
        for each in images:
            store.update(each.failed("no space left on the disk"))
            store.delete(each.id)
    zfs_pool.destroy("records")
