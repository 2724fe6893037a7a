"""What the file system store does on the disk, beyond what every image store promises."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from imgsvc.errors import ConfigError, Conflict, NoSpace, NotFound, Unavailable
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.store import ImageWriter
from imgsvc.metadata.image import new_id
from tests.images.conftest import RECORDS
from tests.images.helpers import BLOCK, content, content_of, put


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the store is: named so that a message which leaks it can be told."""
    return tmp_path / "images-directory"


@pytest.fixture
def store(directory: Path) -> Iterator[FilesystemImageStore]:
    store = FilesystemImageStore(directory)
    store.mark(RECORDS)
    yield store
    store.close()


def tree(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


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
    assert json.loads((directory / ".imgsvc").read_text()) == {"member": store.member, "records": RECORDS}
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


def test_nothing_is_written_before_mark(directory: Path) -> None:
    """In a directory without a marker nothing changes, for it may be where a dataset is not mounted."""
    directory.mkdir()
    before = directory.stat()
    with closing(FilesystemImageStore(directory)) as store:
        assert store.fresh
        assert list(store.ids()) == []
        assert list(store.unfinished()) == []
        store.space()
        assert tree(directory) == set()
        assert directory.stat().st_mtime_ns == before.st_mtime_ns
        assert directory.stat().st_ctime_ns == before.st_ctime_ns


def test_the_marker_outlives_the_process(directory: Path) -> None:
    """The member's id and the identity of its records are found again."""
    with closing(FilesystemImageStore(directory)) as first:
        first.mark(RECORDS)
    with closing(FilesystemImageStore(directory)) as second:
        assert (second.fresh, second.member, second.marked_for) == (False, first.member, RECORDS)
        second.mark("other records")
    with closing(FilesystemImageStore(directory)) as third:
        assert (third.fresh, third.member, third.marked_for) == (False, first.member, "other records")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"{",
        b"[]",
        b"{}",
        b'{"member": "not an id", "records": "r"}',
        b'{"member": 1, "records": "r"}',
        b'{"member": "0b53a0a6-6c41-4f43-9d2c-6c0d2b2f9a11"}',
        b'{"member": "0b53a0a6-6c41-4f43-9d2c-6c0d2b2f9a11", "records": null}',
    ],
)
def test_damaged_marker(directory: Path, text: bytes) -> None:
    """A marker that cannot be understood stops the start, names the file, and stays as it is for a person to see."""
    directory.mkdir()
    marker = directory / ".imgsvc"
    marker.write_bytes(text)
    with pytest.raises(ConfigError, match=str(marker)):
        FilesystemImageStore(directory)
    assert marker.read_bytes() == text
    marker.unlink()
    FilesystemImageStore(directory).close()


def test_missing_parent(tmp_path: Path) -> None:
    """The directory is made, but not its parent, which is named."""
    with pytest.raises(ConfigError, match=f"there is no {tmp_path}/absent$"):
        FilesystemImageStore(tmp_path / "absent" / "images")
    assert list(tmp_path.iterdir()) == []


def test_not_a_directory(directory: Path) -> None:
    """A file in the directory's place stops the start."""
    directory.write_text("a file")
    with pytest.raises(ConfigError, match=f"{directory} .*Not a directory"):
        FilesystemImageStore(directory)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; test_filesystem_full.py has a read-only disk")
def test_directory_that_may_not_be_written(directory: Path) -> None:
    """No permission stops the start where there is a marker, and `mark` where there is none."""
    directory.mkdir()
    directory.chmod(0o555)
    with (
        closing(FilesystemImageStore(directory)) as fresh,
        pytest.raises(ConfigError, match=f"{directory} .*Permission denied"),
    ):
        fresh.mark(RECORDS)
    directory.chmod(0o755)
    with closing(FilesystemImageStore(directory)) as store:
        store.mark(RECORDS)
    (directory / ".incoming").chmod(0o555)
    with pytest.raises(ConfigError, match=f"{directory} .*Permission denied"):
        FilesystemImageStore(directory)


def test_incoming_is_made_again(store: FilesystemImageStore, directory: Path, image_id: str) -> None:
    """A restored directory may lack the empty `.incoming`."""
    store.close()
    (directory / ".incoming").rmdir()
    with closing(FilesystemImageStore(directory)) as again:
        put(again, image_id, b"whole")


def test_one_service_to_a_directory(store: FilesystemImageStore, directory: Path) -> None:
    """A second store on the directory is refused, in this process and in another, until the first is closed."""
    script = (
        "import sys, pathlib; from imgsvc.images.filesystem import *; FilesystemImageStore(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(directory)]
    with pytest.raises(ConfigError, match=f"{directory} is in use"):
        FilesystemImageStore(directory)
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"ConfigError: image directory {directory} is in use" in refused.stderr
    store.close()
    assert subprocess.run(command, check=False).returncode == 0
    FilesystemImageStore(directory).close()


def test_a_killed_process_leaves_no_lock(directory: Path) -> None:
    """After kill -9 the next start needs no help."""
    script = """if True:
        import pathlib, sys, time
        from imgsvc.images.filesystem import FilesystemImageStore
        store = FilesystemImageStore(pathlib.Path(sys.argv[1]))
        print("open", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", script, str(directory)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError):
            FilesystemImageStore(directory)
        process.send_signal(signal.SIGKILL)
    FilesystemImageStore(directory).close()


def test_children_inherit_nothing(store: FilesystemImageStore, directory: Path, image_id: str) -> None:
    """A child that outlives the service holds neither the lock nor an image."""
    put(store, image_id, b"whole")
    reader, writer = store.open(image_id), store.writer(new_id())
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        try:
            held = {link.readlink() for link in Path(f"/proc/{child.pid}/fd").iterdir()}
            assert not {path for path in held if path.is_relative_to(directory)}
            reader.close()
            writer.close()
            store.close()
            FilesystemImageStore(directory).close()
        finally:
            child.kill()


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
