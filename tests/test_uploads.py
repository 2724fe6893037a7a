"""Uploads that may be interrupted, in which each call of a store may fail, and each may be the last."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from imgsvc import resumable as resumable_module
from imgsvc import uploads as uploads_module
from imgsvc.errors import Conflict, Gone, ImgsvcError, Incomplete, Locked, NoSpace, NotFound, Unavailable, WrongChecksum
from imgsvc.metadata.image import UNKNOWN_SIZE, ImageType, Status
from imgsvc.resumable import Checksum
from imgsvc.uploads import Incoming
from tests.flaky import DAMAGED, FAULTS, Fault, Killed
from tests.images.helpers import content
from tests.rooms import DiskPlace, MemoryPlace, Place, Rooms, report_now, wait_until

BODY = bytes(range(100)) * 9
PART = 300
LEFT = Incomplete("the sender went away")


class Client:
    """Uploads BODY in three requests, and asks how far it is whenever anything went wrong. `told` is what it was told
    last."""

    def __init__(self, rooms: Rooms, *, checked: bool = False) -> None:
        self.rooms = rooms
        self.id = ""
        self.told = 0
        self._checked = checked

    def run(self, tries: int = 6) -> None:
        """To the end; raises Gone when there is no way to it."""
        for _ in range(tries):
            try:
                self._go_on()
            except Gone:
                raise
            except ImgsvcError:
                self.rooms.settlements.retry()
            else:
                return
        raise AssertionError(f"not whole after {tries} tries")

    def _go_on(self) -> None:
        uploads = self.rooms.uploads
        if not self.id:
            self.id = uploads.create(ImageType.KVM, "of a test", len(BODY), "", "given").image.id
        while self.told < len(BODY):
            progress = uploads.look(self.id)
            assert progress.offset >= self.told, "bytes that were acknowledged are gone"
            self.told = progress.offset
            part = BODY[self.told : self.told + PART]
            checksum = Checksum("sha256", hashlib.sha256(part).digest()) if self._checked else None
            self._bring(uploads.go_on(self.id, self.told, len(part), checksum), part)

    def _bring(self, request: Incoming, part: bytes) -> None:
        try:
            for piece in (part[:100], part[100:]):
                if piece:
                    request.feed(piece)
            request.commit()
            self.told = request.complete().offset
        except ImgsvcError as error:
            request.abort(error)
            raise


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Place]:
    with closing(DiskPlace(tmp_path)) as place:
        yield place


def opened(place: Place) -> Rooms:
    rooms = place.open()
    if rooms.disk.fresh:
        rooms.disk.mark(rooms.base.identity)
    return rooms


def calls(*, checked: bool = False) -> list[str]:
    rooms = opened(MemoryPlace())
    Client(rooms, checked=checked).run()
    return rooms.faults.calls


def single_faults() -> Iterator[object]:
    for checked in (False, True):
        for step, call in enumerate(calls(checked=checked)):
            for fault in FAULTS.get(call, ()):
                name = f"{step}-{call}-{type(fault.error).__name__}-{fault.applied}-{checked}"
                yield pytest.param(step, fault, checked, id=name)


def check(rooms: Rooms, client: Client) -> None:
    rooms.check_settled()
    assert rooms.base.get(client.id).status is Status.COMPLETE
    assert content(rooms.disk, client.id) == BODY
    progress = rooms.uploads.look(client.id)
    assert (progress.offset, progress.length, progress.expires) == (len(BODY), len(BODY), None)
    assert not rooms.transfers.is_known(client.id)


@pytest.mark.parametrize(("step", "fault", "checked"), list(single_faults()))
def test_each_step_may_fail(disk: Place, step: int, fault: Fault, checked: bool) -> None:
    """The client goes on, and all ends well; but for a disk that fails when it is to keep the image for good."""
    rooms = opened(disk)
    rooms.faults.plan = lambda number, _call: fault if number == step else None
    client = Client(rooms, checked=checked)
    try:
        client.run()
    except Gone:
        assert rooms.faults.calls[step] == "commit"
        rooms.check_settled()
        assert rooms.base.get(client.id).error
    else:
        check(rooms, client)


@pytest.mark.parametrize("applied", [True, False], ids=["after", "before"])
@pytest.mark.parametrize(("step", "call"), list(enumerate(calls())))
def test_each_step_may_be_the_last(disk: Place, step: int, call: str, applied: bool) -> None:
    """The process dies there: at the next start nothing that was acknowledged is gone, and the client goes on."""
    rooms = opened(disk)
    rooms.faults.kill(step, applied=applied)
    client = Client(rooms)
    with pytest.raises(Killed):
        client.run()
    rooms.let_go()
    after = client.rooms = disk.open()
    after.maintenance.start_sweep()
    after.verify_uploads()
    client.run()
    for upload in after.uploads._all():  # which was made, and nobody was told
        upload.abandon(time.time() + 3600)
    check(after, client)


def begun(place: Place) -> Client:
    """One that was interrupted in its third request, by a kill."""
    rooms = opened(place)
    client = Client(rooms)
    rooms.faults.plan = lambda _number, _call: Fault(Killed()) if client.told > PART else None
    with pytest.raises(Killed):
        client.run()
    rooms.let_go()
    return client


def start_calls() -> list[str]:
    place = MemoryPlace()
    client = begun(place)
    rooms = client.rooms = place.open()
    rooms.maintenance.start_sweep()
    rooms.verify_uploads()
    return rooms.faults.calls


START = list(enumerate(start_calls()))


def start_faults() -> Iterator[object]:
    for step, call in START:
        for fault in FAULTS.get(call, ()):
            yield pytest.param(step, fault, id=f"{step}-{call}-{type(fault.error).__name__}-{fault.applied}")


@pytest.mark.parametrize(("step", "fault"), list(start_faults()))
def test_each_step_of_a_start_may_fail(disk: Place, monkeypatch: pytest.MonkeyPatch, step: int, fault: Fault) -> None:
    """It is taken again until it works; only a disk that does not give back what it has ends the upload."""
    monkeypatch.setattr(uploads_module, "_RETRY_INTERVAL", 0.01)
    client = begun(disk)
    rooms = client.rooms = disk.open()
    rooms.faults.plan = lambda number, _call: fault if number == step else None
    try:
        rooms.maintenance.start_sweep()
    except (Unavailable, NoSpace):
        rooms.maintenance.start_sweep()
    while rooms.uploads._to_verify:
        rooms.uploads._take(rooms.uploads._to_verify.popleft())
    assert len(rooms.faults.calls) > step
    if fault is DAMAGED:
        with pytest.raises(Gone):
            client.run()
        rooms.check_settled()
    else:
        client.run()
        check(rooms, client)


@pytest.mark.parametrize(("step", "call"), START)
def test_each_step_of_a_start_may_be_the_last(disk: Place, step: int, call: str) -> None:
    """The next start makes up for it."""
    client = begun(disk)
    rooms = disk.open()
    rooms.faults.kill(step, applied=True)
    with suppress(Killed):
        rooms.maintenance.start_sweep()
        rooms.verify_uploads()
    assert len(rooms.faults.calls) > step
    rooms.let_go()
    after = client.rooms = disk.open()
    after.maintenance.start_sweep()
    after.verify_uploads()
    client.run()
    check(after, client)


def test_deleted_while_it_is_verified(disk: Place) -> None:
    """It is gone at once, and nothing is left of it."""
    client = begun(disk)
    rooms = disk.open()
    rooms.maintenance.start_sweep()
    with pytest.raises(Unavailable, match="verified"):
        rooms.uploads.look(client.id)
    found: list[str] = []

    def plan(_number: int, call: str) -> None:
        if call == "read":
            rooms.faults.heal()
            rooms.service.delete(client.id)
            try:
                rooms.uploads.look(client.id)
            except ImgsvcError as error:
                found.append(type(error).__name__)

    rooms.faults.plan = plan
    rooms.uploads._take(rooms.uploads._to_verify.popleft())
    assert found == ["NotFound"]
    assert rooms.listed() == {}
    rooms.check_settled()


def test_stopped_while_it_is_verified(disk: Place) -> None:
    """Nothing of it is lost; the next start verifies it anew."""
    client = begun(disk)
    rooms = disk.open()
    rooms.maintenance.start_sweep()
    blocks = iter(range(2))

    def plan(_number: int, call: str) -> None:
        if call == "read" and next(blocks, None) == 1:
            rooms.uploads._closing.set()

    rooms.faults.plan = plan
    rooms.uploads._take(rooms.uploads._to_verify.popleft())
    rooms.uploads.close()
    assert rooms.base.get(client.id).status is Status.DOWNLOADING
    after = client.rooms = disk.open()
    after.maintenance.start_sweep()
    after.verify_uploads()
    assert after.uploads.look(client.id).offset == 2 * PART
    client.run()
    check(after, client)


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
        """So long after its last byte, and not while a request is under way."""
        client = paused(rooms)
        upload = rooms.uploads._uploads[client.id]
        upload.touched -= 50
        request = rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)
        upload.abandon(time.time() + 3600)
        request.feed(b"more")
        request.abort(LEFT)
        upload.abandon(time.time() + 55)
        assert not upload.transfer.over
        upload.abandon(time.time() + 61)
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


def paused(rooms: Rooms) -> Client:
    """After its first request."""
    client = Client(rooms)
    client.id = rooms.uploads.create(ImageType.KVM, "", len(BODY), "", "").image.id
    request = rooms.uploads.go_on(client.id, 0, PART)
    request.feed(BODY[:PART])
    request.commit()
    client.told = request.complete().offset
    assert client.told == PART
    return client


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
