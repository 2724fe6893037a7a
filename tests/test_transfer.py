"""What a transfer promises: whole images, true records, and nothing left of the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from psutil import Process

from imgsvc.errors import (
    Conflict,
    ImgsvcError,
    Incomplete,
    Invalid,
    NoSpace,
    NotFound,
    Stopping,
    TooLarge,
    Unavailable,
)
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import UNKNOWN_SIZE, ImageType, Status
from imgsvc.metadata.memory import MemoryMetadataStore
from imgsvc.metadata.store import Member
from imgsvc.transfer import Transfer
from tests.flaky import FULL, LOST, UNKNOWN, Fault
from tests.images.helpers import content
from tests.rooms import SITE, Rooms, feed_and_finish, report_now

GONE = Incomplete("the sender went away")


def check_error(rooms: Rooms, image_id: str, reason: str) -> None:
    """The record says why, nothing else is left, and the record can be deleted."""
    image = rooms.base.get(image_id)
    assert (image.status, image.error, image.size, image.sha256) == (Status.ERROR, reason, 0, "")
    assert image.download_end is not None
    assert not rooms.transfers.is_known(image_id)
    rooms.check_settled()


class TestWhole:
    @pytest.mark.parametrize("blocks", [[], [b"one"], [b"one", b"", b"two" * 100_000]])
    def test_size_and_digest(self, rooms: Rooms, blocks: list[bytes]) -> None:
        """A complete image has the bytes that were fed, and its record their number and digest."""
        body = b"".join(blocks)
        transfer = rooms.upload(len(body))
        for block in blocks:
            transfer.feed(block)
        image = transfer.finish()
        assert image == rooms.base.get(image.id)
        assert (image.status, image.size, image.expected_size) == (Status.COMPLETE, len(body), len(body))
        assert image.sha256 == hashlib.sha256(body).hexdigest()
        assert content(rooms.disk, image.id) == body
        assert (image.type, image.comment, image.error) == (ImageType.KVM, "of a test", "")
        rooms.check_settled()

    def test_without_a_length(self, rooms: Rooms) -> None:
        """A sender that does not announce may send any number of bytes; the record keeps saying that it did not."""
        transfer = rooms.upload()
        transfer.feed(bytes(70_000))
        image = transfer.finish()
        assert (image.size, image.expected_size) == (70_000, UNKNOWN_SIZE)

    def test_every_gap_leaves_a_trace(self, rooms: Rooms) -> None:
        """Before each step, what is on the disk and in the record lets the next start find this transfer."""
        gaps: dict[str, tuple[bool, bool, Status | None]] = {}

        def look(_number: int, call: str) -> None:
            status = next((image.status for image in rooms.listed().values()), None)
            gaps[call] = (bool(rooms.claims()), bool(list(rooms.disk.ids())), status)

        rooms.faults.plan = look
        transfer = rooms.upload()
        transfer.feed(b"bytes")
        transfer.finish()
        claimed, stored = (True, False), (False, True)
        assert gaps["create"] == (*claimed, None)
        assert gaps["write"] == (*claimed, Status.DOWNLOADING)
        assert gaps["commit"] == (*claimed, Status.DOWNLOADING)
        assert gaps["update"] == (*stored, Status.DOWNLOADING)

    def test_a_fetch_starts_when_its_source_answers(self, rooms: Rooms) -> None:
        """Until then it stays pending; then the record says since when, and how much is to come."""
        transfer = rooms.fetch()
        transfer.report()
        assert rooms.base.get(transfer.image.id).status is Status.PENDING
        transfer.start(5)
        started = rooms.base.get(transfer.image.id)
        assert (started.status, started.expected_size) == (Status.DOWNLOADING, 5)
        assert started.download_start is not None
        transfer.feed(b"bytes")
        assert transfer.finish().download_start == started.download_start
        rooms.check_settled()


class TestRefused:
    def test_too_little(self, rooms: Rooms) -> None:
        """An image that is shorter than announced is not kept."""
        transfer = rooms.upload(5)
        transfer.feed(b"byte")
        with pytest.raises(Incomplete) as caught:
            transfer.finish()
        transfer.abort(caught.value)
        check_error(rooms, transfer.image.id, "5 bytes were announced, and only 4 came")

    def test_too_much(self, rooms: Rooms) -> None:
        """The first byte beyond what was announced ends it, and is not written."""
        transfer = rooms.upload(5)
        transfer.feed(b"bytes")
        with pytest.raises(Incomplete) as caught:
            transfer.feed(b"!")
        assert transfer.size == 5
        transfer.abort(caught.value)
        check_error(rooms, transfer.image.id, "5 bytes were announced, and more were sent")

    def test_larger_than_allowed(self, rooms: Rooms) -> None:
        """The size limit holds for those who do not announce, too."""
        limited = Rooms(rooms.disk, rooms.base, max_image_size=5)
        transfer = limited.upload()
        transfer.feed(b"bytes")
        with pytest.raises(TooLarge) as caught:
            transfer.feed(b"!")
        transfer.abort(caught.value)
        check_error(limited, transfer.image.id, "an image may have at most 5 bytes")

    @pytest.mark.parametrize("fault", [FULL, LOST], ids=["full", "lost"])
    @pytest.mark.parametrize("step", ["write", "commit"])
    def test_a_disk_that_fails(self, rooms: Rooms, step: str, fault: Fault) -> None:
        """Whatever the disk says at whichever step becomes the reason; the space is given back."""
        transfer = rooms.upload()
        rooms.faults.next(step, fault)
        with pytest.raises(ImgsvcError) as caught:
            feed_and_finish(transfer)
        assert caught.value is fault.error
        transfer.abort(caught.value)
        check_error(rooms, transfer.image.id, str(fault.error))

    def test_a_store_that_is_full(self) -> None:
        """What a full store refuses ends the transfer before the record can lie."""
        disk = MemoryImageStore(capacity=100_000)
        rooms = Rooms(disk, MemoryMetadataStore(Member(disk.member, SITE, "")))
        disk.mark(rooms.base.identity)
        transfer = rooms.upload()
        transfer.feed(bytes(90_000))
        with pytest.raises(NoSpace) as caught:
            transfer.feed(bytes(20_000))
        transfer.abort(caught.value)
        rooms.check_settled()
        assert disk.space().free == 100_000

    @pytest.mark.parametrize("fault", [LOST, FULL, Fault(Conflict("taken"))], ids=["lost", "full", "taken"])
    def test_without_a_record_there_is_no_transfer(self, rooms: Rooms, fault: Fault) -> None:
        """When the record cannot be made, nothing is left of it once the stores answer."""
        rooms.faults.next("create", fault)
        with pytest.raises(type(fault.error)):
            rooms.upload()
        rooms.settlements.retry()
        assert rooms.listed() == {}
        rooms.check_settled()

    def test_without_a_writer_there_is_no_record(self, rooms: Rooms) -> None:
        """A disk that does not take the claim is found out before anything else happens."""
        rooms.faults.next("writer", LOST)
        with pytest.raises(Unavailable):
            rooms.upload()
        assert rooms.listed() == {}
        rooms.check_settled()

    def test_an_error_after_the_fact_is_settled(self, rooms: Rooms) -> None:
        """Text that no store takes is refused with nothing left."""
        with pytest.raises(Invalid):
            rooms.transfers.upload(ImageType.KVM, "\ud800", 0)
        rooms.settlements.retry()
        rooms.check_settled()


class TestEnds:
    def test_abort_twice(self, rooms: Rooms) -> None:
        """The first reason stays."""
        transfer = rooms.upload()
        transfer.feed(b"bytes")
        transfer.abort(GONE)
        transfer.abort(Incomplete("another reason"))
        check_error(rooms, transfer.image.id, str(GONE))

    def test_abort_after_finish(self, rooms: Rooms) -> None:
        """A complete image cannot be aborted any more."""
        transfer = rooms.upload()
        transfer.feed(b"bytes")
        image = transfer.finish()
        transfer.abort(GONE)
        transfer.suspend()
        assert rooms.base.get(image.id) == image
        rooms.check_settled()

    @pytest.mark.parametrize("end", [lambda t: t.abort(GONE), lambda t: t.suspend()], ids=["abort", "suspend"])
    def test_feed_and_finish_after_the_end(self, rooms: Rooms, end: Callable[[Transfer], None]) -> None:
        """What is over takes no bytes and makes no image."""
        transfer = rooms.fetch()
        end(transfer)
        before = rooms.base.get(transfer.image.id)
        with pytest.raises(Stopping):
            transfer.feed(b"bytes")
        with pytest.raises(Stopping):
            transfer.finish()
        assert rooms.base.get(transfer.image.id) == before
        assert list(rooms.disk.ids()) == []

    def test_the_claim_stays_until_the_record_is_final(self, rooms: Rooms) -> None:
        """While the metadata store is away, the claim is what remembers an aborted transfer."""
        transfer = rooms.upload()
        rooms.faults.always("update", "get")
        transfer.abort(GONE)
        assert rooms.claims() == {transfer.image.id}
        assert rooms.transfers.is_known(transfer.image.id)
        rooms.settlements.retry()
        assert rooms.claims() == {transfer.image.id}
        rooms.faults.heal()
        rooms.settlements.retry()
        check_error(rooms, transfer.image.id, str(GONE))

    @pytest.mark.parametrize("step", [2, 3, 4, 5])
    def test_suspend_leaves_it_to_the_next_start(self, rooms: Rooms, step: int) -> None:
        """However far a fetch had come: it is pending and claimed, with none of its bytes."""
        transfer = rooms.fetch()
        steps: list[Callable[[], object]] = [
            lambda: transfer.start(9),
            lambda: transfer.feed(b"bytes"),
            lambda: report_now(transfer),
            lambda: transfer.feed(b"more"),
        ]
        for take in steps[: step - 1]:
            take()
        transfer.suspend()
        transfer.suspend()
        transfer.abort(GONE)
        image = rooms.base.get(transfer.image.id)
        assert (image.status, image.size, image.expected_size, image.error) == (Status.PENDING, 0, 0, "")
        assert image.download_start is None
        assert rooms.claims() == {image.id}
        assert list(rooms.disk.ids()) == []
        rooms.disk.writer(image.id).close()

    @pytest.mark.parametrize("first", ["pause", "cancel"])
    def test_a_stop_while_it_is_paused(self, rooms: Rooms, first: str) -> None:
        """In whatever order the two come, a stop costs no byte; any other reason ends it."""
        ends: dict[str, ImgsvcError] = {"stop": Stopping("the service is stopping"), "else": Conflict("deleted")}
        left: dict[str, Transfer] = {}
        for name, reason in ends.items():
            transfer = left[name] = rooms.transfers.fetch(rooms.queued(f"http://source.example/{name}"))
            transfer.restart({"url": name})
            transfer.start(9)
            transfer.feed(b"bytes")
            if first == "pause":
                transfer.pause()
                transfer.cancel(reason)
            else:
                transfer.cancel(reason)
                transfer.pause()
            assert transfer.over
        stopped, ended = (rooms.base.get(transfer.image.id) for transfer in left.values())
        assert (stopped.status, stopped.error) == (Status.PENDING, "")
        assert (ended.status, ended.error) == (Status.ERROR, "deleted")
        assert rooms.claims() == {stopped.id}
        next_one = rooms.transfers.fetch(stopped)
        assert (next_one.recover(), next_one.size) == ({"url": "stop"}, 5)

    def test_suspend_while_the_store_is_away(self, rooms: Rooms) -> None:
        """It does not wait: the record stays as it was, and the claim tells the next start."""
        transfer = rooms.fetch()
        transfer.start(5)
        rooms.faults.always("update", "get")
        transfer.suspend()
        assert rooms.base.get(transfer.image.id).status is Status.DOWNLOADING
        assert rooms.claims() == {transfer.image.id}
        assert not rooms.settlements.waiting(transfer.image.id)

    def test_cancel(self, rooms: Rooms) -> None:
        """The owner learns of it with the next bytes, and at the end; of several reasons the first counts."""
        transfer = rooms.upload()
        transfer.feed(b"bytes")
        transfer.cancel(Conflict("deleted"))
        transfer.cancel(Stopping("too late"))
        with pytest.raises(Conflict, match="deleted"):
            transfer.feed(b"more")
        with pytest.raises(Conflict, match="deleted") as caught:
            transfer.finish()
        assert transfer.size == 5
        transfer.abort(caught.value)
        check_error(rooms, transfer.image.id, "deleted")

    def test_no_descriptor_is_left(self, rooms: Rooms) -> None:
        """However a transfer ends, its file is closed."""
        feed_and_finish(rooms.upload())  # a store may open files of its own for its first write
        before = Process().num_fds()
        for end in (Transfer.finish, lambda transfer: transfer.abort(GONE), Transfer.suspend):
            transfer = rooms.upload()
            transfer.feed(b"bytes")
            end(transfer)
            assert Process().num_fds() == before
        rooms.faults.next("create", LOST)
        with pytest.raises(Unavailable):
            rooms.upload()
        assert Process().num_fds() == before

    def test_missing(self, rooms: Rooms) -> None:
        """What was announced and is still to come counts against others, until the end."""
        transfer = rooms.upload(9)
        assert transfer.missing == 9
        transfer.feed(b"bytes")
        assert transfer.missing == 4
        transfer.abort(GONE)
        assert transfer.missing == 0
        assert rooms.upload().missing == 0


@pytest.mark.parametrize("fault", [LOST, UNKNOWN])
def test_a_start_that_nobody_records(rooms: Rooms, fault: Fault) -> None:
    """A metadata store that is away when the source answers costs nothing: the record follows with the progress."""
    transfer = rooms.fetch()
    rooms.faults.next("update", fault)
    transfer.start(5)
    transfer.feed(b"by")
    report_now(transfer)
    image = rooms.base.get(transfer.image.id)
    assert (image.status, image.size, image.expected_size) == (Status.DOWNLOADING, 2, 5)
    transfer.feed(b"tes")
    assert transfer.finish().status is Status.COMPLETE
    rooms.check_settled()


def test_a_deleted_record_cannot_be_started(rooms: Rooms) -> None:
    """A fetch whose record went while its source was asked ends there."""
    transfer = rooms.fetch()
    rooms.base.delete(transfer.image.id)
    with pytest.raises(NotFound) as caught:
        transfer.start(5)
    transfer.abort(caught.value)
    assert rooms.listed() == {}
    rooms.check_settled()
