"""Bounded pools of threads: what they promise to callers, also in front of a store that hangs."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

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


REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("REQUEST")


def test_what_the_function_gives() -> None:
    """Its result, or its error as it is, from another thread that sees the caller's context variables."""

    async def asked() -> None:
        REQUEST.set("of the caller")
        assert await pool.run(lambda: (REQUEST.get(), threading.current_thread() is threading.main_thread())) == (
            "of the caller",
            False,
        )
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 // 0)

    with closing(Pool("test", 1)) as pool:
        asyncio.run(asked())


def test_no_more_threads_than_its_size() -> None:
    """The others wait, and each gets its turn."""
    running: set[int] = set()
    most = 0

    def work(number: int) -> int:
        nonlocal most
        running.add(number)
        most = max(most, len(running))
        time.sleep(0.02)
        running.discard(number)
        return number

    async def asked() -> list[int]:
        return await asyncio.gather(*(pool.run(work, number) for number in range(12)))

    with closing(Pool("test", 3)) as pool:
        assert asyncio.run(asked()) == list(range(12))
    assert most == 3


def test_patience() -> None:
    """Who waited too long for a thread is told so, all of them together, and nothing of theirs is begun; who comes
    later is served."""
    begun: list[str] = []
    hang = threading.Event()

    async def asked() -> float:
        hanging = asyncio.create_task(pool.run(hang.wait))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(pool.run(begun.append, "late")) for _ in range(5)]
        await asyncio.sleep(0.3)
        hang.set()
        freed = time.monotonic()
        for each in waiting:
            with pytest.raises(Unavailable, match="busy"):
                await each
        told = time.monotonic() - freed
        await hanging
        await pool.run(begun.append, "in time")
        return told

    with closing(Pool("test", 1, patience=0.2)) as pool:
        assert asyncio.run(asked()) < 0.1
    assert begun == ["in time"]


def test_a_caller_that_leaves() -> None:
    """What was begun for it goes on to its end: no write is cut in half."""
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        time.sleep(0.1)
        ended.set()

    async def asked() -> None:
        task = asyncio.create_task(pool.run(work))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    with closing(Pool("test", 1)) as pool:
        asyncio.run(asked())
    assert ended.is_set()


def test_closing() -> None:
    """It waits for what runs, and begins nothing more."""
    done: list[str] = []

    def work(name: str) -> None:
        time.sleep(0.1)
        done.append(name)

    async def asked() -> None:
        first = asyncio.create_task(pool.run(work, "first"))
        second = asyncio.create_task(pool.run(work, "second"))
        await asyncio.sleep(0.05)
        pool.close()
        assert done == ["first"]
        await first
        with pytest.raises(asyncio.CancelledError):
            await second

    pool = Pool("test", 1)
    asyncio.run(asked())
    assert done == ["first"]


async def hung_threads(pool: Pool, free: threading.Event, waiting: int) -> list[BaseException | int]:
    """What becomes of so many calls, asked for while the pool's threads hang."""
    hanging = [asyncio.ensure_future(pool.run(free.wait)) for _ in range(2)]
    await asyncio.sleep(0.05)
    try:
        async with asyncio.timeout(3):
            return await asyncio.gather(*(pool.run(int, "7") for _ in range(waiting)), return_exceptions=True)
    finally:
        free.set()
        await asyncio.gather(*hanging)


def test_who_queues_behind_threads_that_hang_is_told() -> None:
    """Although no thread ever becomes free; and nothing of it is done later."""
    with closing(Pool("hung", 2, patience=0.2)) as pool:
        outcomes = asyncio.run(hung_threads(pool, threading.Event(), 5))
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 5
