"""What can be done with images, where two things happen at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from structlog.testing import capture_logs

from imgsvc.errors import FetchFailed, NotFound, Unavailable
from imgsvc.metadata.image import Image, ImageType, Status
from tests.flaky import LOST, UNKNOWN, Fault
from tests.rooms import Rooms, wait_until


def test_a_deletion_that_meets_the_begin_of_a_fetch(rooms: Rooms) -> None:
    """It is no trouble that anybody should hear of, and the fetch ends without a trace."""
    image = rooms.queued()
    with capture_logs() as logged, closing(rooms.disk.writer(image.id)):
        rooms.service.delete(image.id)
    assert [line for line in logged if line["log_level"] == "error"] == []
    transfer = rooms.transfers.fetch(image)
    with pytest.raises(NotFound) as caught:
        transfer.start(5)
    transfer.abort(caught.value)
    assert rooms.listed() == {}
    assert rooms.claims() == set()


def fetch(rooms: Rooms) -> Image:
    return rooms.service.fetch("http://source.example/image", ImageType.KVM, "")


@pytest.mark.parametrize("fault", [UNKNOWN, LOST])
def test_a_create_whose_outcome_is_not_known(rooms: Rooms, fault: Fault) -> None:
    """Whoever is told of the image keeps it: it is fetched and not taken away again. One that was never stored leaves
    no trace."""
    rooms.faults.next("create", fault)
    with pytest.raises(Unavailable):
        fetch(rooms)
    told = fetch(rooms) if fault.applied else None
    rooms.settlements.retry()
    assert set(rooms.listed()) == rooms.claims() == ({told.id} if told else set())
    assert rooms.fetcher._queue.empty() is (told is None)


def test_a_source_in_the_last_moment_of_its_failing_fetch(rooms: Rooms) -> None:
    """The record says `error` before the transfer is over: who asks then is not answered with the dead record."""
    transfer = rooms.fetch()
    unclaim, over = rooms.disk.unclaim, threading.Event()

    def slow_unclaim(image_id: str) -> None:
        over.wait()
        unclaim(image_id)

    rooms.disk.unclaim = slow_unclaim  # type: ignore[method-assign]  # the one moment between record and end
    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(transfer.abort, FetchFailed("gone"))
        wait_until(lambda: rooms.listed()[transfer.image.id].status is Status.ERROR)
        asking = pool.submit(fetch, rooms)
        time.sleep(0.1)
        over.set()
        failing.result()
        assert asking.result().status is Status.PENDING
