"""Uploads whose bytes are all here, although the request that brought the last one did not live to say so: their
client is told that all are here, and need not come again."""

from __future__ import annotations

import pytest

from imgsvc import uploads as uploads_module
from imgsvc.errors import Gone, Unavailable, WrongDigest
from imgsvc.metadata.image import UNKNOWN_SIZE, Status
from tests.flaky import Fault, Killed
from tests.rooms import Place, Rooms, wait_until
from tests.uploads.helpers import BODY, PART, broken_off, check, opened, paused

WRONG = "ab" * 32


def look_after(rooms: Rooms) -> None:
    """What the thread of the uploads does twice a second."""
    rooms.uploads._look_after(rooms.uploads._all())


def test_its_client_asks(rooms: Rooms) -> None:
    """Who is told that all is there is told so of a complete image."""
    client = broken_off(rooms)
    progress = rooms.uploads.look(client.id)
    assert (progress.offset, progress.image.status, progress.expires) == (len(BODY), Status.COMPLETE, None)
    check(rooms, client)


def test_its_client_does_not_ask(rooms: Rooms) -> None:
    """It is complete soon, also when it would have expired."""
    client = broken_off(rooms)
    rooms.uploads._uploads[client.id].touched -= 3600
    look_after(rooms)
    check(rooms, client)


@pytest.mark.parametrize("asked", [True, False])
def test_its_digest_is_wrong(rooms: Rooms, asked: bool) -> None:
    """As the last request would have been told; afterwards it is gone, and the record says why."""
    client = broken_off(rooms, WRONG)
    if asked:
        with pytest.raises(WrongDigest):
            rooms.uploads.look(client.id)
    else:
        look_after(rooms)
    with pytest.raises(Gone, match=WRONG):
        rooms.uploads.look(client.id)
    assert WRONG in rooms.base.get(client.id).error
    rooms.check_settled()


def test_the_request_goes_on(rooms: Rooms) -> None:
    """Nobody takes its place, be it slow to end; until then nobody is told that all is there."""
    client = paused(rooms)
    request = rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)
    request.feed(BODY[PART:])
    rooms.uploads._uploads[client.id].touched -= 3600
    look_after(rooms)
    with pytest.raises(Unavailable, match="being completed"):
        rooms.uploads.look(client.id)
    request.commit()
    assert request.complete().image.status is Status.COMPLETE
    check(rooms, client)


def test_the_disk_does_not_answer(rooms: Rooms) -> None:
    """Then it is tried again, and never given up."""
    client = broken_off(rooms)
    rooms.uploads._uploads[client.id].touched -= 3600
    rooms.faults.always("writer")
    look_after(rooms)
    with pytest.raises(Unavailable):
        rooms.uploads.look(client.id)
    rooms.faults.heal()
    look_after(rooms)
    check(rooms, client)


def test_the_records_do_not_answer(rooms: Rooms) -> None:
    """The image is whole, and its record follows."""
    client = broken_off(rooms)
    rooms.faults.always("update")
    look_after(rooms)
    with pytest.raises(Unavailable, match="being completed"):
        rooms.uploads.look(client.id)
    rooms.faults.heal()
    rooms.settlements.retry()
    check(rooms, client)


def test_deleted_by_others_meanwhile(rooms: Rooms) -> None:
    """Nobody was told: nothing is left of it."""
    client = broken_off(rooms)
    rooms.base.delete(client.id)
    look_after(rooms)
    assert rooms.listed() == {}
    rooms.check_settled()


def test_the_process_dies(disk: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all bytes noted, and not put on the disk for good: the next start does that, however long it was away, and
    also when it is slow to verify them."""
    monkeypatch.setattr(uploads_module, "_RETRY_INTERVAL", 0.01)
    rooms = opened(disk)
    client = broken_off(rooms)
    rooms.faults.next("commit", Fault(Killed()))
    with pytest.raises(Killed):
        rooms.uploads.look(client.id)
    rooms.let_go()
    after = client.rooms = disk.open()
    after.maintenance.start_sweep()
    after.uploads._uploads[client.id].touched -= 3600
    after.faults.always("read")
    after.uploads._take(after.uploads._to_verify.popleft())
    look_after(after)
    with pytest.raises(Unavailable, match="verified"):
        after.uploads.look(client.id)
    after.faults.heal()
    after.verify_uploads()
    look_after(after)
    check(after, client)


def test_stopped(disk: Place) -> None:
    """A stop leaves it for the next start, which completes it."""
    rooms = opened(disk)
    client = broken_off(rooms)
    rooms.close()
    assert rooms.base.get(client.id).status is Status.DOWNLOADING
    after = client.rooms = disk.open()
    after.maintenance.start_sweep()
    after.start()
    wait_until(lambda: after.base.get(client.id).status is Status.COMPLETE)
    check(after, client)
    after.close()
