"""One request body on its way into a transfer, without the event loop ever waiting for the disk."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from imgsvc.blocks import PATIENCE, Blocks
from imgsvc.errors import ImgsvcError, Unavailable
from imgsvc.pools import Pool

# Seconds between two looks at whether a record has followed.
_LOOK = 0.05

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")


class Taker(Protocol[Result_co]):
    """Where the bytes go: a `Transfer`, or what stands before one."""

    @property
    def cancelled(self) -> ImgsvcError | None: ...

    def feed(self, block: bytes | bytearray | memoryview) -> None: ...

    def commit(self) -> None: ...

    def complete(self) -> Result_co: ...

    @property
    def unsettled(self) -> bool: ...

    def abort(self, reason: ImgsvcError) -> None: ...


class Upload(Generic[Result]):
    """While one block is written, the next is gathered; a sender that is faster than the disk is not read from.

    `give_up` is awaited, once, with what ends the upload while nobody is in `receive` or `finish` to be told: an image
    that was deleted, a disk that failed the last block of a sender that pauses.
    """

    def __init__(
        self,
        transfer: Taker[Result],
        disk: Pool,
        records: Pool,
        give_up: Callable[[Exception], Awaitable[None]],
        *,
        grace: float,
        resumable: bool = False,
        offset: int = 0,
    ) -> None:
        """What was gathered is written before an abort of one that is `resumable`, and begins at the `offset`. When the
        bytes are whole and the record's store does not answer, that is waited for, for `grace` seconds."""
        self._resumable = resumable
        self._transfer = transfer
        self._disk = disk
        self._records = records
        self._grace = grace
        self._aborted = False
        self._blocks = Blocks(offset)
        self._in_order = asyncio.Lock()
        self._writing: asyncio.Future[None] | None = None
        self._watch = asyncio.create_task(self._watch_transfer(give_up))

    async def receive(self, piece: bytes) -> None:
        """Takes the next bytes; returns when more may come. Raises what `Transfer.feed` does."""
        self._blocks.add(piece)
        if self._blocks.due():
            await self._write()

    async def finish(self) -> Result:
        """The body is whole. Returns and raises what `complete` does; also raises what `commit` does."""
        self._watch.cancel()
        while await self._write():
            pass
        await self._disk.run(self._transfer.commit)
        latest = time.monotonic() + self._grace
        while True:
            try:
                return await self._records.run(self._transfer.complete)
            except Unavailable:
                if not await self._settled_by(latest):
                    raise

    async def abort(self, reason: ImgsvcError) -> None:
        """Ends the upload, unless it has ended, as `Taker.abort` does."""
        self._aborted = True
        if asyncio.current_task() is not self._watch:
            self._watch.cancel()
        if self._resumable:
            await self._write_rest()
        await self._records.run(self._transfer.abort, reason)
        writing = self._writing  # which `finish` may await as well, and then forgets
        if writing is not None:
            await asyncio.wait({writing})
            writing.exception()  # the reason is known; this one came after it

    async def _settled_by(self, latest: float) -> bool:
        """Whether the record, which follows by itself, says by then what became of the image. Holds no thread."""
        while self._transfer.unsettled:
            if self._aborted or time.monotonic() >= latest:
                return False
            await asyncio.sleep(_LOOK)
        return True

    async def _write_rest(self) -> None:
        with contextlib.suppress(ImgsvcError):  # it is over anyway
            while await self._write():
                pass

    async def _write(self) -> bool:
        """Hands the gathered bytes to the disk as soon as it has taken those before; False when none were left."""
        async with self._in_order:
            if self._writing is not None:
                await asyncio.shield(self._writing)  # which goes on when only the watch is cancelled
                self._writing = None
            block = self._blocks.take()
            if block:
                self._writing = asyncio.ensure_future(self._disk.run(self._transfer.feed, block))
            return bool(block)

    def _has_failed(self) -> bool:
        """The last block of a sender that pauses."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    async def _watch_transfer(self, give_up: Callable[[Exception], Awaitable[None]]) -> None:
        try:
            while self._transfer.cancelled is None:
                await asyncio.sleep(PATIENCE)
                if self._blocks.due() or self._has_failed():
                    await self._write()
            await give_up(self._transfer.cancelled)
        except ImgsvcError as error:
            await give_up(error)
