"""Uploads that may be interrupted, in which each call of a store may fail, and each may be the last."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from imgsvc.errors import Gone
from tests.flaky import FAULTS, Fault, Killed
from tests.rooms import MemoryPlace, Place
from tests.uploads.helpers import Client, check, opened


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
