"""Pending images are fetched, a bounded number at a time, and none is forgotten."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from imgsvc.errors import Stopping, Unavailable
from imgsvc.metadata.image import Image, Status
from tests.flaky import FULL, LOST, Fault
from tests.images.helpers import content
from tests.rooms import DiskPlace, Place, Rooms, wait_until
from tests.source import Resource, Source

BODY = bytes(range(256)) * 5000


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """One kind of stores is enough here: a fetch is the same with all."""
    with closing(DiskPlace(tmp_path)) as place:
        yield place


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as source:
        yield source


@pytest.fixture
def start() -> Iterator[Callable[..., Rooms]]:
    """Starts a service at a place, with so many fetch threads."""
    with ExitStack() as running:

        def started(rooms: Rooms, concurrency: int = 1, retries: int = 0) -> Rooms:
            rooms = Rooms(rooms.disk, rooms.base, concurrency=concurrency, stall_timeout=30.0, retries=retries)
            running.callback(rooms.close)
            rooms.start()
            return rooms

        yield started


@pytest.fixture
def running(rooms: Rooms, start: Callable[..., Rooms]) -> Rooms:
    return start(rooms)


def submit(rooms: Rooms, url: str) -> Image:
    image = rooms.queued(url)
    rooms.fetcher.submit(image.id)
    return image


def ended(rooms: Rooms, image: Image) -> Image:
    """The record once it is final, and nothing of the transfer is left."""
    wait_until(lambda: not rooms.base.get(image.id).in_transfer and not rooms.transfers.is_known(image.id))
    return rooms.base.get(image.id)


class TestFetch:
    @pytest.mark.parametrize("body", [b"", b"x", BODY], ids=len)
    def test_whole(self, running: Rooms, source: Source, body: bytes) -> None:
        """What the source has is stored, to the bit."""
        image = submit(running, source.serve("/image", body))
        fetched = ended(running, image)
        assert (fetched.status, fetched.size, fetched.expected_size) == (Status.COMPLETE, len(body), len(body))
        assert content(running.disk, image.id) == body
        running.check_settled()

    @pytest.mark.parametrize(
        ("resource", "reason"),
        [
            (Resource(status=404), "404"),
            (Resource(BODY, announce=len(BODY) + 1), "only"),
            (Resource(BODY, announce=len(BODY) - 1), "more"),
            (Resource(BODY, chunked=True, cut_after=70_000), "could not be fetched"),
            (Resource(garbage=b"HTTP/1.1 200 OK\r\n"), "headers"),
            (Resource.redirect("http://["), "redirected"),
        ],
    )
    def test_not_whole(self, running: Rooms, source: Source, resource: Resource, reason: str) -> None:
        """What is wrong with the source is the record's error, and nothing of it is kept."""
        image = submit(running, source.serve("/image", resource))
        assert reason in ended(running, image).error
        running.check_settled()

    def test_larger_than_allowed(self, rooms: Rooms, source: Source) -> None:
        """What the source announces is enough to refuse it: its body is not waited for."""
        limited = Rooms(rooms.disk, rooms.base, stall_timeout=30.0, max_image_size=len(BODY) - 1)
        with closing(limited):
            limited.start()
            image = submit(limited, source.serve("/image", Resource(BODY, stall_after=0)))
            assert "at most" in ended(limited, image).error
        limited.check_settled()

    def test_a_slow_source_shows_its_progress(self, running: Rooms, source: Source) -> None:
        """Bytes are written before they make a block."""
        image = submit(running, source.serve("/image", Resource(BODY, stall_after=1000)))
        wait_until(lambda: running.base.get(image.id).size == 1000, 2.0)
        running.service.delete(image.id)

    @pytest.mark.parametrize("resource", [Resource(BODY, hold=True), Resource(BODY, stall_after=1000)])
    def test_deleted(self, running: Rooms, source: Source, resource: Resource) -> None:
        """It ends within a second or so, whatever the source does."""
        image = submit(running, source.serve("/image", resource))
        exchange = source.wait_asked("/image")
        running.service.delete(image.id)
        assert exchange.closed.wait(2.0)
        wait_until(lambda: not running.transfers.is_known(image.id))
        assert running.listed() == {}
        running.check_settled()

    def test_deleted_before_its_turn(self, rooms: Rooms, source: Source, start: Callable[..., Rooms]) -> None:
        """The source is not asked for what nobody wants any more."""
        url = source.serve("/image", BODY)
        one, other = rooms.queued(url), rooms.queued(source.serve("/other", BODY))
        rooms.base.delete(one.id)
        running = start(rooms)
        for image in (one, other):
            running.fetcher.submit(image.id)
        ended(running, other)
        assert source.asked("/image") == []
        running.check_settled()

    @pytest.mark.parametrize("end", [lambda i: i.failed("before"), lambda i: i.completed(0, "ab")])
    def test_what_is_not_pending_is_not_fetched(
        self, rooms: Rooms, source: Source, start: Callable[..., Rooms], end: Callable[[Image], Image]
    ) -> None:
        """An image that has come to its end while it was queued stays as it is."""
        final = rooms.base.update(end(rooms.queued(source.serve("/image", BODY))))
        running = start(rooms)
        running.fetcher.submit(final.id)
        ended(running, submit(running, source.serve("/other", BODY)))
        assert running.base.get(final.id) == final
        assert source.asked("/image") == []


class TestConcurrency:
    def test_the_others_wait(self, rooms: Rooms, source: Source, start: Callable[..., Rooms]) -> None:
        """As many as the settings say are fetched at once; the next is pending until one has ended, in order."""
        running = start(rooms, 3)
        held = [Resource(BODY, hold=True) for _ in range(5)]
        images = [submit(running, source.serve(f"/{number}", resource)) for number, resource in enumerate(held)]
        for number in range(3):
            source.wait_asked(f"/{number}")
        time.sleep(0.2)
        assert len(source.exchanges) == 3
        assert {running.base.get(image.id).status for image in images[3:]} == {Status.PENDING}
        held[1].begin()
        source.wait_asked("/3")
        assert source.asked("/4") == []
        for resource in held:
            resource.begin()
        assert {ended(running, image).status for image in images} == {Status.COMPLETE}
        assert len(source.exchanges) == 5


class TestTrouble:
    def test_a_mistake_of_ours(self, running: Rooms, source: Source) -> None:
        """It ends in error with words that are fit for a client, and the thread goes on with the next."""
        running.faults.next("write", Fault(ZeroDivisionError("a mistake of ours")))
        with capture_logs() as logs:
            image = submit(running, source.serve("/image", BODY))
            assert "of our own" in ended(running, image).error
            wait_until(lambda: any(line["log_level"] == "error" for line in logs))
        running.check_settled()
        assert ended(running, submit(running, source.serve("/other", BODY))).status is Status.COMPLETE

    def test_a_mistake_of_ours_before_the_fetch(self, running: Rooms, source: Source) -> None:
        """The thread goes on then, too."""
        running.faults.next("get", Fault(ZeroDivisionError("a mistake of ours")))
        with capture_logs():
            submit(running, source.serve("/image", BODY))
            assert ended(running, submit(running, source.serve("/other", BODY))).status is Status.COMPLETE

    def test_a_record_that_cannot_be_read(
        self, rooms: Rooms, source: Source, start: Callable[..., Rooms], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It does not keep the one thread from the images behind it."""
        monkeypatch.setattr("imgsvc.fetcher._RETRY_INTERVAL", 0.05)
        spoilt = rooms.queued("http://source.example/spoilt")
        get = rooms.base.get

        def spoilt_get(image_id: str) -> Image:
            if image_id == spoilt.id:
                raise Unavailable("the record of this image cannot be read")
            return get(image_id)

        rooms.base.get = spoilt_get  # type: ignore[method-assign]  # as a store does for what somebody has spoilt
        running = start(rooms)
        running.fetcher.submit(spoilt.id)
        image = submit(running, source.serve("/image", BODY))
        assert ended(running, image).status is Status.COMPLETE

    @pytest.mark.parametrize("fault", [LOST, FULL], ids=["lost", "full"])
    @pytest.mark.parametrize("call", ["delete", "writer", "space", "write", "commit"])
    def test_a_disk_that_fails(self, running: Rooms, source: Source, call: str, fault: Fault) -> None:
        """The record says why, and nothing is left."""
        running.faults.next(call, fault)
        image = submit(running, source.serve("/image", BODY))
        assert ended(running, image).error == str(fault.error)
        running.check_settled()

    def test_an_outage_before_its_turn(self, running: Rooms, source: Source) -> None:
        """It waits for the records to come back, and is fetched then."""
        running.faults.next("get", LOST)
        image = submit(running, source.serve("/image", BODY))
        assert ended(running, image).status is Status.COMPLETE

    def test_an_outage_during_the_fetch(self, running: Rooms, source: Source) -> None:
        """The bytes come in all the same, and the record follows; the source is asked once."""
        resource = Resource(BODY, hold=True)
        image = submit(running, source.serve("/image", resource))
        source.wait_asked("/image")
        running.faults.always("get", "update", "create", "delete")
        resource.begin()
        wait_until(lambda: image.id in set(running.disk.ids()))
        running.faults.heal()
        assert ended(running, image).status is Status.COMPLETE
        assert len(source.asked("/image")) == 1
        running.check_settled()


class TestClosing:
    def test_it_is_quick_and_leaves_them_to_the_next_start(
        self, place: Place, rooms: Rooms, source: Source, start: Callable[..., Rooms]
    ) -> None:
        """Those that run and those that wait are pending, claimed and without bytes; the next start fetches them."""
        running = start(rooms, 2)
        resources = [Resource(BODY, hold=True), Resource(BODY, stall_after=200_000), Resource(BODY)]
        images = [submit(running, source.serve(f"/{number}", resource)) for number, resource in enumerate(resources)]
        source.wait_asked("/0")
        wait_until(lambda: running.base.get(images[1].id).size > 0)
        began = time.monotonic()
        running.fetcher.close()
        assert time.monotonic() - began < 2.0
        for image in images:
            left = running.base.get(image.id)
            assert (left.status, left.size, left.error) == (Status.PENDING, 0, "")
        assert running.claims() == {image.id for image in images}
        assert list(running.disk.ids()) == []
        assert source.asked("/2") == []
        for resource in resources:
            resource.begin()
            resource.resume()
        after = place.open()
        after.maintenance.start_sweep()
        with closing(after):
            after.start()
            for image in images:
                assert ended(after, image).status is Status.COMPLETE
        after.check_settled()

    @pytest.mark.parametrize("gap", [("note", 2), ("close", 1), ("writer", 2)], ids=lambda gap: gap[0])
    def test_while_it_waits_for_its_source(
        self, place: Place, rooms: Rooms, source: Source, start: Callable[..., Rooms], gap: tuple[str, int]
    ) -> None:
        """As its source breaks off, or as it is asked again: the next start goes on behind what came."""
        running = start(rooms, retries=5)
        fetcher = running.fetcher
        closing_it = threading.Thread(target=fetcher.close)

        def close() -> None:
            (fetch,) = fetcher._running
            closing_it.start()
            wait_until(lambda: fetch.transfer.cancelled is not None)

        running.faults.at(*gap, close)
        good = Resource(BODY, etag='"one"')
        broken = Resource(BODY, etag='"one"', cut_after=300_000)
        image = submit(running, source.serve("/image", lambda asked: good if asked.number else broken))
        wait_until(lambda: closing_it.ident is not None)
        closing_it.join()
        assert running.base.get(image.id).in_transfer
        after = place.open()
        after.maintenance.start_sweep()
        with closing(after):
            after.start()
            assert ended(after, image).status is Status.COMPLETE
        assert source.asked("/image")[-1].first >= 200_000
        assert content(after.disk, image.id) == BODY
        after.check_settled()

    def test_seen_first_by_who_ends_what_was_cancelled(
        self, rooms: Rooms, source: Source, start: Callable[..., Rooms]
    ) -> None:
        """A fetch that waits for its source is left for the next start also by that thread."""
        running = start(rooms, retries=5)
        image = submit(running, source.serve("/image", Resource(status=503, headers={"Retry-After": "60"})))
        wait_until(lambda: any(turn.fetch is not None for *_, turn in running.fetcher._turns._waiting))
        running.transfers._running[image.id].cancelled = Stopping("the service is stopping")
        wait_until(lambda: not running.transfers.is_known(image.id))
        assert running.base.get(image.id).status is Status.PENDING

    def test_while_the_records_are_away(self, running: Rooms, source: Source) -> None:
        """A thread that waits for the metadata store does not hold up the end."""
        running.faults.always("get", "update")
        submit(running, source.serve("/image", BODY))
        wait_until(lambda: "get" in running.faults.calls)
        began = time.monotonic()
        running.fetcher.close()
        assert time.monotonic() - began < 0.5
        assert source.exchanges == []

    def test_twice_and_unstarted(self, rooms: Rooms) -> None:
        """Neither is a mistake."""
        rooms.fetcher.close()
        rooms.fetcher.close()

    def test_no_thread_is_left(self, running: Rooms) -> None:
        """Each has ended when it returns."""
        running.fetcher.close()
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch-")] == []
