"""One upload that may come in many requests: how far it is, and the one request at a time that brings it on."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from imgsvc.errors import Conflict, Gone, ImgsvcError, Incomplete, Locked, Unavailable, WrongChecksum
from imgsvc.images.store import ImageWriter
from imgsvc.intake import Origin
from imgsvc.metadata.image import Image
from imgsvc.transfer import Transfer

# What the bytes of one request may be checked with.
ALGORITHMS = ("sha1", "sha256")

# Seconds that somebody waits for a request that writes a block, or puts the image on the disk for good.
_PATIENCE = 2.0


@dataclass(frozen=True, slots=True)
class Checksum:
    """What the bytes of one request must have; `algorithm` is one of ALGORITHMS."""

    algorithm: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an upload is, in bytes. `metadata` is as its client gave it, "" when that is not known any more.
    `expires` is the Unix time at which it is given up unless more comes; None when it is complete."""

    image: Image
    offset: int
    length: int
    metadata: str = ""
    expires: float | None = None


class Resumable:
    """Every method may be called from any thread, and may block. Each raises what the transfer was cancelled with.

    While no request brings bytes, the transfer is paused, and no file is open. `lock`, `request`, `touch` and
    `progress` are for its requests alone.
    """

    def __init__(
        self,
        transfer: Transfer,
        open_writer: Callable[[], ImageWriter],
        *,
        metadata: str,
        expire: float,
        touched: float,
        left: int | None = None,
    ) -> None:
        """The transfer is paused. `expire` is in seconds, `touched` the Unix time of the last byte. So many bytes were
        `left` by an earlier run, to be verified by `verify`; None when there was none."""
        self.transfer = transfer
        self._open_writer = open_writer
        self.metadata = metadata
        self._expire = expire
        self.touched = touched
        # By a clock that nobody sets: a day that was skipped is none in which the client could have come.
        self._idle_since = _clock() - max(time.time() - touched, 0.0)
        # The `touched` by which others were told how long they are to wait for us; None before they were.
        self.told: float | None = None
        self._left = left
        self.lock = threading.RLock()
        self.request: Request | None = None

    def look(self) -> Progress:
        """How far it is, whatever happens now; one that has all its bytes is complete before this returns. Raises Locked
        when a request does not let go of it for a moment, Unavailable or NoSpace when that cannot be noted, Unavailable
        also while the request that brought the last byte goes on; and what `Request` does at its end."""
        with self._quiet():
            progress = self.progress()
            if progress.offset < progress.length:
                return progress
            if self.request is not None:
                raise Unavailable("the upload is being completed")
            request = self._commit()
        return request.complete()

    def begin(self, offset: int, checksum: Checksum | None = None) -> Request:
        """A request that brings the bytes from `offset` on; one that was under way is over. Raises Conflict when the
        upload is at another offset, and then changes nothing; else as `look` does."""
        with self._quiet():
            there = self.transfer.checkpoint()
            if offset != there:
                raise Conflict(f"the upload is at offset {there}")
            if self.request is not None:
                # It is at the very byte at which the newcomer begins, so it brings nothing: its connection is dead, and
                # we have not been told, or the two of them compete.
                self.request.supersede()
                self.request = None
                self.transfer.pause()
            self.transfer.go_on(self._open_writer)
            try:
                if checksum is not None:
                    self.transfer.hold()
            except BaseException:
                self.transfer.pause()
                raise
            self.request = Request(self, checksum)
            return self.request

    def verify(self, origin: Origin, look: Callable[[], None]) -> None:
        """Goes on behind what an earlier run left of bytes of this `origin`, as far as it is right. Raises NotFound or
        Conflict when the record was ended, Unavailable or NoSpace when the stores cannot now, and what `look` does."""
        with self.lock:
            try:
                self.transfer.go_on(self._open_writer)
                self.transfer.recover(look)
                if not self.transfer.size:
                    self.transfer.restart(origin)
                self.transfer.start(self.transfer.image.expected_size)
            finally:
                self.transfer.pause()
            self._left = None

    def finish(self) -> None:
        """Completes it when it has all its bytes, and the request that brought the last one ended before it had done
        that. Raises as `look` does."""
        with self._idle() as idle:
            if not idle or not self._has_all:
                return
            request = self._commit()
        request.complete()

    def abandon(self) -> None:
        """Gives it up when it is too long since the last byte came, unless all are there."""
        with self._idle() as idle:
            if idle and _clock() >= self._idle_since + self._expire and not self._may_have_all:
                self.transfer.abort(Gone(f"the upload was abandoned: no byte came for {self._expire:g} seconds"))

    def touch(self) -> None:
        """A byte has come."""
        self.touched, self._idle_since = time.time(), _clock()

    @property
    def _has_all(self) -> bool:
        return self._left is None and self.transfer.size == self.transfer.image.expected_size

    @property
    def _may_have_all(self) -> bool:
        """What was left is known when it is verified."""
        return self._has_all or (self._left is not None and self._left >= self.transfer.image.expected_size)

    def _commit(self) -> Request:
        """What a request without bytes would do now. Its client may never send one: it was told that all are there."""
        request = self.begin(self.transfer.size)
        request.commit()
        return request

    def progress(self) -> Progress:
        offset, image = self.transfer.checkpoint(), self.transfer.image
        return Progress(image, offset, image.expected_size, self.metadata, self.touched + self._expire)

    @contextlib.contextmanager
    def _idle(self) -> Iterator[bool]:
        """Whether nobody is at it, and then nobody comes."""
        if not self.lock.acquire(blocking=False):
            yield False
            return
        try:
            yield self.request is None and not self.transfer.over
        finally:
            self.lock.release()

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without anything going on."""
        if self._left is not None:
            raise Unavailable("what came before the service was started again is being verified")
        if not self.lock.acquire(timeout=_PATIENCE):
            raise Locked("another request is being finished")
        try:
            yield
        finally:
            self.lock.release()


class Request:
    """The bytes of one request, on their way into the upload; what a `Transfer` is to a plain one.

    `feed`, then `commit` and `complete`, or at any point `abort`; one call at a time. Nothing but `abort` may follow
    an error.
    """

    def __init__(self, upload: Resumable, checksum: Checksum | None) -> None:
        self.upload = upload
        self._transfer = upload.transfer
        self._checksum = checksum
        self._digest = None if checksum is None else hashlib.new(checksum.algorithm, usedforsecurity=False)
        self._progress: Progress | None = None
        self._ended: ImgsvcError | None = None

    @property
    def cancelled(self) -> ImgsvcError | None:
        return self._ended or self._transfer.cancelled

    def supersede(self) -> None:
        """Another request has taken its place."""
        self._ended = Locked("another request goes on with this upload")

    def feed(self, block: bytes | bytearray | memoryview) -> None:
        """As `Transfer.feed`; also raises Locked when another request has taken the upload over."""
        with self._lock:
            self._check_running()
            if self._digest is not None:
                self._digest.update(block)
            self._transfer.feed(block)
            self.upload.touch()

    def commit(self) -> None:
        """All its bytes were fed. Those of a whole upload are put on the disk for good, with what `Transfer.commit`
        raises; it is then over. Raises WrongChecksum, and drops the request's bytes; NoSpace or Unavailable."""
        with self._lock:
            self._check_running()
            try:
                self._check_sum()
                if self._transfer.size == self._transfer.image.expected_size:
                    self._commit_whole()
                else:
                    self._progress = self.upload.progress()
            finally:
                self._end(Incomplete("the request is over"))

    @property
    def unsettled(self) -> bool:
        return self._transfer.unsettled

    def complete(self) -> Progress:
        """How far the upload is after the request. Raises as `Transfer.complete` does."""
        if self._progress is not None:
            return self._progress
        image = self._transfer.complete()
        return Progress(image, image.size, image.size, self.upload.metadata)

    def abort(self, reason: ImgsvcError) -> None:
        """The request is over, and the upload goes on with what was fed, unless that was to be checked; does nothing
        when it was over. Never raises."""
        with self._lock:
            if self._ended is None:
                self._end(reason)

    @property
    def _lock(self) -> threading.RLock:
        return self.upload.lock

    def _check_running(self) -> None:
        if self._ended is not None:
            raise self._ended

    def _check_sum(self) -> None:
        if self._checksum is None or self._digest is None:
            return
        if self._digest.digest() != self._checksum.digest:
            self._transfer.go_back()
            raise WrongChecksum("the bytes do not have the checksum that was announced; they were dropped")
        self._transfer.release()

    def _commit_whole(self) -> None:
        try:
            self._transfer.commit()
        except ImgsvcError as error:
            self._transfer.abort(error)
            raise

    def _end(self, reason: ImgsvcError) -> None:
        self._ended = reason
        self.upload.request = None
        self._transfer.pause()


def _clock() -> float:
    """Seconds since the machine was booted, which nobody sets, and which go on while it sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
