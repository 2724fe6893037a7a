"""Uploads that may be interrupted, in which each call of a store may fail, and each may be the last."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imgsvc.errors import Gone
from tests.flaky import FAULTS, Fault, Killed
from tests.rooms import MemoryPlace, Place, Rooms
from tests.uploads.helpers import Client, check, opened

# What its client does: the bytes of a request may be checked, and the last one may break off behind its last byte.
WAYS = {"plain": (False, False), "checked": (True, False), "breaks": (False, True)}


def client_of(rooms: Rooms, way: str) -> Client:
    checked, breaks = WAYS[way]
    return Client(rooms, checked=checked, breaks=breaks)


def calls(way: str) -> list[str]:
    rooms = opened(MemoryPlace())
    client_of(rooms, way).run()
    return rooms.faults.calls


def single_faults() -> Iterator[object]:
    for way in WAYS:
        for step, call in enumerate(calls(way)):
            for fault in FAULTS.get(call, ()):
                name = f"{step}-{call}-{type(fault.error).__name__}-{fault.applied}-{way}"
                yield pytest.param(step, fault, way, id=name)


def last_steps() -> Iterator[object]:
    for way in ("plain", "breaks"):
        for step, call in enumerate(calls(way)):
            for applied in (True, False):
                yield pytest.param(way, step, applied, id=f"{step}-{call}-{applied}-{way}")


@pytest.mark.parametrize(("step", "fault", "way"), list(single_faults()))
def test_each_step_may_fail(disk: Place, step: int, fault: Fault, way: str) -> None:
    """The client goes on, and all ends well; but for a disk that fails when it is to keep the image for good."""
    rooms = opened(disk)
    rooms.faults.plan = lambda number, _call: fault if number == step else None
    client = client_of(rooms, way)
    try:
        client.run()
    except Gone:
        assert rooms.faults.calls[step] == "commit"
        rooms.check_settled()
        assert rooms.base.get(client.id).error
    else:
        check(rooms, client)


@pytest.mark.parametrize(("way", "step", "applied"), list(last_steps()))
def test_each_step_may_be_the_last(disk: Place, way: str, step: int, applied: bool) -> None:
    """The process dies there: at the next start nothing that was acknowledged is gone, and the client goes on."""
    rooms = opened(disk)
    rooms.faults.kill(step, applied=applied)
    client = client_of(rooms, way)
    with pytest.raises(Killed):
        client.run()
    rooms.let_go()
    after = client.rooms = disk.open()
    after.maintenance.start_sweep()
    after.verify_uploads()
    client.run()
    for upload in after.uploads._all():  # which was made, and nobody was told
        upload._idle_since -= 3600
        upload.abandon()
    check(after, client)
