"""Reads whole images, as a download does, for their digest."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from imgsvc.blocks import BLOCK
from imgsvc.images.store import ImageReader

# Seconds of the rate that may be made up for: what was lost to a slow disk, but not to a long pause.
_SLACK = 1.0


def digest_of(reader: ImageReader, between: Callable[[int], None]) -> str:
    """The sha256 of the image in hex. `between` is called after each block with its length, and may wait, or raise to
    end the reading."""
    digest = hashlib.sha256()
    offset = 0
    while block := reader.read(offset, BLOCK):
        digest.update(block)
        offset += len(block)
        between(len(block))
    return digest.hexdigest()


class Pace:
    """Spreads bytes over time, all that it is told of together; 0 bytes per second is as fast as it goes."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate = bytes_per_second
        self._due = time.monotonic()

    def delay(self, count: int) -> float:
        """Seconds to wait now that so many bytes more were read."""
        if not self._rate:
            return 0.0
        now = time.monotonic()
        self._due = max(self._due, now - _SLACK) + count / self._rate
        return max(self._due - now, 0.0)
