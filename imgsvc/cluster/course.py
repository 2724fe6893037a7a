"""How far a pull has come: what its thread tells, and those who follow it hear."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from imgsvc.blocks import BLOCK
from imgsvc.errors import ImgsvcError, Unavailable
from imgsvc.images.store import ImageReader

# Bytes that followers get only when the digest is right.
HELD_BACK = 64 * 1024
# Followers hear of so many bytes at once, or after so many seconds: hundreds of them are not woken for each block.
_NEWS = 4 * BLOCK
_NEWS_INTERVAL = 0.02


@dataclass(frozen=True, slots=True)
class PassedOn:
    """How far a pull came before it gave up keeping what comes, and the digest of that: what followers need to go on
    without it."""

    position: int
    digest: Any


class Course:
    """Of an image of `size` bytes. Every method may be called from any thread, and none but `open` blocks.

    An attempt is what came since the file was last empty. What came before is of no use, also to who has sent it on.
    """

    def __init__(self, size: int) -> None:
        self.position = 0
        self._size = size
        self._lock = threading.Lock()
        self._open_file: Callable[[], ImageReader] | None = None
        self._attempt = 1
        self._verified = False
        self._error: ImgsvcError | None = None
        self._passed_on: PassedOn | None = None
        self._followers: set[object] = set()
        self._waiting: dict[object, tuple[int, Callable[[], None]]] = {}
        self._told = 0
        self._told_at = 0.0

    # For followers.

    @property
    def passed_on(self) -> PassedOn | None:
        """Set once the pull has given up keeping what comes."""
        return self._passed_on

    @property
    def attempt(self) -> int:
        return self._attempt

    def arrived(self, offset: int) -> int:
        """How many bytes from `offset` on are in the file and may be read. Raises what the pull failed with."""
        with self._lock:
            self.look()
            return max(self._limit() - offset, 0)

    def require(self, attempt: int) -> None:
        """Raises unless what was read of this attempt is still good, as far as anybody knows."""
        with self._lock:
            self.look()
            if attempt != self._attempt:
                raise Unavailable("the bytes that came had the wrong digest")

    def open(self) -> ImageReader:
        """A reader of the file, for as far as `arrived` says. Raises Unavailable when there is none."""
        if self._open_file is None:
            raise Unavailable("the image is not kept here")
        return self._open_file()

    def wait(self, follower: object, offset: int, attempt: int | None, wake: Callable[[], None]) -> None:
        """Has `wake` called once: when the byte at `offset` is there, and at any turn that the pull takes, or has taken
        since the `attempt` of which something was read."""
        with self._lock:
            self._followers.add(follower)
            turned = self._error is not None or self._passed_on is not None or attempt not in (None, self._attempt)
            if not turned and offset >= self._limit():
                self._waiting[follower] = (offset, wake)
                return
        wake()

    def forget(self, follower: object) -> None:
        """It has left."""
        with self._lock:
            self._followers.discard(follower)
            self._waiting.pop(follower, None)

    @property
    def followed(self) -> bool:
        """Whether somebody who has waited is still there: one that is slower than the pull seldom waits."""
        return bool(self._followers)

    # For the pull.

    def begin(self, open_file: Callable[[], ImageReader]) -> None:
        """From now on there is a file."""
        with self._lock:
            self._open_file = open_file

    def advance(self, size: int) -> None:
        """So many bytes more are in the file."""
        with self._lock:
            self.position += size
        self.tell_if_due()

    def tell_if_due(self) -> None:
        """To be called now and then while nothing comes, so that nobody waits long for what has."""
        fresh = self.position - self._told
        if fresh and (not self._told or fresh >= _NEWS or time.monotonic() - self._told_at >= _NEWS_INTERVAL):
            self._tell()

    def begin_anew(self) -> None:
        """All that came was wrong."""
        with self._lock:
            self._attempt += 1
            self.position = 0
        self._tell(everybody=True)

    def verify(self) -> None:
        """All of it is right. Raises what the pull was ended with."""
        with self._lock:
            self.look()
            self._verified = True
        self._tell(everybody=True)

    def pass_on(self, digest: Any) -> None:
        """Nothing more will be kept; the digest is of what has come."""
        with self._lock:
            if self._error is not None:
                return
            self._passed_on = PassedOn(self.position, digest)
        self._tell(everybody=True)

    def fail(self, error: ImgsvcError) -> None:
        """Ends it for all who follow, unless the image is whole, or they go on without it."""
        with self._lock:
            if self._verified or self._passed_on is not None or self._error is not None:
                return
            self._error = error
        self._tell(everybody=True)

    def look(self) -> None:
        """Raises what the pull was ended with."""
        if self._error is not None:
            raise self._error

    def _limit(self) -> int:
        """The end of what may be read."""
        if self._passed_on is not None:
            return self._passed_on.position
        return self._size if self._verified else min(self.position, self._size - HELD_BACK)

    def _tell(self, *, everybody: bool = False) -> None:
        with self._lock:
            self._told, self._told_at = self.position, time.monotonic()
            limit = self._limit()
            hear = [each for each, (offset, _) in self._waiting.items() if everybody or offset < limit]
            wakes = [self._waiting.pop(each)[1] for each in hear]
        for wake in wakes:
            wake()
