"""Starts after an interrupted upload, which is verified: each call of a store may fail, and each may be the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest

from imgsvc import uploads as uploads_module
from imgsvc.errors import Gone, ImgsvcError, NoSpace, Unavailable
from imgsvc.metadata.image import Status
from tests.flaky import DAMAGED, FAULTS, Fault, Killed
from tests.rooms import MemoryPlace, Place
from tests.uploads.helpers import PART, begun, check


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


def test_expired_before_it_is_verified(disk: Place) -> None:
    """It is not read for nothing, be there others that wait for that."""
    client = begun(disk)
    rooms = disk.open()
    rooms.maintenance.start_sweep()
    rooms.uploads._uploads[client.id]._idle_since -= 3600
    rooms.uploads._look_after(rooms.uploads._all())
    assert rooms.base.get(client.id).status is Status.ERROR
    rooms.verify_uploads()
    assert "read" not in rooms.faults.calls
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
