"""Bounded pools of threads: the only way from the event loop to a store."""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from imgsvc.deadline import set_deadline
from imgsvc.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")


class Pool:
    """`size` threads for one kind of work, so that no kind can starve another.

    With `patience`, in seconds, work that had to wait longer for a thread is not begun: when a store hangs, those who
    queue behind it are told at once, and not each after the other. With `limit`, in seconds, what waits for a store
    that may hang gives up by then, counted from when it was asked for.
    """

    def __init__(self, name: str, size: int, patience: float = math.inf, limit: float = math.inf) -> None:
        self._patience = patience
        self._limit = limit
        self._executor = ThreadPoolExecutor(size, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function` returns or raises, from a thread; it sees the caller's context variables, so its log lines
        carry the request id. A cancelled caller does not stop the function. Raises Unavailable when patience ran out.
        """
        context = contextvars.copy_context()
        now = time.monotonic()
        context.run(set_deadline, now + self._limit)
        latest = now + self._patience

        def call() -> T:
            if time.monotonic() > latest:
                raise Unavailable("the service is busy, or waits for a store that does not answer")
            return context.run(function, *args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def close(self) -> None:
        """Returns when what is running has ended; what waits is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)
