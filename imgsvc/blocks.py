"""Gathers what the network delivers into blocks that suit the disk."""

from __future__ import annotations

import mmap
import time

# A usual ZFS recordsize for images: blocks that end at its multiples are never read back to be rewritten.
BLOCK = 1 << 20
# Seconds after which a slow sender's bytes are written all the same, so that its progress shows.
PATIENCE = 0.5


class Blocks:
    """For one thread at a time. A block is gathered in one of two buffers, while the one before it, in the other, may
    still be written. They begin at a page, as a disk wants it that reads them without the page cache."""

    def __init__(self, position: int = 0, block: int = 0) -> None:
        """The first byte to come is the image's byte of that number. A block ends at a multiple of `block` bytes, which
        is one of BLOCK; 0 is BLOCK."""
        self._block = block or BLOCK
        self._buffer = self._other = memoryview(b"")
        self._filled = 0
        self._room = self._block - position % self._block
        # What came beyond the block's end.
        self._beyond: list[memoryview] = []
        self._taken = time.monotonic()

    def add(self, piece: bytes | bytearray | memoryview) -> None:
        end = self._filled + len(piece)
        if end <= self._room and self._buffer:
            self._buffer[self._filled : end] = piece
            self._filled = end
        elif self._beyond:
            self._beyond.append(memoryview(piece))
        else:
            self._fill(memoryview(piece))

    def due(self) -> bool:
        """Whether a block is full, or its bytes have waited long enough."""
        if self._filled == self._room:
            return True
        return bool(self._filled) and time.monotonic() - self._taken >= PATIENCE

    def take(self) -> memoryview:
        """The next bytes, up to a multiple of BLOCK from the beginning; empty when there are none. They stay as they
        are until this is called again."""
        block = self._buffer[: self._filled]
        self._buffer, self._other = self._other, self._buffer
        self._room = self._room - self._filled or self._block
        self._filled = 0
        self._taken = time.monotonic()
        beyond, self._beyond = self._beyond, []
        for piece in beyond:
            self.add(piece)
        return block

    def _fill(self, piece: memoryview) -> None:
        if not self._buffer:
            self._buffer = memoryview(mmap.mmap(-1, self._block, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        fitting = piece[: self._room - self._filled]
        end = self._filled + len(fitting)
        self._buffer[self._filled : end] = fitting
        self._filled = end
        if len(fitting) < len(piece):
            self._beyond.append(piece[len(fitting) :])
