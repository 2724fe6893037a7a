"""A real ZFS pool for tests: Debian's zfs-fuse, which needs no kernel module, on a sparse file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_POOL = "imgsvctest"
_POOL_BYTES = 4 * 1024**3
_SECONDS = 30.0
# zfs-fuse imports whatever this names, and the tests must not touch pools that are not theirs.
_OTHER_POOLS = Path("/var/lib/zfs/zpool.cache")


@dataclass(frozen=True)
class ZfsPool:
    """`name` is what datasets begin with; `directory` is where the pool is mounted."""

    name: str
    directory: Path

    def create(self, dataset: str, **properties: str) -> Path:
        """Makes a dataset and returns where it is mounted."""
        options = [f"-o{name}={value}" for name, value in properties.items()]
        zfs("create", *options, f"{self.name}/{dataset}")
        return self.directory / dataset

    def destroy(self, dataset: str) -> None:
        """Removes a dataset that nobody uses any more, with its snapshots."""
        _retried("zfs", "destroy", "-r", f"{self.name}/{dataset}")

    def unmount(self, dataset: str) -> None:
        zfs("unmount", f"{self.name}/{dataset}")

    def mount(self, dataset: str) -> None:
        zfs("mount", f"{self.name}/{dataset}")

    def rot(self, content: bytes) -> None:
        """Changes a bit of the disk where these bytes lie, as they are in a file: from now on ZFS, which checks what
        it reads, gives EIO for the block."""
        with (self.directory.parent / "disk").open("r+b") as disk:
            start, end = 0, disk.seek(0, os.SEEK_END)
            while start < end:
                start = os.lseek(disk.fileno(), start, os.SEEK_DATA)
                stop = os.lseek(disk.fileno(), start, os.SEEK_HOLE)
                found = os.pread(disk.fileno(), stop - start, start).find(content)
                if found >= 0:
                    os.pwrite(disk.fileno(), bytes([content[0] ^ 1]), start + found)
                    return
                start = stop
        raise AssertionError("these bytes are not on the disk")

    def settle(self) -> None:
        """Has ZFS write what it gathered, and so free what was removed: by itself it does so every 30 seconds. Any
        change of a property makes it."""
        zfs("set", "imgsvc:settled=now", self.name)


def zfs(*arguments: str) -> bytes:
    """Runs `zfs` and returns what it prints; a failure shows what it said."""
    return _run("zfs", *arguments)


@pytest.fixture(scope="module")
def zfs_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZfsPool]:
    """An empty pool of 4 GiB, of which only what is written takes room; skips where none can be had. Not for the whole
    run: a machine has one zfs-fuse, so the worker processes of pytest take turns."""
    with Path(__file__).open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        reason = _why_not()
        if reason:
            pytest.skip(f"no ZFS pool: {reason}")
        directory = tmp_path_factory.mktemp("zfs")
        with _daemon(directory / "zfs-fuse.log"), _pool(directory) as pool:
            yield pool


def _why_not() -> str:
    if os.geteuid() != 0:
        return "it takes root"
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse"
    missing = [program for program in ("zfs-fuse", "zfs", "zpool", "setpriv") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if _OTHER_POOLS.exists():
        return f"{_OTHER_POOLS} names pools of this machine"
    if _answers():
        return "another ZFS is running"
    return ""


@contextlib.contextmanager
def _daemon(log: Path) -> Iterator[None]:
    # setpriv has the kernel end it, and so unmount everything, even when the tests are killed.
    command = ["setpriv", "--pdeathsig", "TERM", "zfs-fuse", "--no-daemon", "--no-kstat-mount"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as daemon:
        try:
            deadline = time.monotonic() + _SECONDS
            while not _answers():
                if daemon.poll() is not None or time.monotonic() > deadline:
                    pytest.skip(f"no ZFS pool: zfs-fuse does not start: {log.read_text(errors='replace')}")
                time.sleep(0.05)
            yield
        finally:
            daemon.terminate()
            try:
                daemon.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()


@contextlib.contextmanager
def _pool(directory: Path) -> Iterator[ZfsPool]:
    disk, mount_point = directory / "disk", directory / "pool"
    with disk.open("wb") as file:
        file.truncate(_POOL_BYTES)
    # Without a cache file the next zfs-fuse on this machine knows nothing of the pool.
    _run("zpool", "create", "-o", "cachefile=none", "-m", str(mount_point), _POOL, str(disk))
    try:
        yield ZfsPool(_POOL, mount_point)
    finally:
        _unmount_all(mount_point)
        _retried("zpool", "destroy", "-f", _POOL)
        disk.unlink()


def _unmount_all(mount_point: Path) -> None:
    """Deepest first, and lazily, for a failed test may have left a file open."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mounted in sorted((name for name in mounts if Path(name).is_relative_to(mount_point)), reverse=True):
        subprocess.run(["umount", "--lazy", mounted], check=False)


def _retried(*command: str) -> None:
    """ZFS calls something busy for a little while after its last user has gone."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            _run(*command)
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def _answers() -> bool:
    return subprocess.run(["zpool", "list"], check=False, capture_output=True).returncode == 0


def _run(*command: str) -> bytes:
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.decode(errors='replace')}"
    return done.stdout
