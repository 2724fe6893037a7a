"""Between two requests of an upload, and two requests at once."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from imgsvc import resumable as resumable_module
from imgsvc.errors import Conflict, Gone, ImgsvcError, Locked, NotFound, Unavailable, WrongChecksum
from imgsvc.metadata.image import UNKNOWN_SIZE, ImageType, Status
from imgsvc.resumable import Checksum
from tests.flaky import Fault
from tests.rooms import Place, Rooms, report_now, wait_until
from tests.uploads.helpers import BODY, LEFT, PART, Client, check, opened, paused


class TestPaused:
    """Between two requests."""

    def test_it_costs_no_look_at_its_record(self, rooms: Rooms) -> None:
        client = paused(rooms)
        transfer = rooms.transfers._running[client.id]
        report_now(transfer)  # how far it came
        assert rooms.base.get(client.id).size == PART
        before = len(rooms.faults.calls)
        report_now(transfer)
        assert rooms.faults.calls[before:] == []

    def test_it_keeps_no_room(self, rooms: Rooms) -> None:
        client = paused(rooms)
        transfer = rooms.transfers._running[client.id]
        assert transfer.missing == 0
        request = rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)
        assert transfer.missing == len(BODY) - PART
        request.abort(LEFT)
        assert transfer.missing == 0

    def test_it_expires(self, rooms: Rooms) -> None:
        """So long after its last byte, whatever the time of day becomes, and not while a request is under way."""
        client = paused(rooms)
        upload = rooms.uploads._uploads[client.id]
        upload._idle_since -= 3600
        request = rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)
        upload.abandon()
        request.feed(b"more")
        request.abort(LEFT)
        upload._idle_since -= 55
        upload.touched -= 3600
        upload.abandon()
        assert not upload.transfer.over
        upload._idle_since -= 5
        upload.abandon()
        assert rooms.base.get(client.id).status is Status.ERROR
        rooms.check_settled()

    def test_it_is_deleted(self, rooms: Rooms) -> None:
        """Nobody has to notice."""
        client = paused(rooms)
        rooms.service.delete(client.id)
        assert rooms.claims() == set()
        rooms.check_settled()
        with pytest.raises(NotFound):
            rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)

    def test_others_end_it_unnoticed(self, rooms: Rooms) -> None:
        """While deletions could not be followed: it is found out afterwards. What is still there is left alone."""
        deleted, ended, kept = (paused(rooms) for _ in range(3))
        rooms.base.delete(deleted.id)
        theirs = rooms.base.update(rooms.base.get(ended.id).failed("by somebody else"))
        rooms.transfers.reconcile()
        assert rooms.claims() == {kept.id}
        assert rooms.base.get(ended.id) == theirs
        with pytest.raises(NotFound):
            rooms.uploads.go_on(deleted.id, PART, UNKNOWN_SIZE)
        with pytest.raises(Gone, match="by somebody else"):
            rooms.uploads.go_on(ended.id, PART, UNKNOWN_SIZE)
        rooms.uploads.go_on(kept.id, PART, UNKNOWN_SIZE).abort(LEFT)

    def test_others_end_it_before_its_client_is_told(self, rooms: Rooms) -> None:
        """They did not know yet that they are to wait for its member, which was away: the client begins anew."""
        rooms.faults.next("expect", Fault(Conflict("this member is not transferring the image")))
        with pytest.raises(Conflict):
            rooms.uploads.create(ImageType.KVM, "of a test", len(BODY), "", "")
        assert rooms.uploads._all() == []
        rooms.check_settled()

    def test_deleted_before_others_are_told_to_wait(self, rooms: Rooms) -> None:
        client = paused(rooms)
        rooms.base.delete(client.id)
        upload = rooms.uploads._uploads[client.id]
        upload.told = None
        rooms.uploads._tell_others_again([upload])
        assert rooms.claims() == set()

    def test_deleted_in_the_gap(self, rooms: Rooms) -> None:
        """While a request begins or ends: whoever is second tidies up."""
        for call in ("writer", "note"):
            client = paused(rooms)

            threads: list[threading.Thread] = []

            def plan(
                _number: int,
                name: str,
                call: str = call,
                client: Client = client,
                threads: list[threading.Thread] = threads,
            ) -> Fault | None:
                if name == call:
                    rooms.faults.heal()
                    thread = threading.Thread(target=rooms.service.delete, args=(client.id,))
                    thread.start()
                    wait_until(lambda: rooms.transfers._running[client.id].cancelled is not None)
                    threads.append(thread)
                return None

            rooms.faults.plan = plan
            with suppress(ImgsvcError):
                request = rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)
                request.feed(b"more")
                with suppress(ImgsvcError):
                    request.commit()
                request.abort(LEFT)
            for thread in threads:
                thread.join()
            assert len(threads) == 1, call
            rooms.check_settled()
            assert client.id not in rooms.listed()


class TestOneAtATime:
    def test_at_another_offset(self, rooms: Rooms) -> None:
        """It is refused, and the one that is under way goes on."""
        client = paused(rooms)
        first = rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)
        first.feed(BODY[PART : PART + 1])
        with pytest.raises(Conflict):
            rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)
        assert first.cancelled is None
        first.feed(BODY[PART + 1 :])
        first.commit()
        first.complete()
        check(rooms, client)

    def test_at_the_same_offset(self, rooms: Rooms) -> None:
        """The newcomer takes the upload over; the other brings nothing any more, and ends nothing."""
        client = paused(rooms)
        checksum = Checksum("sha1", bytes(20))
        first = rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE, checksum)
        first.feed(b"wrong")
        assert rooms.uploads.look(client.id).offset == PART
        second = rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)
        with pytest.raises(Locked):
            first.feed(b"more")
        with pytest.raises(Locked):
            first.commit()
        assert isinstance(first.cancelled, Locked)
        first.abort(LEFT)
        second.feed(BODY[PART:])
        second.commit()
        second.complete()
        check(rooms, client)

    def test_while_one_is_being_finished(self, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
        """Others are told to come again, and do not wait for long (here: 0.2 seconds)."""
        assert resumable_module._PATIENCE == 2.0
        monkeypatch.setattr(resumable_module, "_PATIENCE", 0.2)
        client = paused(rooms)
        request = rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)
        request.feed(BODY[PART:])
        going, goes_on = threading.Event(), threading.Event()

        def plan(_number: int, call: str) -> Fault | None:
            if call == "commit":
                going.set()
                goes_on.wait(10)
            return None

        rooms.faults.plan = plan
        thread = threading.Thread(target=request.commit)
        thread.start()
        assert going.wait(5)
        began = time.monotonic()
        with pytest.raises(Locked):
            rooms.uploads.look(client.id)
        assert time.monotonic() - began < 4
        goes_on.set()
        thread.join()
        with pytest.raises(Unavailable):  # its record says nothing yet
            rooms.uploads.look(client.id)
        request.complete()
        check(rooms, client)


def test_bytes_that_are_gone(disk: Place) -> None:
    """A file that was cut under a paused upload does not become one with a hole."""
    rooms = opened(disk)
    client = paused(rooms)
    (path,) = Path(rooms.disk.place).glob(f".incoming/{client.id}")
    os.truncate(path, PART - 1)
    with pytest.raises(Unavailable):
        rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)


def test_a_wrong_checksum(rooms: Rooms) -> None:
    """What came with it is forgotten, the digest included."""
    client = paused(rooms)
    request = rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE, Checksum("sha1", bytes(20)))
    request.feed(bytes(PART))
    with pytest.raises(WrongChecksum):
        request.commit()
    client.run()
    check(rooms, client)
