"""All transfers of a member: how they begin, what is reported of them, and how others end them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from imgsvc import transfer as transfer_module
from imgsvc.errors import Conflict, ImgsvcError, Incomplete, NoSpace, TooLarge, Unavailable
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import UNKNOWN_SIZE, Status, new_id
from imgsvc.metadata.memory import MemoryMetadataStore
from imgsvc.metadata.store import Member
from imgsvc.transfer import Kind, Transfer
from tests.flaky import FULL, LOST, UNKNOWN, Fault
from tests.images.helpers import content, put
from tests.rooms import SITE, DiskPlace, Place, Rooms, feed_and_finish, report_now, wait_until

GONE = Incomplete("the sender went away")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """One kind of stores is enough here."""
    with closing(DiskPlace(tmp_path)) as place:
        yield place


class TestReport:
    def test_the_first_bytes_at_once(self, rooms: Rooms) -> None:
        """The record shows them well within a second, without anybody asking for it."""
        transfer = rooms.upload()
        rooms.transfers.start()
        try:
            transfer.feed(b"bytes")
            wait_until(lambda: rooms.base.get(transfer.image.id).size > 0, 0.9)
        finally:
            transfer.abort(GONE)
            rooms.transfers.close()
        assert rooms.base.get(transfer.image.id).size == 0

    def test_once_an_interval(self, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
        """However often bytes come and reports are asked for, the record is written once a second (here: 0.3)."""
        assert transfer_module.REPORT_INTERVAL == 1.0
        monkeypatch.setattr(transfer_module, "REPORT_INTERVAL", 0.3)
        began = time.monotonic()
        transfer = rooms.upload()
        until = time.monotonic() + transfer_module.FIRST_REPORT + 2.5 * transfer_module.REPORT_INTERVAL
        while time.monotonic() < until:
            transfer.feed(b"more")
            transfer.report()
            time.sleep(0.02)
        writes = rooms.faults.calls.count("update")
        most = 1 + (time.monotonic() - began - transfer_module.FIRST_REPORT) / transfer_module.REPORT_INTERVAL
        assert 2 <= writes <= most
        assert 0 < rooms.base.get(transfer.image.id).size < transfer.size

    def test_nothing_new_is_not_written(self, rooms: Rooms) -> None:
        """A sender that pauses costs the store no write, only the question whether the record is still there."""
        transfer = rooms.upload()
        transfer.feed(b"bytes")
        report_now(transfer)
        report_now(transfer)
        assert rooms.faults.calls.count("update") == 1
        assert rooms.faults.calls.count("get") == 1

    @pytest.mark.parametrize("begin", [Rooms.upload, Rooms.fetch])
    def test_a_deleted_record_cancels(self, rooms: Rooms, begin: Callable[[Rooms], Transfer]) -> None:
        """Whoever deleted it, and whether or not bytes came: the transfer is told, and nothing of it stays."""
        transfer = begin(rooms)
        if transfer.kind is Kind.UPLOAD:
            transfer.feed(b"bytes")
        rooms.base.delete(transfer.image.id)
        report_now(transfer)
        assert isinstance(transfer.cancelled, Conflict)
        transfer.abort(transfer.cancelled)
        assert rooms.listed() == {}
        rooms.check_settled()

    def test_a_record_ended_by_somebody_else_cancels(self, rooms: Rooms) -> None:
        """Their word stays."""
        transfer = rooms.upload()
        transfer.feed(b"bytes")
        theirs = rooms.base.update(transfer.image.failed("by somebody else"))
        report_now(transfer)
        assert transfer.cancelled is not None
        transfer.abort(transfer.cancelled)
        assert rooms.base.get(transfer.image.id) == theirs
        rooms.check_settled()

    @pytest.mark.parametrize("fault", [LOST, UNKNOWN, FULL], ids=["lost", "unknown", "full"])
    def test_a_store_that_is_away_does_not_stop_the_bytes(self, rooms: Rooms, fault: Fault) -> None:
        """A report that fails is the reporter's concern; the next one catches up, and so does the end."""
        transfer = rooms.upload()
        transfer.feed(b"bytes")
        rooms.faults.next("update", fault)
        with pytest.raises(type(fault.error)):
            report_now(transfer)
        transfer.feed(b"more")
        report_now(transfer)
        assert rooms.base.get(transfer.image.id).size == 9
        assert transfer.finish().size == 9
        rooms.check_settled()

    def test_nothing_is_reported_after_the_end(self, rooms: Rooms) -> None:
        """A late reporter changes nothing and asks nothing."""
        transfer = rooms.upload()
        transfer.feed(b"bytes")
        image = transfer.finish()
        calls = list(rooms.faults.calls)
        report_now(transfer)
        assert rooms.faults.calls == calls
        assert rooms.base.get(image.id) == image


class TestAdmission:
    @pytest.fixture
    def small(self) -> Rooms:
        """Room for 1,000 bytes, of which 100 stay free; an image has at most 700."""
        disk = MemoryImageStore(capacity=1_000)
        base = MemoryMetadataStore(Member(disk.member, SITE, ""))
        disk.mark(base.identity)
        return Rooms(disk, base, max_image_size=700, reserve=lambda total: total // 10)

    @pytest.mark.parametrize(
        ("running", "sent", "wanted", "refusal"),
        [
            (0, 0, 600, None),
            (0, 0, 601, NoSpace),
            (0, 0, 700, NoSpace),
            (0, 0, 701, TooLarge),
            (400, 0, 200, None),
            (400, 0, 201, NoSpace),
            (400, 100, 200, None),
            (400, 100, 201, NoSpace),
            (UNKNOWN_SIZE, 100, 500, None),
            (UNKNOWN_SIZE, 100, 501, NoSpace),
            (600, 0, UNKNOWN_SIZE, None),
            (600, 0, 0, None),
        ],
    )
    def test_space_that_was_promised_is_taken(
        self, small: Rooms, running: int, sent: int, wanted: int, refusal: type[ImgsvcError] | None
    ) -> None:
        """What a running transfer announced counts as used, once; the reserve and the size limit hold."""
        put(small.disk, new_id(), bytes(300))
        small.upload(running).feed(bytes(sent))
        if refusal is None:
            small.upload(wanted)
            return
        with pytest.raises(refusal):
            small.upload(wanted)
        assert len(small.listed()) == len(small.claims()) == 1

    def test_the_reserve_is_nobodys(self, small: Rooms) -> None:
        """With less than the reserve free, not even a sender that does not announce may begin."""
        for size in (600, 301):
            put(small.disk, new_id(), bytes(size))
        with pytest.raises(NoSpace):
            small.upload()

    def test_the_reserve_holds_while_bytes_come(self, small: Rooms) -> None:
        """A sender that did not announce ends at the reserve, although the disk would take more."""
        put(small.disk, new_id(), bytes(500))
        transfer = small.upload()
        transfer.feed(bytes(400))
        with pytest.raises(NoSpace):
            transfer.feed(b"!")
        assert small.disk.space().free == 100

    def test_a_transfer_that_ended_takes_no_space(self, small: Rooms) -> None:
        """What it announced and never sent can be promised to the next."""
        small.upload(700).abort(GONE)
        small.upload(700)

    def test_a_disk_that_does_not_tell_takes_nothing(self, small: Rooms) -> None:
        """Without knowing the space there is no transfer."""
        small.faults.always("space")
        with pytest.raises(Unavailable):
            small.upload()
        assert small.listed() == {}


class TestList:
    def test_known_until_settled(self, rooms: Rooms) -> None:
        """An image is known while it runs, and while its record waits for the store."""
        transfer = rooms.upload()
        assert rooms.transfers.is_known(transfer.image.id)
        rooms.faults.always("update", "get")
        transfer.abort(GONE)
        assert rooms.transfers.is_known(transfer.image.id)
        rooms.faults.heal()
        rooms.settlements.retry()
        assert not rooms.transfers.is_known(transfer.image.id)

    def test_cancel_reaches_the_transfer_of_that_image(self, rooms: Rooms) -> None:
        """No other, and nobody minds an image that is not being transferred."""
        one, other = rooms.upload(), rooms.upload()
        rooms.transfers.cancel(one.image.id, Conflict("deleted"))
        rooms.transfers.cancel(new_id(), Conflict("deleted"))
        assert one.cancelled is not None
        assert other.cancelled is None

    def test_a_fetch_drops_what_a_failed_one_left(self, rooms: Rooms) -> None:
        """The Go program left bytes of images in error under their final name; they make way for the new ones."""
        image = rooms.queued()
        put(rooms.disk, image.id, b"rubbish")
        rooms.disk.claim(image.id)
        transfer = rooms.transfers.fetch(image)
        transfer.start(5)
        feed_and_finish(transfer)
        assert content(rooms.disk, image.id) == b"bytes"
        rooms.check_settled()


class TestThread:
    @pytest.fixture
    def running(self, rooms: Rooms) -> Iterator[Rooms]:
        rooms.transfers.start()
        yield rooms
        rooms.transfers.close()

    def test_it_outlives_an_outage(self, running: Rooms) -> None:
        """What could not be recorded during an outage, ends and progress, is recorded soon after it."""
        running.faults.always("update", "get")
        ended, going = running.upload(), running.upload()
        ended.abort(GONE)
        going.feed(b"bytes")
        time.sleep(0.6)
        assert running.claims() == {ended.image.id, going.image.id}
        running.faults.heal()
        wait_until(lambda: not running.base.get(ended.image.id).in_transfer, 2.0)
        wait_until(lambda: running.base.get(going.image.id).size > 0, 2.0)
        assert going.finish().status is Status.COMPLETE
        running.check_settled()

    def test_it_outlives_a_mistake_of_ours(self, running: Rooms) -> None:
        """It is logged, and the records that follow are kept true all the same."""
        running.faults.next("update", Fault(ZeroDivisionError("a mistake of ours")))
        transfer = running.upload()
        with capture_logs() as logs:
            transfer.feed(b"bytes")
            wait_until(lambda: running.base.get(transfer.image.id).size > 0)
        transfer.abort(GONE)
        assert [line["event"] for line in logs if line["log_level"] == "error"] == ["records not kept true"]

    def test_closing_tries_once_more(self, rooms: Rooms) -> None:
        """Also when the thread was never started."""
        transfer = rooms.upload()
        rooms.faults.next("update", LOST)
        transfer.abort(GONE)
        rooms.transfers.close()
        rooms.check_settled()
