"""The requests that are being answered, for a shutdown that waits for them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol


class Request(Protocol):
    async def stop(self) -> None:
        """Ends the request early, leaving nothing half behind."""


class InFlight:
    """Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._requests: set[Request] = set()
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        self._requests.add(request)
        self._none.clear()

    def discard(self, request: Request) -> None:
        self._requests.discard(request)
        if not self._requests:
            self._none.set()

    async def drain(self, seconds: float) -> None:
        """Gives the requests so many seconds to end, and then stops those that have not."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._none.wait(), seconds)
        await asyncio.gather(*(request.stop() for request in list(self._requests)))
