"""Who is next, when some have to wait for a moment to come."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    @property
    def in_a_hurry(self) -> bool:
        """Whether it is not to wait for its moment after all."""


T = TypeVar("T", bound=Waiting)


class Turns(Generic[T]):
    """First come, first served, of those whose moment has come. Every method may be called from any thread."""

    def __init__(self) -> None:
        # A heap, of those who wait for a moment and those who wait for somebody to call `get`.
        self._waiting: list[tuple[float, int, T]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, who: T, seconds: float = 0.0) -> None:
        """It is to wait so long. Returns at once."""
        with self._changed:
            heapq.heappush(self._waiting, (time.monotonic() + seconds, next(self._numbers), who))
            self._changed.notify()

    def get(self) -> T | None:
        """The next one, once there is one; None after `close`."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if self._waiting and self._waiting[0][0] <= now:
                    return heapq.heappop(self._waiting)[-1]
                self._changed.wait(self._waiting[0][0] - now if self._waiting else None)
        return None

    def hurried(self) -> list[T]:
        """Those who are in a hurry, who wait no more then."""
        with self._changed:
            found = [each for each in self._waiting if each[-1].in_a_hurry]
            if found:
                numbers = {number for _, number, _ in found}
                self._waiting = [each for each in self._waiting if each[1] not in numbers]
                heapq.heapify(self._waiting)
            return [who for _, _, who in found]

    def close(self) -> list[T]:
        """Nobody is next any more. Returns those that still wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            left = [who for _, _, who in self._waiting]
            self._waiting.clear()
            return left
