"""How many images a directory has, without looking through it each time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

# The part of one thread's time that counting may take.
_SHARE = 0.01


class Count:
    """Counted anew when `changed()`, a time of the directory, is another one, but not so often that it is much work."""

    def __init__(self, changed: Callable[[], int], names: Callable[[], Iterator[str]]) -> None:
        self._changed = changed
        self._names = names
        self._lock = threading.Lock()
        self._at: int | None = None
        self._known = 0
        self._next = 0.0

    def get(self) -> int:
        with self._lock:
            began = time.monotonic()
            if began >= self._next:
                # Read before, so that what changes meanwhile is counted the next time.
                at = self._changed()
                if at != self._at:
                    self._known = sum(1 for _ in self._names())
                    self._at, ended = at, time.monotonic()
                    self._next = ended + (ended - began) / _SHARE
            return self._known
