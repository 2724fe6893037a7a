"""One directory, used through one descriptor and locked against other services. It knows nothing of images."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# Other tools may read the images, as they could those of the Go program.
_FILE_MODE = 0o644
_DIRECTORY_MODE = 0o755


class Directory:
    """Paths are relative to the directory, wherever it is mounted or moved meanwhile.

    Every method may be called from any thread, and raises OSError; EBADF after `close`. Descriptors that it returns
    are the caller's to close, and no child process inherits one.
    """

    def __init__(self, path: Path, *, beside: bool = False) -> None:
        """Opens and locks it, making it when it is missing, though not its parent.

        Raises BlockingIOError when another process, or another Directory in this one, has it open. With `beside` it
        must exist, and who has it locked does not matter.
        """
        self._path = path.absolute()
        if not beside and not self._path.exists():
            self._path.mkdir(_DIRECTORY_MODE)
            sync_directory(self._path.parent)
        self._descriptor: int | None = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if beside:
            return
        try:
            # The kernel lets go of it with the descriptor, so a killed process leaves no lock behind.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self.close()
            raise

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, _FILE_MODE, dir_fd=self._fd)

    def make(self, name: str) -> None:
        """Makes a directory in this one, durably; fine when it exists."""
        try:
            os.mkdir(name, _DIRECTORY_MODE, dir_fd=self._fd)
        except FileExistsError:
            return
        self.sync()

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, path: str) -> None:
        """Removes a file; missing is fine."""
        try:
            os.unlink(path, dir_fd=self._fd)
        except FileNotFoundError:
            return

    def sync(self, path: str = ".") -> None:
        """Brings the names in the directory `path` onto the disk."""
        descriptor = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def stat(self, path: str) -> os.stat_result:
        return os.stat(path, dir_fd=self._fd)

    def exists(self, path: str) -> bool:
        """Whether the name is taken, be it by a link that leads nowhere."""
        try:
            os.stat(path, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def entries(self, path: str = ".") -> Iterator[os.DirEntry[str]]:
        # A descriptor of its own, because two scans of one descriptor would share their position.
        descriptor = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(descriptor) as entries:
                yield from entries
        finally:
            os.close(descriptor)

    def space(self) -> os.statvfs_result:
        return os.fstatvfs(self._fd)

    def in_place(self) -> bool:
        """Whether its path still leads to it: nothing was unmounted, mounted over it, or moved."""
        return os.path.samestat(self._path.stat(), os.fstat(self._fd))

    def close(self) -> None:
        """Unlocks it; may be called twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    @property
    def _fd(self) -> int:
        if self._descriptor is None:
            raise OSError(errno.EBADF, "the image store is closed")
        return self._descriptor


def write_all(descriptor: int, block: bytes | bytearray | memoryview) -> None:
    """Writes the whole block, in as many steps as the kernel wants."""
    rest = memoryview(block).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_directory(path: Path) -> None:
    """Brings the names in a directory onto the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
