"""What a client reads of an image that is on its way here."""

from __future__ import annotations

from collections.abc import Callable

from imgsvc.cluster.pull import Pull
from imgsvc.cluster.relay import Relay
from imgsvc.errors import Unavailable
from imgsvc.images.store import ImageReader
from imgsvc.metadata.image import Image

# Called with where to begin, and the digest of what was read before, if that was all.
MakeRelay = Callable[[int, object | None], Relay]


class Follower:
    """An ImageReader. The pull begins, or is joined, with the first byte that is wanted. When it keeps no copy, the
    rest comes through a relay, without a gap."""

    def __init__(self, image: Image, join: Callable[[], Pull], relay: MakeRelay) -> None:
        self.size = image.size
        self._join = join
        self._make_relay = relay
        self._pull: Pull | None = None
        self._file: ImageReader | None = None
        self._relay: Relay | None = None
        # The attempt of which bytes were read.
        self._attempt: int | None = None
        # How many bytes were read, from the first on and without a gap.
        self._in_order = 0

    def arrived(self, offset: int) -> int:
        if self._relay is not None:
            return self._relay.arrived(offset)
        if self._pull is None:
            return 0
        course = self._pull.course
        if self._attempt is not None:
            course.require(self._attempt)
        if self._file is None and course.passed_on is not None:
            return 0
        return course.arrived(offset)

    def wait(self, offset: int, length: int, wake: Callable[[], None]) -> None:
        if self._pull is None:
            self._pull = self._join()
        course = self._pull.course
        passed_on = course.passed_on
        # Nothing follows what was read of another attempt: `arrived` says so.
        good = self._attempt in (None, course.attempt)
        if passed_on is not None and good and not self._relay and (not self._file or offset >= passed_on.position):
            whole = self._in_order == offset == passed_on.position
            self._relay = self._make_relay(offset, passed_on.digest if whole else None)
        if self._relay is None:
            course.wait(self, offset, self._attempt, wake)
        else:
            self._relay.wait(offset, length, wake)

    def read(self, offset: int, length: int) -> bytes:
        if self._relay is not None:
            return self._relay.read(offset, length)
        block = b""

        def read(file: ImageReader, there: int) -> int:
            nonlocal block
            block = file.read(offset, there)
            return len(block)

        self._of_attempt(offset, length, read)
        return block

    def send(self, descriptor: int, offset: int, length: int) -> int:
        if self._relay is not None:
            return self._relay.send(descriptor, offset, length)
        return self._of_attempt(offset, length, lambda file, there: file.send(descriptor, offset, there))

    def close(self) -> None:
        if self._pull is not None:
            self._pull.course.forget(self)
        for reader in (self._file, self._relay):
            if reader is not None:
                reader.close()

    def _of_attempt(self, offset: int, length: int, take: Callable[[ImageReader, int], int]) -> int:
        """How many bytes were taken of those, up to `length`, that have arrived in the file: none when there is no
        file any more."""
        assert self._pull is not None  # noqa: S101 - anything else is a mistake of ours
        course = self._pull.course
        # Before anything else: what has arrived of one attempt says nothing of the next.
        attempt = self._attempt or course.attempt
        there = min(length, self.arrived(offset))
        if not there:
            return 0
        try:
            file = self._file = self._file or course.open()
        except Unavailable:
            if course.passed_on is None:
                raise
            return 0
        count = take(file, there)
        if count:
            self._attempt = attempt
            if offset == self._in_order:
                self._in_order += count
        course.require(attempt)
        return count
