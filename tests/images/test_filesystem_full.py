"""The file system store on real file systems that are full, read-only, divided or not mounted."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from imgsvc.errors import ConfigError, NoSpace, Unavailable
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.store import ImageWriter
from imgsvc.metadata.image import new_id
from tests.images.conftest import RECORDS
from tests.images.helpers import BLOCK, content, content_of, put
from tests.mounts import Mount
from tests.zfs import ZfsPool

QUOTA = 32 * BLOCK


@pytest.fixture
def small_store(tmpfs: Path) -> Iterator[FilesystemImageStore]:
    """A store on a tmpfs of 8 MiB."""
    store = FilesystemImageStore(tmpfs)
    store.mark(RECORDS)
    yield store
    store.close()


@pytest.fixture
def dataset(zfs_pool: ZfsPool) -> Iterator[Path]:
    """A ZFS dataset with a quota."""
    yield zfs_pool.create("images", quota=str(QUOTA))
    zfs_pool.destroy("images")


def fill(store: FilesystemImageStore, image_id: str) -> int:
    """Writes the image until there is no space, sees to it that it cannot be committed, and returns how many blocks
    were taken."""
    blocks = 0

    def write_on(writer: ImageWriter) -> None:
        nonlocal blocks
        while True:
            writer.write(os.urandom(BLOCK))
            blocks += 1

    with closing(store.writer(image_id)) as writer:
        with pytest.raises(NoSpace) as caught:
            write_on(writer)
        assert store.place not in str(caught.value)
        with pytest.raises(Unavailable):
            writer.commit()
        writer.abort()
    return blocks


def make_files(directory: Path, number: int) -> None:
    for name in range(number):
        (directory / f"{name}").touch()


def test_disk_full_in_the_middle_of_a_note(small_store: FilesystemImageStore, tmpfs: Path) -> None:
    """The next one that is noted is there as it was given."""
    line, filler = "x" * 1000, tmpfs / "of others"

    def until_full(write: Callable[[], object]) -> None:
        for _ in range(10_000):
            write()

    with closing(small_store.writer(new_id())) as writer:
        writer.note(line)
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
            until_full(lambda: file.write(bytes(BLOCK)))
        with pytest.raises(NoSpace):
            until_full(lambda: writer.note(line))
        filler.unlink()
        before = list(writer.notes())
        assert set(before) == {line}
        writer.note("the next")
        *others, cut, last = writer.notes()
        assert (others, last) == (before, "the next")
        assert 0 < len(cut) < len(line)


def test_disk_full(small_store: FilesystemImageStore) -> None:
    """A full disk says so; abort gives the space back, though the claim stays; other images are unharmed."""
    kept, lost, later = new_id(), new_id(), new_id()
    put(small_store, kept, content_of(kept, 2 * BLOCK))
    before = small_store.space()
    assert before.total == 8 * BLOCK
    assert fill(small_store, lost) >= 4
    assert small_store.space() == before
    assert list(small_store.unfinished()) == [lost]
    small_store.unclaim(lost)
    assert content(small_store, kept) == content_of(kept, 2 * BLOCK)
    put(small_store, later, content_of(later, 4 * BLOCK))
    assert content(small_store, later) == content_of(later, 4 * BLOCK)


def test_what_a_full_disk_still_does(small_store: FilesystemImageStore, tmpfs: Path) -> None:
    """With not a byte free, the store opens, answers pings, reads and deletes."""
    kept, last = new_id(), new_id()
    put(small_store, kept, b"kept")
    with pytest.raises(OSError, match="No space"):
        (tmpfs / "of another program").write_bytes(bytes(8 * BLOCK))
    assert small_store.space().free == 0
    small_store.ping()
    small_store.close()
    with closing(FilesystemImageStore(tmpfs)) as store:
        assert content(store, kept) == b"kept"
        store.delete(kept)
        put(store, last, b"in its place")
        store.delete(last)
        assert list(store.ids()) == []


def test_no_file_can_be_made(tmp_path: Path, mount: Mount) -> None:
    """A disk without room for one more file takes no image, which says so; all else goes on, a start included."""
    mount("-t", "tmpfs", "-o", "nr_inodes=16", "imgsvc-test", tmp_path)
    kept = new_id()
    with closing(FilesystemImageStore(tmp_path)) as store:
        store.mark(RECORDS)
        put(store, kept, b"kept")
        with pytest.raises(OSError, match="No space"):
            make_files(tmp_path, 16)
        store.ping()
    with closing(FilesystemImageStore(tmp_path)) as store:
        for call in (store.claim, store.writer):
            with pytest.raises(NoSpace):
                call(new_id())
        assert content(store, kept) == b"kept"
        store.delete(kept)
        put(store, kept, b"again")


def test_read_only_disk(small_store: FilesystemImageStore, tmpfs: Path, mount: Mount, image_id: str) -> None:
    """A disk that turned read-only makes writing unavailable, and reading goes on; a start on it is refused."""
    put(small_store, image_id, b"whole")
    mount("-o", "remount,ro", tmpfs)
    for call in (
        small_store.ping,
        lambda: small_store.claim(new_id()),
        lambda: small_store.writer(new_id()),
        lambda: small_store.delete(image_id),
    ):
        with pytest.raises(Unavailable):
            call()
    assert content(small_store, image_id) == b"whole"
    small_store.close()
    with pytest.raises(ConfigError, match=f"{tmpfs} .*Read-only"):
        FilesystemImageStore(tmpfs)
    mount("-o", "remount,rw", tmpfs)
    FilesystemImageStore(tmpfs).close()


def test_fresh_read_only_disk(tmpfs: Path, mount: Mount) -> None:
    """Where there is no marker yet, it is `mark` that finds the disk read-only."""
    mount("-o", "remount,ro", tmpfs)
    with (
        closing(FilesystemImageStore(tmpfs)) as store,
        pytest.raises(ConfigError, match=f"{tmpfs} .*Read-only"),
    ):
        store.mark(RECORDS)


@pytest.mark.parametrize("kind", ["other disk", "same disk"])
def test_incoming_on_another_mount(tmp_path: Path, mount: Mount, kind: str) -> None:
    """Images could not be renamed out of it, so the start is refused: even of the same disk, which has one number."""
    directory = tmp_path / "images"
    with closing(FilesystemImageStore(directory)) as store:
        store.mark(RECORDS)
    incoming = directory / ".incoming"
    if kind == "other disk":
        mount("-t", "tmpfs", "imgsvc-test", incoming)
    else:
        mount("--bind", incoming, incoming)
    with pytest.raises(ConfigError, match=f"{directory} .*cross-device"):
        FilesystemImageStore(directory)
    subprocess.run(["umount", incoming], check=True)
    FilesystemImageStore(directory).close()


def test_not_mounted(tmp_path: Path, mount: Mount) -> None:
    """An unmounted disk leaves a directory without a marker: the store is fresh, and writes nothing into it."""
    directory = tmp_path / "images"
    directory.mkdir()
    mount("-t", "tmpfs", "imgsvc-test", directory)
    with closing(FilesystemImageStore(directory)) as store:
        store.mark(RECORDS)
        put(store, new_id(), b"whole")
    subprocess.run(["umount", directory], check=True)
    with closing(FilesystemImageStore(directory)) as store:
        assert store.fresh
        assert list(store.ids()) == []
    assert list(directory.iterdir()) == []


def test_mounted_over(tmp_path: Path, mount: Mount, image_id: str) -> None:
    """A disk mounted over the directory of a running store gets none of its bytes, and ping notices it."""
    directory = tmp_path / "images"
    with closing(FilesystemImageStore(directory)) as store:
        store.mark(RECORDS)
        mount("-t", "tmpfs", "imgsvc-test", directory)
        with pytest.raises(Unavailable):
            store.ping()
        put(store, image_id, b"whole")
        assert list(directory.iterdir()) == []
        subprocess.run(["umount", directory], check=True)
        store.ping()
    assert (directory / image_id).read_bytes() == b"whole"


def test_unmounted_by_force(tmpfs: Path, small_store: FilesystemImageStore, image_id: str) -> None:
    """When the disk is taken from under the running store, ping notices, and nothing is written beneath it."""
    subprocess.run(["umount", "--lazy", tmpfs], check=True)
    with pytest.raises(Unavailable):
        small_store.ping()
    put(small_store, image_id, b"whole")
    assert content(small_store, image_id) == b"whole"
    assert list(tmpfs.iterdir()) == []


def test_zfs_quota(zfs_pool: ZfsPool, dataset: Path) -> None:
    """A full quota is lack of space; the quota shows as the space; deletion works, and what was dropped is free."""
    kept, lost, later = new_id(), new_id(), new_id()
    with closing(FilesystemImageStore(dataset)) as store:
        store.mark(RECORDS)
        put(store, kept, content_of(kept, 4 * BLOCK))
        assert store.space().total <= QUOTA
        assert fill(store, lost) >= 24
        assert store.space().free < BLOCK
        store.ping()
        store.unclaim(lost)
        wait_for_space(zfs_pool, store, 20 * BLOCK)
        put(store, later, content_of(later, 20 * BLOCK))
        assert content(store, kept) == content_of(kept, 4 * BLOCK)
        assert fill(store, lost) < 20
        store.delete(later)
        wait_for_space(zfs_pool, store, 20 * BLOCK)
        assert list(store.ids()) == [kept]


def test_restart_on_zfs(zfs_pool: ZfsPool, dataset: Path, image_id: str) -> None:
    """On ZFS the lock keeps a second service out, and the next start finds everything, a remount between included."""
    whole = content_of(image_id, 3 * BLOCK + 1)
    claimed = new_id()
    with closing(FilesystemImageStore(dataset)) as first:
        first.mark(RECORDS)
        put(first, image_id, whole)
        first.claim(claimed)
        with pytest.raises(ConfigError, match="in use"):
            FilesystemImageStore(dataset)
    zfs_pool.unmount("images")
    with closing(FilesystemImageStore(dataset)) as unmounted:
        assert unmounted.fresh
        assert list(dataset.iterdir()) == []
    zfs_pool.mount("images")
    with closing(FilesystemImageStore(dataset)) as second:
        assert (second.fresh, second.member, second.marked_for) == (False, first.member, RECORDS)
        assert list(second.ids()) == [image_id]
        assert list(second.unfinished()) == [claimed]
        assert content(second, image_id) == whole


def wait_for_space(pool: ZfsPool, store: FilesystemImageStore, free: int) -> None:
    deadline = time.monotonic() + 60
    while store.space().free < free:
        assert time.monotonic() < deadline
        pool.settle()
        time.sleep(0.1)
