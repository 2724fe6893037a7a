"""Image files, open for writing and for reading. Where they are is the store's business."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum, auto

from imgsvc.errors import Conflict, NoSpace, NotFound, Unavailable, Unreadable
from imgsvc.images.direct import DirectWrites
from imgsvc.images.directory import Directory, write_all

# Behind the name of the file that they are about.
NOTES = ".notes"

# What a file system says that has no sendfile; some of those in user space have none.
_NO_SENDFILE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
_PIECE = 1 << 18
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# A sector that cannot be read, and the words of file systems that check what they read.
_DAMAGED = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.EILSEQ, errno.ENODATA, errno.EREMOTEIO})


class FileWriter:
    """An ImageWriter that fills the file `partial` and, at the end, gives it the name `image_id`.

    `ended` is called once, when it will not touch either name again. The lock is for a caller that gives up while a
    write still runs in another thread: once closed, the number of the descriptor may be another image's.
    """

    def __init__(
        self,
        directory: Directory,
        partial: str,
        image_id: str,
        descriptor: int,
        ended: Callable[[], None],
        *,
        direct: bool = True,
    ) -> None:
        """Takes the descriptor over, also when it raises OSError. Writes past the page cache, if `direct`."""
        self._directory = directory
        self._partial = partial
        self._notes = partial + NOTES
        self._id = image_id
        self._descriptor: int | None = descriptor
        self._ended = ended
        self._state = _State.OPEN
        self._lock = threading.Lock()
        try:
            self._direct = DirectWrites(descriptor, possible=direct)
            self._size = os.lseek(descriptor, 0, os.SEEK_END)
        except BaseException:
            self._release()
            raise

    @property
    def size(self) -> int:
        return self._size

    def write(self, block: bytes | bytearray | memoryview) -> None:
        with self._lock, translated(f"write image {self._id}"):
            self._begin()
            self._direct.write(block, self._size)
            self._size += len(block)
            self._state = _State.OPEN

    def read(self, offset: int, length: int) -> bytes:
        with self._lock, translated(f"read image {self._id}"):
            descriptor = self._open()
            self._direct.stop()
            return read_all(descriptor, offset, max(min(length, self._size - offset), 0), self._id)

    def truncate(self, size: int) -> None:
        with self._lock, translated(f"write image {self._id}"):
            os.ftruncate(self._begin(), size)
            self._size = size
            self._state = _State.OPEN

    def note(self, line: str) -> None:
        with self._lock, translated(f"write image {self._id}"):
            self._open()
            notes = self._directory.open(self._notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                # On a line of its own, also behind one of which a full disk or a loss of power left a part.
                write_all(notes, f"\n{line}\n".encode())
            finally:
                os.close(notes)

    def notes(self) -> Sequence[str]:
        with self._lock, translated(f"read image {self._id}"):
            self._open()
            try:
                descriptor = self._directory.open(self._notes, os.O_RDONLY)
            except FileNotFoundError:
                return ()
            with os.fdopen(descriptor, encoding="utf-8", errors="replace") as notes:
                return [line.removesuffix("\n") for line in notes if line.endswith("\n") and line != "\n"]

    def follow(self, size: int) -> FileReader:
        # Without the lock: a slow disk may have it for long.
        with translated(f"read image {self._id}"):
            try:
                descriptor = self._directory.open(self._partial, os.O_RDONLY)
            except FileNotFoundError:
                descriptor = self._directory.open(self._id, os.O_RDONLY)
        return FileReader(self._id, descriptor, size)

    def commit(self) -> None:
        with self._lock, translated(f"write image {self._id}"):
            if self._state is _State.COMMITTED:
                return
            descriptor = self._begin()
            try:
                os.fsync(descriptor)
            finally:
                self._release()
            self._publish()
            self._state = _State.COMMITTED
            with suppress(OSError):  # the next start finds them
                self._directory.remove(self._notes)
            self._ended()

    def abort(self) -> None:
        self._drop(empty=True)

    def close(self) -> None:
        self._drop(empty=False)

    def _begin(self) -> int:
        """The descriptor, for a step after which the image is broken unless the step ends well.

        That holds for a failed fsync too: the kernel reports lost blocks once, and a second try would succeed.
        """
        descriptor = self._open()
        self._state = _State.BROKEN
        return descriptor

    def _open(self) -> int:
        if self._state is not _State.OPEN or self._descriptor is None:
            raise Unavailable(f"image {self._id} is no longer being written")
        return self._descriptor

    def _publish(self) -> None:
        """Gives what was written its name, for good.

        To look and then rename is safe, although rename overwrites: the directory is locked against other services,
        an id has one writer in this one, and nothing else makes files of such names.
        """
        if self._directory.exists(self._id):
            raise Conflict(f"image {self._id} is stored already")
        self._directory.rename(self._partial, self._id)
        try:
            self._directory.sync()
        except OSError:
            # A loss of power could still take the name back, so nobody may see it.
            self._directory.rename(self._id, self._partial)
            raise

    def _drop(self, *, empty: bool) -> None:
        with self._lock:
            if self._state in (_State.COMMITTED, _State.DROPPED):
                return
            self._state = _State.DROPPED
            # Some file systems report only here what they could not write; it is not wanted any more.
            with suppress(OSError):
                self._release()
            if empty:
                # Where this fails, `unclaim`, which is to follow, gives the space back or says why it cannot.
                with suppress(OSError):
                    self._directory.remove(self._notes)
                    os.close(self._directory.open(self._partial, os.O_WRONLY | os.O_TRUNC))
            self._ended()

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class FileReader:
    """An ImageReader. Its lock is there for the reason that FileWriter gives."""

    def __init__(self, image_id: str, descriptor: int, size: int | None = None) -> None:
        """Takes the descriptor over, also when it raises. `size` is what the image will have, None that of the file."""
        self._id = image_id
        self._descriptor: int | None = descriptor
        self._lock = threading.Lock()
        try:
            self.size = image_size(image_id, os.fstat(descriptor)) if size is None else size
        except BaseException:
            self.close()
            raise

    def reads(self, found: os.stat_result) -> bool:
        """Whether what was found is this very file."""
        with self._lock:
            return self._descriptor is not None and os.path.samestat(found, os.fstat(self._descriptor))

    def arrived(self, offset: int) -> int:
        return self.size - offset

    def wait(self, offset: int, length: int, wake: Callable[[], None]) -> None:  # noqa: ARG002 - all of it is here
        wake()

    def read(self, offset: int, length: int) -> bytes:
        wanted = max(min(length, self.size - offset), 0)
        with self._lock, translated(f"read image {self._id}"):
            return read_all(self._opened(), offset, wanted, self._id)

    def send(self, descriptor: int, offset: int, length: int) -> int:
        try:
            with self._lock, translated(f"read image {self._id}", but=(ConnectionError, TimeoutError, BlockingIOError)):
                sent = pass_on(self._opened(), descriptor, offset, min(length, self.size - offset))
        except BlockingIOError:
            return 0
        if sent == 0:
            raise Unavailable(f"image {self._id} is shorter than it was")
        return sent

    def close(self) -> None:
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                os.close(descriptor)

    def _opened(self) -> int:
        if self._descriptor is None:
            raise Unavailable(f"image {self._id} is no longer being read")
        return self._descriptor


def pass_on(source: int, out: int, offset: int, length: int) -> int:
    """How many bytes of the file `source` the socket `out` took, 0 at the file's end. Raises OSError."""
    try:
        return os.sendfile(out, source, offset, length)
    except OSError as error:
        if error.errno not in _NO_SENDFILE:
            raise
    block = os.pread(source, min(length, _PIECE), offset)
    return os.write(out, block) if block else 0


def read_all(descriptor: int, offset: int, length: int, image_id: str) -> bytes:
    """Exactly so many bytes. Raises OSError, and Unavailable when the file has become shorter."""
    block = os.pread(descriptor, length, offset)
    while len(block) < length:
        more = os.pread(descriptor, length - len(block), offset + len(block))
        if not more:
            raise Unavailable(f"image {image_id} is shorter than it was")
        block += more
    return block


class _State(Enum):
    OPEN = auto()
    BROKEN = auto()
    COMMITTED = auto()
    DROPPED = auto()


def image_size(image_id: str, found: os.stat_result) -> int:
    """Raises NotFound when what was found is no file."""
    if not stat.S_ISREG(found.st_mode):
        raise NotFound(f"image {image_id} is not stored here")
    return found.st_size


@contextmanager
def translated(action: str, but: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    """Turns an OSError, `but` for these, into a sentence that says which action failed, and names no path."""
    try:
        yield
    except but:
        raise
    except OSError as error:
        raise _kind(error)(f"cannot {action}: {error.strerror}") from error


def _kind(error: OSError) -> type[NoSpace | Unavailable]:
    if disk_full(error):
        return NoSpace
    return Unreadable if error.errno in _DAMAGED else Unavailable


def disk_full(error: OSError) -> bool:
    """Whether there is no room, be it on the disk, in a quota or in one file."""
    return error.errno in _FULL
