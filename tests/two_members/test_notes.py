"""Bytes that no note vouches for, and notes of hosts that are called the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from imgsvc.errors import ConfigError, ImgsvcError, PeerFailed, Unavailable
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import Image, Status
from tests.flaky import DAMAGED
from tests.harness import wait_for
from tests.images.helpers import content, put
from tests.left_behind import BODY, complete
from tests.rooms import Rooms
from tests.two_members.helpers import end_ownership, left_by_a_fetch, member_of, read_all, scrub, sweep

OTHERS = bytes(len(BODY))


def test_bytes_without_a_note_are_not_served_unseen(hosts: list[Rooms]) -> None:
    """What lies here under the image's name, while records do not say that this member holds it, may be anything: it is
    held against the digest first, and is noted, or set aside."""
    one, two = hosts
    image = left_by_a_fetch(one)
    end_ownership(one)
    again = two.transfers.fetch(two.base.update(two.base.get(image.id).requeued()))
    again.start(3)
    again.feed(b"new")
    again.finish()
    with pytest.raises(ImgsvcError):
        one.service.open(image.id)
    one.digests.start()
    wait_for(lambda: list(one.disk.quarantined()) == [image.id], 5, "it is set aside")
    one.digests.close()
    assert one.base.get(image.id).replicas == (member_of(two),)


@pytest.mark.parametrize("right", [True, False])
def test_a_copy_is_wanted_where_there_are_bytes_without_a_note(hosts: list[Rooms], *, right: bool) -> None:
    """They are read: right ones are noted, and wrong ones make way, without a new start."""
    one, two = hosts
    image = complete(one)
    put(two.disk, image.id, BODY if right else BODY.upper())
    two.digests.start()
    with pytest.raises(Unavailable):
        two.pulls.copy(image)
    wait_for(lambda: not two.digests.doubts(image.id), 5, "they are read")
    two.digests.close()
    assert (member_of(two) in (one.base.get(image.id).replicas or ())) == right
    assert list(two.disk.quarantined()) == ([] if right else [image.id])
    if right:
        two.pulls.copy(two.base.get(image.id))
    else:
        with pytest.raises(PeerFailed):  # nobody is live in its mirror here
            two.pulls.copy(image)


def changed(host: Rooms, image: Image) -> Image:
    """Its bytes were lost and it was fetched again, as others of the same size; the host has these."""
    store = host.base
    anew = store.update(store.update(store.get(image.id).failed("it rotted")).requeued()).started(len(OTHERS))
    return store.update(store.update(anew).completed(len(OTHERS), hashlib.sha256(OTHERS).hexdigest()))


@pytest.mark.parametrize("right", [True, False])
def test_an_image_that_is_fetched_again_elsewhere_while_it_is_read(hosts: list[Rooms], *, right: bool) -> None:
    """What was read is held against the record as it is by then."""
    one, two = hosts
    image = complete(one)
    put(two.disk, image.id, BODY if right else OTHERS)
    two.faults.at("read", 1, lambda: changed(one, image))
    two.digests.submit(image.id, doubted=True)
    read_all(two)
    assert one.base.get(image.id).replicas == tuple(sorted({member_of(one)} | (set() if right else {member_of(two)})))
    assert list(two.disk.quarantined()) == ([image.id] if right else [])


@pytest.mark.parametrize("others", [True, False])
def test_an_image_that_is_fetched_again_here_while_it_is_read(hosts: list[Rooms], *, others: bool) -> None:
    """What comes in its place stays, and its note."""
    one, two = hosts
    image = complete(one)
    put(two.disk, image.id, BODY.upper())

    def fetch() -> None:
        two.disk.delete(image.id)
        put(two.disk, image.id, OTHERS)
        found = changed(two, image)
        if others:
            one.base.hold(found)

    two.faults.at("read", 1, fetch)
    two.digests.submit(image.id, doubted=True)
    read_all(two)
    assert member_of(two) in (one.base.get(image.id).replicas or ())
    assert content(two.disk, image.id) == OTHERS
    assert list(two.disk.quarantined()) == []


@pytest.mark.parametrize(("faulty", "times"), [(["read"], 1), (["read"], 99), (["read", "ping"], 99)])
def test_bytes_without_a_note_that_cannot_be_read(hosts: list[Rooms], faulty: list[str], times: int) -> None:
    """They make way, or no copy could be brought here; unless they can after all, or it is the disk."""
    one, two = hosts
    image = complete(one)
    put(two.disk, image.id, BODY)
    left = iter(range(times))
    two.faults.plan = lambda _number, name: DAMAGED if name in faulty and next(left, None) is not None else None
    two.digests.submit(image.id, doubted=True)
    read_all(two)
    assert (member_of(two) in (one.base.get(image.id).replicas or ())) == (times == 1)
    assert list(two.disk.quarantined()) == ([image.id] if (faulty, times) == (["read"], 99) else [])


def test_a_copy_that_goes_while_it_is_read(hosts: list[Rooms]) -> None:
    """Right as it was, nobody may count on it."""
    one, two = hosts
    image = complete(one)
    put(two.disk, image.id, BODY)
    two.faults.at("read", 1, lambda: two.disk.delete(image.id))
    two.digests.submit(image.id, doubted=True)
    read_all(two)
    assert one.base.get(image.id).replicas == (member_of(one),)


def test_an_image_that_was_brought_here_and_is_condemned_meanwhile(hosts: list[Rooms]) -> None:
    """It does not stop the start."""
    one, two = hosts
    image = complete(one, sha256="")
    put(two.disk, image.id, BODY)
    two.faults.at("hold", 1, lambda: one.base.update(one.base.get(image.id).failed("by hand")))
    sweep(two)
    found = two.base.get(image.id)
    assert (found.status, found.replicas) == (Status.ERROR, ())


@pytest.mark.parametrize("find", [scrub, sweep])
def test_namesakes(namesakes: list[Rooms], find: Callable[[Rooms], None]) -> None:
    """What one holds, the other does not miss, and says who has it."""
    one, two = namesakes
    image = complete(one)
    find(two)
    assert one.base.get(image.id) == image
    assert two.base.holders(image.id) == [f"{member_of(one)} at http://some.example:20000"]


def test_bytes_that_a_namesake_has_noted(namesakes: list[Rooms]) -> None:
    """Its note does not vouch for those here."""
    one, two = namesakes
    image = complete(one)
    put(two.disk, image.id, BODY)
    sweep(two)
    assert two.digests.doubts(image.id)


def test_a_namesake_without_a_marker(namesakes: list[Rooms]) -> None:
    """It may be a directory that is not mounted: then the service does not start."""
    one, two = namesakes
    complete(one)
    with pytest.raises(ConfigError):
        Rooms(MemoryImageStore(), two.base).maintenance.start_sweep()
