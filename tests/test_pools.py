"""Bounded pools of threads, in front of a store that hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from imgsvc.errors import Unavailable
from imgsvc.etcd import Etcd
from imgsvc.pools import Pool

LIMIT = 1.0


@pytest.fixture
def silent() -> Iterator[Etcd]:
    """An etcd that is not there, and a connection that is patient."""
    with closing(Etcd(["http://127.0.0.1:9"], timeout=30)) as etcd:
        yield etcd


def seconds_of(pool: Pool, etcd: Etcd, callers: int, calls: int) -> list[float]:
    """What each of so many callers waits that are there at once, and make so many calls in a row."""

    def call_on() -> None:
        for _ in range(calls):
            with pytest.raises(Unavailable):
                etcd.range("/key")

    async def timed() -> float:
        began = time.monotonic()
        await pool.run(call_on)
        return time.monotonic() - began

    async def all_of_them() -> list[float]:
        return await asyncio.gather(*(timed() for _ in range(callers)))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(("callers", "calls"), [(1, 1), (1, 3), (8, 1)])
def test_the_limit_holds_for_all_that_is_done_for_a_caller(silent: Etcd, callers: int, calls: int) -> None:
    """Nobody waits for much longer than the limit, in line or with several calls."""
    with closing(Pool("test", 2, limit=LIMIT)) as pool:
        waited = seconds_of(pool, silent, callers, calls)
    assert min(waited) > 0.9 * LIMIT
    assert max(waited) < LIMIT + 1


def test_the_limit_of_one_is_not_that_of_the_next(silent: Etcd) -> None:
    """A thread that did the work of one caller does not owe its haste to the next."""
    with closing(Pool("test", 1, limit=LIMIT)) as pool:
        first, second = (seconds_of(pool, silent, 1, 1) for _ in range(2))
    assert min(first + second) > 0.9 * LIMIT
