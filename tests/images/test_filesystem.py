"""What the file system store does with its files, beyond what every image store promises."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from imgsvc.errors import ConfigError, Conflict, NoSpace, NotFound, Unavailable, Unreadable
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.store import ImageWriter
from imgsvc.metadata.image import new_id
from tests.images.conftest import RECORDS
from tests.images.helpers import BLOCK, content, content_of, put, tree


@pytest.fixture
def store(filesystem_store: FilesystemImageStore) -> FilesystemImageStore:
    return filesystem_store


def write_until_refused(writer: ImageWriter, block: bytes) -> None:
    with contextlib.suppress(Unavailable):
        while True:
            writer.write(block)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_layout(store: FilesystemImageStore, directory: Path, image_id: str) -> None:
    """Images are plain files named by their id, unfinished ones are in `.incoming`, and there is a marker."""
    with closing(store.writer(image_id)) as writer:
        writer.write(b"whole")
        assert tree(directory) == {".imgsvc", ".incoming", f".incoming/{image_id}"}
        writer.commit()
    assert tree(directory) == {".imgsvc", ".incoming", image_id}
    assert (directory / image_id).read_bytes() == b"whole"
    marker = {"member": store.member, "records": RECORDS, "home": store.home}
    assert json.loads((directory / ".imgsvc").read_text()) == marker
    assert store.place == str(directory)


def test_other_tools_may_read_images(directory: Path, image_id: str) -> None:
    """With the usual umask, directories and images are readable for everybody."""
    before = os.umask(0o022)
    try:
        with closing(FilesystemImageStore(directory)) as store:
            store.mark(RECORDS)
            put(store, image_id, b"whole")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (directory, directory / image_id)}
    assert modes == {directory: 0o755, directory / image_id: 0o644}


def test_directory_of_the_go_program(directory: Path, image_id: str) -> None:
    """A directory full of images and without a marker is taken as it is; what no id names is left alone."""
    directory.mkdir()
    (directory / image_id).write_bytes(b"from before")
    (directory / "notes.txt").write_text("mine")
    (directory / new_id()).mkdir()
    with closing(FilesystemImageStore(directory)) as store:
        assert store.fresh
        assert list(store.ids()) == [image_id]
        store.mark(RECORDS)
        assert content(store, image_id) == b"from before"
        assert list(store.ids()) == [image_id]
        store.delete(image_id)
    assert (directory / "notes.txt").read_text() == "mine"


def test_a_directory_is_no_image(store: FilesystemImageStore, directory: Path, image_id: str) -> None:
    """A directory that is named by an id is neither found nor overwritten."""
    (directory / image_id).mkdir()
    with pytest.raises(NotFound):
        store.size(image_id)
    with pytest.raises(NotFound):
        store.open(image_id)
    with pytest.raises(Conflict):
        store.writer(image_id)


def test_commit_does_not_overwrite(store: FilesystemImageStore, directory: Path, image_id: str) -> None:
    """A file that somebody put under the image's name meanwhile stays as it is."""
    with closing(store.writer(image_id)) as writer:
        writer.write(b"ours")
        (directory / image_id).write_bytes(b"theirs")
        with pytest.raises(Conflict):
            writer.commit()
        with pytest.raises(Unavailable):
            writer.commit()
    assert (directory / image_id).read_bytes() == b"theirs"


def test_commit_without_the_file(store: FilesystemImageStore, directory: Path, image_id: str) -> None:
    """When somebody removed the unfinished file, the commit says that it failed, and names no path."""
    with closing(store.writer(image_id)) as writer:
        writer.write(b"half")
        (directory / ".incoming" / image_id).unlink()
        with pytest.raises(Unavailable, match=image_id) as caught:
            writer.commit()
    assert str(directory) not in str(caught.value)
    assert list(store.ids()) == []


def test_order_of_a_commit(
    store: FilesystemImageStore, directory: Path, image_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim is on the disk before bytes come; the bytes are before they get their name; then the name is.

    Only this order survives a loss of power, which a killed process does not show: the kernel still writes what it
    has. So the calls are watched, and go on to the kernel.
    """
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().relative_to(directory)}")
        fsync(descriptor)

    def watched_rename(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        calls.append(f"rename {old} {new}")
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    writer = store.writer(image_id)
    assert calls == ["fsync .incoming"]
    calls.clear()
    writer.write(bytes(BLOCK))
    writer.write(bytes(BLOCK))
    writer.commit()
    assert calls == [f"fsync .incoming/{image_id}", f"rename .incoming/{image_id} {image_id}", "fsync ."]
    calls.clear()
    store.mark(RECORDS)
    assert calls == ["fsync .incoming/.imgsvc", "rename .incoming/.imgsvc .imgsvc", "fsync ."]
    calls.clear()
    store.quarantine(image_id)
    aside = f"rename {image_id} .quarantine/{image_id}"
    assert calls == ["fsync .", aside, "fsync .quarantine", "fsync ."]
    calls.clear()
    store.remember("scrub", "note")
    assert calls == ["fsync .incoming/.imgsvc-scrub", "rename .incoming/.imgsvc-scrub .imgsvc-scrub", "fsync ."]


@pytest.mark.parametrize("failing", ["file", "directory"])
def test_fsync_fails(
    store: FilesystemImageStore, directory: Path, image_id: str, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """An image of which the disk did not take everything, name included, is not there, and a second try does not
    make it so."""
    fsync = os.fsync

    def failing_fsync(descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if is_directory == (failing == "directory"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(directory))
        fsync(descriptor)

    writer = store.writer(image_id)
    writer.write(b"whole, but for the disk")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing_fsync)
        with pytest.raises(Unavailable, match=f"cannot write image {image_id}: Input/output error$"):
            writer.commit()
    with pytest.raises(Unavailable):
        writer.commit()
    assert list(store.ids()) == []
    writer.abort()
    assert list(store.unfinished()) == [image_id]
    assert (directory / ".incoming" / image_id).stat().st_size == 0


def test_quarantine_that_the_disk_does_not_take(
    store: FilesystemImageStore, directory: Path, image_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image whose move a loss of power could undo is where it was."""
    fsync = os.fsync
    put(store, image_id, b"damaged")

    def failing_fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == ".quarantine":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(directory))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing_fsync)
        with pytest.raises(Unreadable, match=f"cannot set image {image_id} aside: Input/output error$"):
            store.quarantine(image_id)
    assert (content(store, image_id), list(store.quarantined())) == (b"damaged", [])


def test_names_in_quarantine(store: FilesystemImageStore, directory: Path, image_id: str) -> None:
    """The first has the image's name, the ones that follow have numbers; what else lies there is a person's."""
    for number in range(3):
        put(store, image_id, str(number).encode())
        store.quarantine(image_id)
    aside = directory / ".quarantine"
    found = {path.name: path.read_text() for path in aside.iterdir()}
    assert found == {image_id: "0", f"{image_id}.2": "1", f"{image_id}.3": "2"}
    for name in ("notes", f"{image_id}.sha256", f"{new_id()}."):
        (aside / name).touch()
    assert list(store.quarantined()) == [image_id] * 3


def test_file_size_limit(store: FilesystemImageStore, image_id: str) -> None:
    """A limit on the size of one file is lack of space."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(store.writer(image_id)) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK, before[1]))
        try:
            writer.write(bytes(BLOCK))
            with pytest.raises(NoSpace):
                writer.write(b"one more")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_short_steps(store: FilesystemImageStore, image_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may take and give less than it was asked to; nothing is lost by it."""
    write, pread = os.write, os.pread
    monkeypatch.setattr(os, "write", lambda descriptor, block: write(descriptor, block[:7_001]))
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: pread(descriptor, min(length, 9_001), offset))
    expected = content_of(image_id, BLOCK)
    with closing(store.writer(image_id)) as writer:
        writer.write(memoryview(expected).cast("I"))
        writer.commit()
    assert content(store, image_id) == expected


def test_image_that_shrinks(store: FilesystemImageStore, directory: Path, image_id: str) -> None:
    """A read never gives fewer bytes than the image has: when its file was cut, it fails."""
    put(store, image_id, bytes(BLOCK))
    with closing(store.open(image_id)) as reader:
        os.truncate(directory / image_id, 1_000)
        assert reader.read(0, 1_000) == bytes(1_000)
        with pytest.raises(Unavailable):
            reader.read(0, BLOCK)


def test_giving_up_during_a_write(store: FilesystemImageStore) -> None:
    """An abort while another thread still writes sends none of those bytes into the image that is begun next."""
    for _ in range(150):
        kept = new_id()
        writer = store.writer(new_id())
        thread = threading.Thread(target=write_until_refused, args=(writer, b"given up" * 64), daemon=True)
        thread.start()
        writer.write(b"begun")
        writer.abort()
        put(store, kept, b"kept")
        thread.join()
        assert content(store, kept) == b"kept"


def test_no_descriptor_is_leaked(store: FilesystemImageStore, directory: Path) -> None:
    """However an image ends, whole, aborted, closed, refused or failed, nothing of it stays open."""
    before = open_descriptors()
    for _ in range(250):
        kept, dropped = new_id(), new_id()
        put(store, kept, b"kept")
        with closing(store.open(kept)) as reader:
            reader.read(0, 4)
        with pytest.raises(Conflict):
            store.writer(kept)
        next(store.ids())
        store.delete(kept)
        with pytest.raises(NotFound):
            store.open(kept)
        aborted = store.writer(dropped)
        aborted.write(b"dropped")
        aborted.abort()
        store.writer(dropped).close()
        failed = store.writer(dropped)
        (directory / ".incoming" / dropped).unlink()
        with pytest.raises(Unavailable):
            failed.commit()
        failed.abort()
        store.ping()
    (directory / kept).mkdir()
    with pytest.raises(NotFound):
        store.open(kept)
    with pytest.raises(ConfigError):
        FilesystemImageStore(directory)
    assert open_descriptors() == before


def test_ping_leaves_nothing(store: FilesystemImageStore, directory: Path) -> None:
    """Pings at the same moment do not disturb each other, and write nothing that stays."""
    before = tree(directory)
    with ThreadPoolExecutor(4) as pool:
        for ping in [pool.submit(store.ping) for _ in range(100)]:
            ping.result()
    assert tree(directory) == before


def test_ping_misses_the_marker(store: FilesystemImageStore, directory: Path) -> None:
    """A marker that is gone, damaged or another member's makes the store unavailable, until it is back."""
    marker = directory / ".imgsvc"
    text = marker.read_text()
    marker.unlink()
    with pytest.raises(Unavailable):
        store.ping()
    for wrong in ("", text.replace(store.member, new_id()), text.replace(RECORDS, "others")):
        marker.write_text(wrong)
        with pytest.raises(Unavailable) as caught:
            store.ping()
        assert str(directory) not in str(caught.value)
    marker.write_text(text)
    store.ping()


def test_ping_misses_incoming(store: FilesystemImageStore, directory: Path) -> None:
    """Without `.incoming` no image can be written; when it is back, it can."""
    (directory / ".incoming").rmdir()
    with pytest.raises(Unavailable):
        store.ping()
    with pytest.raises(Unavailable):
        store.claim(new_id())
    (directory / ".incoming").mkdir()
    store.ping()
    store.claim(new_id())


def test_another_directory_in_its_place(store: FilesystemImageStore, directory: Path, image_id: str) -> None:
    """When the path leads elsewhere, the store says so, and no byte gets there."""
    moved = directory.rename(directory.with_name("moved"))
    with pytest.raises(Unavailable):
        store.ping()
    directory.mkdir()
    with pytest.raises(Unavailable):
        store.ping()
    put(store, image_id, b"whole")
    assert tree(directory) == set()
    assert (moved / image_id).read_bytes() == b"whole"


def test_notes_after_a_crash(tmp_path: Path) -> None:
    """A note that was cut spoils no other; notes without their image go at the next opening."""
    image_id, gone = new_id(), new_id()
    with closing(FilesystemImageStore(tmp_path / "images")) as store:
        store.mark("records")
        with closing(store.writer(image_id)) as writer:
            writer.note("whole")
    incoming = tmp_path / "images" / ".incoming"
    with (incoming / f"{image_id}.notes").open("a") as notes:
        notes.write("cu")
    (incoming / f"{gone}.notes").write_text("of nothing\n")
    with closing(FilesystemImageStore(tmp_path / "images")) as store:
        assert list(store.unfinished()) == [image_id]
        with closing(store.writer(image_id, keep=True)) as writer:
            assert list(writer.notes()) == ["whole"]
            writer.note("the next")
            assert list(writer.notes()) == ["whole", "cu", "the next"]
    assert not (incoming / f"{gone}.notes").exists()
