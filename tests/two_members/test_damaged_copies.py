"""A copy of an image is damaged: it is set aside, and good ones are not."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import pytest

from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import Status
from imgsvc.scrub import Outcome, Scrub
from imgsvc.whole import Pace
from tests.flaky import LOST, UNKNOWN, Fault, Killed
from tests.harness import wait_for
from tests.images.helpers import content
from tests.left_behind import BODY, complete
from tests.rooms import Rooms
from tests.two_members.helpers import ROTTEN, held_by_both, member_of, pulled, read_all, scrub, sweep


def read_again(host: Rooms) -> None:
    """As an image that came without a digest, and got one from another member."""
    image_id = next(iter(host.disk.ids()))
    host.digests.submit(image_id, doubted=True)
    read_all(host)


@pytest.mark.parametrize("find", [scrub, sweep, read_again])
def test_a_good_copy_does_not_go_for_a_damaged_one(hosts: list[Rooms], find: Callable[[Rooms], None]) -> None:
    """Another member is short of space at the very moment at which the damaged one is set aside."""
    one, two = hosts
    image = held_by_both(one, two, ROTTEN[:-1] if find is sweep else ROTTEN)

    def drop() -> None:
        if one.base.drop_copy(image.id, [member_of(two)]):
            one.disk.delete(image.id)

    two.faults.at("quarantine", 1, drop)
    find(two)
    found = one.base.get(image.id)
    assert (found.status, found.replicas) == (Status.COMPLETE, (member_of(one),))
    assert content(one.disk, image.id) == BODY
    assert list(two.disk.quarantined()) == [image.id]


@pytest.mark.parametrize("applied", [True, False])
def test_killed_while_a_damaged_copy_is_set_aside(hosts: list[Rooms], *, applied: bool) -> None:
    """After the next start and pass nobody is served what is damaged, and the image is as the other member has it."""
    one, two = hosts
    for step in range(20):
        image = held_by_both(one, two, ROTTEN)
        two.faults.kill(len(two.faults.calls) + step, applied=applied)
        try:
            scrub(two)
        except Killed:
            two = Rooms(two.disk, two.base)
            two.maintenance.start_sweep()
            read_all(two)
            scrub(two)
        else:
            break
        assert one.base.get(image.id) == dataclasses.replace(image, replicas=(member_of(one),))
        assert (set(two.disk.ids()), list(two.disk.quarantined()).count(image.id)) == (set(), 1)
    assert step > 5


def test_other_bytes_than_those_that_were_read(hosts: list[Rooms]) -> None:
    """A copy that was brought here again stays, and so does its note."""
    one, two = hosts
    image = held_by_both(one, two, ROTTEN)

    def bring_again() -> None:
        two.disk.delete(image.id)
        pulled(two, image)

    two.faults.at("drop_copy", 1, bring_again)
    list(Scrub(two.disk, two.records, Pace(0), threading.Event()).run())
    assert one.base.get(image.id).replicas == tuple(sorted(map(member_of, hosts)))
    assert list(two.disk.ids()) == [image.id]


@pytest.mark.parametrize("fault", [LOST, UNKNOWN])
def test_a_damaged_copy_when_records_are_away(
    hosts: list[Rooms], monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """It is set aside all the same, and is called damaged, for that brings a good one."""
    monkeypatch.setattr("imgsvc.scrub._RETRY_INTERVAL", 0.01)
    one, two = hosts
    image = held_by_both(one, two, ROTTEN)
    two.faults.next("drop_copy", fault, times=3)
    found = [finding.outcome for finding in Scrub(two.images, two.records, Pace(0), threading.Event()).run()]
    assert (found, list(two.disk.quarantined())) == ([Outcome.DAMAGED], [image.id])
    assert one.base.get(image.id).replicas == (member_of(one),)


@pytest.mark.parametrize("held", [True, False])
def test_doubted_bytes_that_are_wrong(hosts: list[Rooms], monkeypatch: pytest.MonkeyPatch, *, held: bool) -> None:
    """The only copy on record takes the image with it, as soon as etcd answers. Where none is, a member that is away may
    have the bytes."""
    monkeypatch.setattr("imgsvc.digests._RETRY_INTERVAL", 0.01)
    one, two = hosts
    image = complete(one)
    assert isinstance(one.disk, MemoryImageStore)
    one.disk._images[image.id][:1] = b"T"
    if not held:
        one.base.release(image.id)
    one.faults.next("lose_copy", LOST)
    one.digests.submit(image.id, doubted=True)
    one.digests.start()
    wait_for(lambda: not one.digests.doubts(image.id), 5, "they are read")
    one.digests.close()
    found = two.base.get(image.id)
    assert (found.status, found.replicas) == (Status.ERROR if held else Status.COMPLETE, ())
    assert list(one.disk.quarantined()) == [image.id]
