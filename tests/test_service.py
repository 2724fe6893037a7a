"""What can be done with images, above all where two things happen at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from structlog.testing import capture_logs

from imgsvc.errors import Conflict, FetchFailed, Invalid, NotFound, Unavailable
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from tests.flaky import FULL, LOST, UNKNOWN, Fault
from tests.left_behind import complete
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
    assert rooms.take_turns() == ([told.id] if told else [])


def test_a_known_source(rooms: Rooms) -> None:
    """It takes nothing on the disk to be answered with its image, which is what counts when there is nothing left."""
    first = fetch(rooms)
    rooms.faults.always("claim", "create", fault=FULL)
    assert fetch(rooms) == first
    rooms.faults.heal()
    assert rooms.claims() == {first.id}
    assert rooms.take_turns() == [first.id]


def test_a_source_that_others_take_meanwhile(rooms: Rooms) -> None:
    """Who looked for it in vain, and comes second, is answered with the image of the first, and leaves no claim."""
    made: list[Image] = []

    def first() -> None:
        rooms.faults.heal()
        made.append(fetch(rooms))

    rooms.faults.at("create", 1, first)
    assert [fetch(rooms)] == made
    assert rooms.claims() == {made[0].id}


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


class TestDrop:
    def test_a_running_transfer(self, rooms: Rooms) -> None:
        """Its owner is told to stop, and keeps the claim until it has."""
        transfer = rooms.upload()
        transfer.feed(b"some")
        rooms.base.delete(transfer.image.id)
        rooms.service.drop(transfer.image.id)
        assert rooms.claims() == {transfer.image.id}
        with pytest.raises(Conflict, match="deleted") as caught:
            transfer.feed(b"more")
        transfer.abort(caught.value)
        rooms.check_settled()

    def test_a_queued_fetch(self, rooms: Rooms) -> None:
        """Its claim goes at once."""
        image = rooms.queued()
        rooms.base.delete(image.id)
        rooms.service.drop(image.id)
        rooms.check_settled()

    def test_what_is_not_here(self, rooms: Rooms) -> None:
        """Nobody minds, however often it is asked."""
        for _ in range(2):
            rooms.service.drop(new_id())

    def test_a_disk_that_fails(self, rooms: Rooms) -> None:
        """The deletion holds all the same; the log says what is left for the next start."""
        image = complete(rooms)
        rooms.faults.always("delete", "unclaim")
        rooms.base.delete(image.id)
        with capture_logs() as logs:
            rooms.service.drop(image.id)
        assert [line["image"] for line in logs if line["log_level"] == "error"] == [image.id]
        rooms.faults.heal()
        rooms.maintenance.start_sweep()
        rooms.check_settled()


@pytest.mark.parametrize(
    "source",
    [
        "",
        "image",
        "/image",
        "//host/image",
        "file:///etc/passwd",
        "ftp://host/image",
        "http://",
        "http:///image",
        "http://:80/",
        "http://host:0/",
        "http://host:port/",
        "http://[::1/",
        "http://host/a b",
        "http://host/\n",
        " http://host/",
        "http://host/\x7f",
    ],
)
def test_what_is_no_source(rooms: Rooms, source: str) -> None:
    """Only an absolute http or https URL that names a host is fetched; of another nothing is kept."""
    with pytest.raises(Invalid):
        rooms.service.fetch(source, ImageType.KVM, "")
    assert rooms.listed() == {}
    rooms.check_settled()


@pytest.mark.parametrize("source", ["http://h", "https://user:pw@h:8443/a?b#c", "HTTP://[::1]:80/", "http://h/\xe9"])
def test_what_is_a_source(rooms: Rooms, source: str) -> None:
    """It is kept as it was given."""
    image = rooms.service.fetch(source, ImageType.KVM, "")
    assert rooms.base.get_by_source(source) == image
