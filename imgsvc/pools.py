"""Bounded pools of threads: the only way from the event loop to a store."""

from __future__ import annotations

import asyncio
import contextvars
import functools
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

    With `patience`, in seconds, work that has waited so long for a thread is given up: when a store hangs, those who
    queue behind it are told, whether a thread becomes free or not. With `limit`, in seconds, what waits for a store
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
        work = self._executor.submit(context.run, functools.partial(function, *args, **kwargs))
        result = asyncio.wrap_future(work)
        if self._patience < math.inf:
            done, _ = await asyncio.wait({result}, timeout=self._patience)
            if not done and work.cancel():  # which works only for what has not begun
                raise Unavailable("the service is busy, or waits for a store that does not answer")
        return await result

    def close(self) -> None:
        """Returns when what is running has ended; what waits is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)
