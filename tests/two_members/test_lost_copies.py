"""A copy of an image is gone: the image is lost with its last copy, not before, whatever comes and goes meanwhile."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import pytest

from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import Status
from imgsvc.scrub import Outcome, Scrub
from imgsvc.whole import Pace
from tests.flaky import DAMAGED, FULL
from tests.images.helpers import content, put
from tests.left_behind import BODY, complete
from tests.rooms import Rooms
from tests.two_members.helpers import before_writing, held_by_both, member_of, pulled, scrub, sweep


@pytest.mark.parametrize("find", [scrub, sweep])
def test_a_copy_that_comes_while_the_last_one_is_condemned(hosts: list[Rooms], find: Callable[[Rooms], None]) -> None:
    """It is the last one then: the image stays complete, and who has it on record."""
    one, two = hosts
    image = complete(one)
    one.disk.delete(image.id)
    put(two.disk, image.id, BODY)
    before_writing(one, image.id, lambda: two.base.hold(image))
    find(one)
    found = one.base.get(image.id)
    assert (found.status, found.replicas) == (Status.COMPLETE, (member_of(two),))


@pytest.mark.parametrize("other", [scrub, sweep])
@pytest.mark.parametrize("find", [scrub, sweep])
def test_two_that_lose_it_at_once(
    hosts: list[Rooms], find: Callable[[Rooms], None], other: Callable[[Rooms], None]
) -> None:
    """Neither relies on the other: the image is in error, and can be fetched again."""
    one, two = hosts
    image = complete(one)
    two.base.hold(image)
    one.disk.delete(image.id)
    before_writing(one, image.id, lambda: other(two))
    find(one)
    found = one.base.get(image.id)
    assert (found.status, found.replicas) == (Status.ERROR, ())


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("early", [True, False])
def test_a_copy_that_comes_back_while_it_is_scrubbed(hosts: list[Rooms], *, early: bool, others: bool) -> None:
    """A client asks for the image when its damaged bytes have just been set aside: what it has brought here stays on
    record, whether others hold it or do no longer."""
    one, two = hosts
    image = complete(one)
    if others:
        two.base.hold(image)
    assert isinstance(one.disk, MemoryImageStore)
    one.disk._images[image.id][:1] = b"T"
    if early:
        one.faults.at("lose_copy", 1, lambda: pulled(one, image))
    else:
        one.faults.at("lose_copy", 1, lambda: before_writing(one, image.id, lambda: pulled(one, image)))
    scrub(one)
    found = one.base.get(image.id)
    assert (found.status, set(found.replicas or ())) == (
        Status.COMPLETE,
        {member_of(one), member_of(two)} if others else {member_of(one)},
    )
    assert content(one.disk, image.id) == BODY
    assert list(one.disk.quarantined()) == [image.id]


@pytest.mark.parametrize("call", ["get", "open", "read"])
def test_a_copy_that_is_dropped_while_it_is_scrubbed(hosts: list[Rooms], call: str) -> None:
    """It is not missed."""
    one, two = hosts
    image = held_by_both(one, two, BODY)

    def drop() -> None:
        assert two.base.drop_copy(image.id, [member_of(one)])
        two.disk.delete(image.id)

    two.faults.at(call, 1, drop)
    found = [finding.outcome for finding in Scrub(two.images, two.records, Pace(0), threading.Event()).run()]
    assert found == [Outcome.MATCHES if call == "read" else Outcome.LEFT]
    assert one.base.get(image.id).replicas == (member_of(one),)


def test_a_disk_that_is_gone_keeps_its_notes(hosts: list[Rooms], monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read now may be there again soon."""
    monkeypatch.setattr("imgsvc.scrub._READ_AGAIN", 0.01)
    one, two = hosts
    image = held_by_both(one, two, BODY)
    two.faults.always("read", "quarantine", fault=DAMAGED)
    scrub(two)
    assert one.base.get(image.id) == dataclasses.replace(image, replicas=tuple(sorted(map(member_of, hosts))))


@pytest.mark.parametrize("find", [scrub, sweep])
def test_bytes_of_an_image_that_was_complete(hosts: list[Rooms], find: Callable[[Rooms], None]) -> None:
    """Those that could not be set aside, or are back on a disk that was away, are left to a person."""
    one, _ = hosts
    image = complete(one)
    assert isinstance(one.disk, MemoryImageStore)
    if find is scrub:
        one.disk._images[image.id][:1] = b"T"
        one.faults.always("quarantine", fault=FULL)
        find(one)
    else:
        one.disk.delete(image.id)
        find(one)
        put(one.disk, image.id, BODY)
    one.faults.heal()
    sweep(one)
    assert one.base.get(image.id).status is Status.ERROR
    assert list(one.disk.ids()) == [image.id]
