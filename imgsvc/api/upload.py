"""One request body on its way into a transfer, without the event loop ever waiting for the disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from imgsvc.blocks import PATIENCE, Blocks
from imgsvc.errors import IdleTimeout, ImgsvcError
from imgsvc.metadata.image import Image
from imgsvc.pools import Pool
from imgsvc.transfer import Transfer


class Upload:
    """While one block is written, the next is gathered; a sender that is faster than the disk is not read from.

    `give_up` is awaited, once, with what ends the upload while nobody is in `receive` or `finish` to be told: a sender
    that is silent for `idle_timeout` seconds, a disk that fails a last block, an image that was deleted.
    """

    def __init__(
        self, transfer: Transfer, pool: Pool, idle_timeout: float, give_up: Callable[[ImgsvcError], Awaitable[None]]
    ) -> None:
        self._transfer = transfer
        self._pool = pool
        self._idle_timeout = idle_timeout
        self._blocks = Blocks()
        self._in_order = asyncio.Lock()
        self._writing: asyncio.Future[None] | None = None
        self._silent_since: float | None = time.monotonic()
        self._watch = asyncio.create_task(self._watch_sender(give_up))

    async def receive(self, piece: bytes) -> None:
        """Takes the next bytes; returns when more may come. Raises what `Transfer.feed` does."""
        self._silent_since = None
        self._blocks.add(piece)
        if self._blocks.due():
            await self._write()
        self._silent_since = time.monotonic()

    async def finish(self) -> Image:
        """The body is whole. Returns the complete image; raises what `Transfer.finish` does."""
        self._watch.cancel()
        while await self._write():
            pass
        return await self._pool.run(self._transfer.finish)

    async def abort(self, reason: ImgsvcError) -> None:
        """Ends the upload, unless it has ended: no bytes are kept, and the record gives the reason."""
        if asyncio.current_task() is not self._watch:
            self._watch.cancel()
        await self._pool.run(self._transfer.abort, reason)
        if self._writing is not None:
            await asyncio.wait({self._writing})
            self._writing.exception()  # the reason is known; this one came after it

    async def _write(self) -> bool:
        """Hands the gathered bytes to the disk as soon as it has taken those before; False when none were left."""
        async with self._in_order:
            if self._writing is not None:
                await self._writing
                self._writing = None
            block = self._blocks.take()
            if block:
                self._writing = asyncio.ensure_future(self._pool.run(self._transfer.feed, block))
            return bool(block)

    async def _watch_sender(self, give_up: Callable[[ImgsvcError], Awaitable[None]]) -> None:
        try:
            while True:
                await asyncio.sleep(min(PATIENCE, self._idle_timeout / 4))
                self._check_sender()
                if self._blocks.due():
                    await self._write()
        except ImgsvcError as error:
            await give_up(error)

    def _check_sender(self) -> None:
        if self._transfer.cancelled is not None:
            raise self._transfer.cancelled
        if self._silent_since is not None and time.monotonic() - self._silent_since > self._idle_timeout:
            raise IdleTimeout(f"nothing came for {self._idle_timeout:g} seconds, after {self._transfer.size} bytes")
