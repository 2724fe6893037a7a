"""Writes around the page cache, where the file system lets us."""

from __future__ import annotations

import errno
import fcntl
import os

# What every disk is content with, for the place in the file, the length and the memory.
_ALIGNMENT = 4096


class DirectWrites:
    """Writes to one descriptor, which stays the caller's.

    An image that comes in is seldom read at once, and may be larger than the memory: copying it into the page cache
    costs more than all else that is done with a block, and takes the room of images that are being read. So blocks that
    are aligned are written directly; others, and all where the file system will not have it, are written as usual.
    """

    def __init__(self, descriptor: int, *, possible: bool = True) -> None:
        """Unless it is `possible`, all are written as usual."""
        self._descriptor = descriptor
        self._flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
        self._possible = possible
        self._on = False

    def write(self, block: bytes | bytearray | memoryview, position: int) -> None:
        """Writes the whole block there. Raises OSError."""
        rest = memoryview(block).cast("B")
        while rest:
            written = self._write(rest, position)
            rest = rest[written:]
            position += written

    def stop(self) -> None:
        """Until the next write, the descriptor is as it was: it reads any bytes into any memory."""
        self._turn(on=False)

    def _write(self, block: memoryview, position: int) -> int:
        self._turn(on=self._possible and position % _ALIGNMENT == 0 and len(block) % _ALIGNMENT == 0)
        try:
            return os.pwrite(self._descriptor, block, position)
        except OSError as error:
            if not self._on or error.errno != errno.EINVAL:
                raise
            self._possible = False  # it wants more alignment than we know of
            return self._write(block, position)

    def _turn(self, *, on: bool) -> None:
        if on == self._on:
            return
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, self._flags | (os.O_DIRECT if on else 0))
        except OSError as error:
            if not on or error.errno != errno.EINVAL:
                raise
            self._possible = False
        else:
            self._on = on
