"""Room set aside for the moment when the disk is full."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import structlog

_log = structlog.get_logger()

BALLAST_SIZE = 1 << 20

# With less than this the disk is as good as full, and the room belongs to whoever is writing.
_PLENTY = 4 * BALLAST_SIZE


class Ballast:
    """One MiB in a file of its own, given back to the disk when the metadata has to write and nothing else is left.

    Deleting an image is how a person makes room on a full disk, and a transfer that died of the full disk has to be
    recorded as dead. Both write a few kilobytes first, and whatever filled the disk left none. The bytes are random,
    because a file system that compresses would keep a file of zeros in no space at all.

    Not thread-safe: the writer's lock is around every call.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._in_place = path.is_file() and path.stat().st_size == BALLAST_SIZE

    def drop(self) -> bool:
        """Gives the room to the next write; False when there was none to give."""
        if not self._in_place:
            return False
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("ballast not dropped", path=str(self._path), error=str(error))
            return False
        self._in_place = False
        _log.warning("ballast dropped", path=str(self._path))
        return True

    def restore(self) -> None:
        """Takes the room again once the disk has plenty; does nothing while it is there or space is short.

        It never raises: what called it has been written, and the next write tries again.
        """
        if self._in_place:
            return
        try:
            disk = os.statvfs(self._path.parent)
            if disk.f_bavail * disk.f_frsize < _PLENTY:
                return
            with self._path.open("wb") as file:
                file.write(os.urandom(BALLAST_SIZE))
                file.flush()
                os.fsync(file.fileno())  # delayed allocation has reserved nothing before this
        except OSError:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            return
        self._in_place = True
