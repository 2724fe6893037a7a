"""Copies that no client waits for: their speed, and that they stop."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from imgsvc.errors import Stopping
from imgsvc.throttle import Throttle
from tests.cluster.members import MIB, Members, Reading, check_kept, some
from tests.rooms import wait_until
from tests.source import Resource


def test_copy(members: Members) -> None:
    """Without a client, and no faster than it may be; a client that comes is not made to wait."""
    body = some(3 * MIB)
    images = [members.image(body), members.image(body)]
    for image in images:
        members.serve(image, body, image.id)
    began = time.monotonic()
    members.one.pulls.copy(images[0], Throttle(6 * MIB))
    assert 0.3 < time.monotonic() - began < 2
    check_kept(members, images[0].id, body)
    copying = threading.Thread(target=members.one.pulls.copy, args=(images[1], Throttle(10_000)))
    copying.start()
    assert members.read(images[1]).whole() == body
    copying.join()
    check_kept(members, images[1].id, body)


def test_a_copy_that_somebody_waits_for(members: Members) -> None:
    """One that goes on slowly in the background becomes as fast as it can be."""
    body = some(4 * MIB)
    image = members.image(body)
    members.serve(image, body)
    copying = threading.Thread(target=members.one.pulls.copy, args=(image, Throttle(100_000)))
    copying.start()
    wait_until(lambda: bool(members.one.pulls.running))
    began = time.monotonic()
    members.one.pulls.copy(image)
    assert time.monotonic() - began < 5
    copying.join()
    check_kept(members, image.id, body)


def test_copy_of_nothing(members: Members) -> None:
    """An image without a byte needs none."""
    image = members.image(b"")
    members.one.pulls.copy(image)
    check_kept(members, image.id, b"")


def test_copy_of_what_is_here(members: Members) -> None:
    """It is held, and nobody is asked."""
    body = some(MIB)
    image = members.image(body)
    other = members.serve(image, body)
    for _ in range(2):
        members.one.pulls.copy(image)
        members.hold(image, members.one.disk.member)
    assert len(members.asked(image, other)) == 1


def test_copies_stop(members: Members) -> None:
    """At once, before the service stops; those for which clients wait go on."""
    images = [members.image(some(MIB)), members.image(some(MIB))]
    resources = [Resource(some(MIB), stall_after=100_000), Resource(some(MIB), stall_after=100_000)]
    for image, resource in zip(images, resources, strict=True):
        members.serve(image, resource, image.id)
    reader = members.read(images[0])
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(members.one.pulls.copy, images[1])
        wait_until(lambda: len(reader.body) > 0 and bool(members.asked(images[1], images[1].id)))
        members.one.pulls.stop_copies()
        with pytest.raises(Stopping):
            copying.result(5)
    assert members.one.pulls.running == 1
    with pytest.raises(Stopping):
        members.one.pulls.copy(images[1])


def test_copies_from_a_slow_member_stop(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its bytes trickle in without a pause, and a block takes long to be full."""
    monkeypatch.setattr("imgsvc.cluster.line.TICK", 0.5)
    image = members.image(some(8 * MIB))
    member = members.serve(image, Resource(some(8 * MIB), rate=200_000))
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(members.one.pulls.copy, image)
        wait_until(lambda: bool(members.asked(image, member)))
        time.sleep(0.1)
        members.one.pulls.stop_copies()
        with pytest.raises(Stopping):
            copying.result(2)


def test_copies_stop_that_a_slow_client_reads(members: Members) -> None:
    """They do not, though it has more than it takes at the moment: as all downloads it has time to end."""
    body = some(2 * MIB)
    image = members.image(body)
    resource = Resource(body, stall_after=MIB)
    member = members.serve(image, resource)
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(members.one.pulls.copy, image)
        wait_until(lambda: bool(members.asked(image, member)))
        reader = members.one.pulls.open(image)
        first = Reading(reader, 0, 1, close=False)
        first.whole()
        members.one.pulls.stop_copies()
        members.resources[member].resume()
        assert first.body + Reading(reader, 1).whole() == body
        with contextlib.suppress(Stopping):
            copying.result(5)
    check_kept(members, image.id, body)
