"""Gathers what the network delivers into blocks that suit the disk."""

from __future__ import annotations

import time

# A usual ZFS recordsize for images: blocks that end at its multiples are never read back to be rewritten.
BLOCK = 1 << 20
# Seconds after which a slow sender's bytes are written all the same, so that its progress shows.
PATIENCE = 0.5


class Blocks:
    """For one thread at a time."""

    def __init__(self, position: int = 0) -> None:
        """The first byte to come is the image's byte of that number."""
        self._buffer = bytearray()
        self._room = BLOCK - position % BLOCK
        self._taken = time.monotonic()

    def add(self, piece: bytes | bytearray) -> None:
        self._buffer += piece

    def due(self) -> bool:
        """Whether a block is full, or its bytes have waited long enough."""
        if len(self._buffer) >= self._room:
            return True
        return bool(self._buffer) and time.monotonic() - self._taken >= PATIENCE

    def take(self) -> bytearray:
        """The next bytes, up to a multiple of BLOCK from the beginning; empty when there are none."""
        block = self._buffer
        self._buffer = block[self._room :]
        del block[self._room :]
        self._room = self._room - len(block) or BLOCK
        self._taken = time.monotonic()
        return block
