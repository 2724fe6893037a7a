"""One image on its way from its source, however often that breaks off."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future

import structlog

from imgsvc.blocks import BLOCK, Blocks
from imgsvc.errors import FetchFailed, Interrupted, Unavailable
from imgsvc.images.store import ImageWriter
from imgsvc.intake import Origin
from imgsvc.settings import FetchSettings
from imgsvc.source import Source
from imgsvc.source_answer import Version
from imgsvc.throttle import Throttle
from imgsvc.transfer import Transfer
from imgsvc.transfers import Transfers

# Seconds before the first retry; each further one waits twice as long, until the longest wait.
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 30.0
# What a source may ask for in a Retry-After.
_LONGEST_ASKED = 3600.0
# Bytes that are handed to the disk's thread at a time. Each time two threads wait for the interpreter, and with 1 MiB a
# fast source waits for that more than for the disk.
_BLOCK = 8 * BLOCK
# Seconds between two looks at whether the transfer was cancelled.
_LOOK = 0.25

log = structlog.get_logger()


class Fetch:
    """For one thread at a time. The image is claimed, and its `transfer` was begun."""

    def __init__(
        self,
        transfer: Transfer,
        transfers: Transfers,
        settings: FetchSettings,
        *,
        throttle: Throttle,
        disk: Executor,
        reopen: Callable[[], ImageWriter],
    ) -> None:
        """Blocks go to the transfer in a thread of `disk`, so that the source is read meanwhile. `reopen` gives another
        writer that keeps what is there."""
        self.transfer = transfer
        self._reopen = reopen
        self._settings = settings
        self._sink = _Sink(transfer, transfers, throttle, disk)
        self._source: Source | None = None
        # How far it ever came, be it of another version, and the retries since: a source that has a new version for
        # each try would never end.
        self._furthest = 0
        self._retries = 0

    def go_on(self) -> float | None:
        """Reads the source to its end, and finishes the transfer: then the result is None. When the source breaks off,
        it is the seconds to wait before this is to be called again.

        Raises FetchFailed when the source is of no use, or broke off again and again without a byte of progress; or
        what the transfer raises.
        """
        try:
            self._go_on()
            source = self._source = self._source or self._found()
            source.read(self.transfer.size)
        except Interrupted as error:
            self._sink.flush()
            wait = self._wait_after(error)
            # It may be one of many that wait long, and keeps neither its file open nor its buffers.
            self.transfer.pause()
            return wait
        self._sink.flush()
        self.transfer.finish()
        return None

    def _go_on(self) -> None:
        """Raises Interrupted when it cannot be now."""
        if self.transfer.paused:
            try:
                self.transfer.go_on(self._reopen)
            except Unavailable as error:
                raise Interrupted(str(error)) from error

    def _found(self) -> Source:
        """The source, as far as an earlier run of the service came with it."""
        origin = self.transfer.recover()
        version = None if origin is None else _version(origin)
        self._furthest = self.transfer.size
        if self.transfer.size:
            log.info("fetch goes on", image=self.transfer.image.id, bytes=self.transfer.size)
        return Source(self.transfer.image.source, self._settings, self._sink, version)

    def _wait_after(self, error: Interrupted) -> float:
        if self.transfer.size > self._furthest:
            self._furthest = self.transfer.size
            self._retries = 0
        if self._retries == self._settings.retries:
            in_vain = f"; {self._retries} retries brought no further byte" if self._retries else ""
            raise FetchFailed(f"{error}{in_vain}") from error
        # Not all at once, when a source that many fetch from has gone.
        wait = min(_FIRST_WAIT * 2.0**self._retries, _LONGEST_WAIT) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        if error.retry_after is not None:
            wait = max(wait, min(error.retry_after, _LONGEST_ASKED))
        self._retries += 1
        log.info("source broke off", image=self.transfer.image.id, reason=str(error), retry_in=round(wait, 1))
        return wait


class _Sink:
    """Hands what a source delivers to the transfer, in blocks: while one is written, the next is gathered."""

    def __init__(self, transfer: Transfer, transfers: Transfers, throttle: Throttle, disk: Executor) -> None:
        self._transfer = transfer
        self._transfers = transfers
        self._throttle = throttle
        self._disk = disk
        self._blocks = Blocks(0, _BLOCK)
        self._delivered = 0
        self._writing: Future[None] | None = None

    def begin(self, version: Version, offset: int) -> None:
        if offset:
            self.flush()
        else:
            self._wait_for_disk()
            self._transfer.restart(_origin(version) if version.etag else None)
        self._blocks = Blocks(offset, _BLOCK)
        self._delivered = offset
        self._transfers.admit(version.length, self._transfer)
        self._transfer.start(version.length)

    def pace(self, size: int) -> None:
        wait = self._throttle.take(size)
        latest = time.monotonic() + wait
        while wait > 0:
            time.sleep(min(wait, _LOOK))
            self._look()
            wait = latest - time.monotonic()

    def piece(self, data: bytes) -> None:
        self._delivered += len(data)
        self._transfers.check_size(self._delivered)  # the next block is far
        self._blocks.add(data)
        while self._blocks.due():
            self._write()

    def tick(self) -> None:
        self._look()
        if self._blocks.due():
            self._write()

    def flush(self) -> None:
        """All that was delivered has gone to the transfer when this returns, unless it raises what the transfer did."""
        while self._write():
            pass
        self._blocks = Blocks(self._transfer.size, _BLOCK)

    def _write(self) -> bool:
        """The next block, as soon as the disk has taken the one before; False when there was none."""
        self._wait_for_disk()
        block = self._blocks.take()
        if block:
            self._writing = self._disk.submit(self._transfer.feed, block)
        return bool(block)

    def _wait_for_disk(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _look(self) -> None:
        if self._transfer.cancelled is not None:
            raise self._transfer.cancelled


def _origin(version: Version) -> Origin:
    return dataclasses.asdict(version)


def _version(origin: Origin) -> Version | None:
    match origin:
        case {"url": str(url), "etag": str(etag), "length": int(length)}:
            return Version(url, etag, length)
    return None
