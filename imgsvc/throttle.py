"""A limit of bytes a second for all that share it."""

from __future__ import annotations

import threading
import time

# Seconds for which nothing may have been used, and then be made up for.
_BURST = 0.1


class Throttle:
    """`rate` is in bytes a second, 0 for no limit. Every method may be called from any thread."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        # When all that was taken is paid for.
        self._paid = time.monotonic()

    def take(self, size: int) -> float:
        """The seconds after which so many bytes more may have been moved: 0 when they may be now."""
        if not self._rate:
            return 0.0
        now = time.monotonic()
        with self._lock:
            self._paid = max(self._paid, now - _BURST) + size / self._rate
            return max(self._paid - now, 0.0)
