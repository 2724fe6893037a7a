"""What the file system store does with its directory when it is opened: the marker, the lock, what stops a start."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from imgsvc.errors import ConfigError
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.store import Topic
from imgsvc.metadata.image import new_id
from tests.images.conftest import RECORDS
from tests.images.helpers import put, tree


@pytest.fixture
def store(filesystem_store: FilesystemImageStore) -> FilesystemImageStore:
    return filesystem_store


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
        pytest.param(b"[" * 5_000, id="lists"),
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


def test_a_copy_remembers_nothing(store: FilesystemImageStore, directory: Path, tmp_path: Path) -> None:
    """What was noted of a directory is not so of a copy without its marker, now or later: neither of it is the other."""
    topics: tuple[Topic, ...] = ("scrub", "records")
    for topic in topics:
        store.remember(topic, "of the first")
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / ".imgsvc").unlink()
    with closing(FilesystemImageStore(copy)) as second:
        assert [second.remembered(topic) for topic in topics] == ["", ""]
        second.mark(RECORDS)
    with closing(FilesystemImageStore(copy)) as second:
        assert [second.remembered(topic) for topic in topics] == ["", ""]
        second.remember("records", "of the copy")
        second.mark("other records")
        second.rename("another")
        assert second.remembered("records") == "of the copy"
    assert [store.remembered(topic) for topic in topics] == ["of the first"] * 2


def test_a_copy_that_cannot_be_marked(store: FilesystemImageStore, directory: Path) -> None:
    """It has forgotten by the time when it may get a marker: there is no moment with both."""
    store.remember("records", "of the first")
    store.close()
    (directory / ".imgsvc").unlink()
    (directory / ".incoming" / ".imgsvc").mkdir()
    with closing(FilesystemImageStore(directory)) as copy, pytest.raises(ConfigError):
        copy.mark(RECORDS)
    assert not (directory / ".imgsvc-records").exists()


def test_one_service_to_a_directory(store: FilesystemImageStore, directory: Path) -> None:
    """A second store on the directory is refused, in this process and in another, until the first is closed."""
    script = """if True:
        import pathlib, sys
        from imgsvc.images.filesystem import FilesystemImageStore
        FilesystemImageStore(pathlib.Path(sys.argv[1]))
    """
    command = [sys.executable, "-c", script, str(directory)]
    with pytest.raises(ConfigError, match=f"{directory} is in use"):
        FilesystemImageStore(directory)
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"ConfigError: image directory {directory} is in use" in refused.stderr
    store.close()
    assert subprocess.run(command, check=False).returncode == 0
    FilesystemImageStore(directory).close()


def test_beside_a_service(store: FilesystemImageStore, directory: Path, image_id: str) -> None:
    """A second store that says so is let in, sees the images, may set them aside, and keeps nobody out."""
    put(store, image_id, b"whole")
    before = tree(directory)
    with closing(FilesystemImageStore(directory, beside=True)) as beside:
        assert (list(beside.ids()), beside.member) == ([image_id], store.member)
        assert tree(directory) == before
        beside.quarantine(image_id)
        assert list(store.ids()) == []
        store.close()
        FilesystemImageStore(directory).close()


def test_beside_no_service(directory: Path) -> None:
    """Where none ever was, nothing is made."""
    with pytest.raises(ConfigError, match=f"{directory} cannot be used: No such file"):
        FilesystemImageStore(directory, beside=True)
    assert not directory.exists()
    directory.mkdir()
    with pytest.raises(ConfigError, match=f"{directory} has no marker"):
        FilesystemImageStore(directory, beside=True)
    assert tree(directory) == set()


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
