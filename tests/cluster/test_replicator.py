"""Copies in the background, by real threads over real directories; the records are mirrors that the test fills."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgsvc.cluster.rendezvous import ranked
from imgsvc.errors import NoSpace, Unavailable
from imgsvc.metadata.image import new_id
from tests.cluster.hosts import Hosts
from tests.images.helpers import content, put
from tests.rooms import wait_until

# For what must not happen.
A_WHILE = 0.2


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Five, of which none copies yet."""
    with Hosts(tmp_path, 5) as hosts:
        yield hosts


def new_image() -> tuple[str, list[str]]:
    """The id of an image that is still to come to host-0, and the others in its order."""
    image_id = new_id()
    return image_id, [member for member in ranked(image_id, (f"host-{n}" for n in range(5))) if member != "host-0"]


def copies(hosts: Hosts) -> int:
    return sum(len(host.copied) for host in hosts)


def tries(hosts: Hosts) -> int:
    return sum(host.tried.total() for host in hosts)


def held_by_two(hosts: Hosts, one: str, other: str, count: int) -> list[str]:
    images = [hosts.upload(one) for _ in range(count)]
    for image_id in images:
        put(hosts[other].images, image_id, content(hosts[one].images, image_id))
        hosts.hold(image_id, other)
    return images


def test_images_get_their_copies(hosts: Hosts) -> None:
    """As many as are wanted, at the members that come first for them, and not one more: those that are there before the
    start, and those that come later."""
    images = [new_image() for _ in range(40)]
    for image_id, _ in images[:20]:
        hosts.upload("host-0", image_id=image_id)
    hosts.start(wanted=3)
    for image_id, _ in images[20:]:
        hosts.upload("host-0", image_id=image_id)
    wait_until(lambda: copies(hosts) >= 80)
    time.sleep(A_WHILE)
    assert copies(hosts) == 80
    for image_id, others in images:
        assert hosts.holders(image_id) == {"host-0", *others[:2]}


def test_one_copy_is_enough(hosts: Hosts) -> None:
    """Where no more are wanted, nothing is copied."""
    hosts.start(wanted=1)
    hosts.upload("host-1")
    time.sleep(A_WHILE)
    assert tries(hosts) == 0


def test_fewer_members_than_copies(hosts: Hosts) -> None:
    """All of them have one; a member that joins gets its own."""
    hosts.leave("host-4")
    hosts.start(wanted=5)
    image_id = hosts.upload("host-0")
    wait_until(lambda: len(hosts.holders(image_id)) == 4)
    hosts.join("host-4")
    wait_until(lambda: len(hosts.holders(image_id)) == 5)
    assert copies(hosts) == 4


def test_a_dead_member(hosts: Hosts) -> None:
    """After the delay, and not before, what it held is copied again, once each, by all who are left."""
    images = held_by_two(hosts, "host-0", "host-1", 30)
    hosts.start(delay=1.5)
    hosts.leave("host-1")
    time.sleep(0.5)
    assert tries(hosts) == 0
    wait_until(lambda: copies(hosts) >= 30)
    time.sleep(A_WHILE)
    assert copies(hosts) == 30
    assert all(len(hosts.holders(image_id)) == 3 for image_id in images)
    assert {host.id for host in hosts if host.copied} == {"host-2", "host-3", "host-4"}


def test_a_restart_within_the_delay(hosts: Hosts) -> None:
    """Nothing is copied: what it holds counted all the while."""
    held_by_two(hosts, "host-0", "host-1", 3)
    hosts.start(delay=1.2)
    hosts.leave("host-1")
    time.sleep(0.2)
    hosts.join("host-1")
    time.sleep(1.2)
    assert tries(hosts) == 0


def test_no_live_holder(hosts: Hosts) -> None:
    """There is nothing to copy from, and nobody tries; when the holder is back, it is copied."""
    image_id = hosts.upload("host-0")
    hosts.leave("host-0")
    hosts.start()
    time.sleep(A_WHILE)
    assert tries(hosts) == 0
    hosts.join("host-0")
    wait_until(lambda: len(hosts.holders(image_id)) == 2)


@pytest.mark.parametrize("failure", [NoSpace("it is full"), ValueError("a mistake")])
def test_one_that_cannot(hosts: Hosts, failure: Exception) -> None:
    """The next in the image's order takes its turn after a while, and no other; the first does not try again at once,
    and goes on with other images."""
    image_id, (first, second, *others) = new_image()
    hosts[first].failure = failure
    hosts.start(turn=0.9)
    hosts.upload("host-0", image_id=image_id)
    wait_until(lambda: tries(hosts) == 1)
    time.sleep(A_WHILE)
    assert (copies(hosts), tries(hosts)) == (0, 1)
    wait_until(lambda: hosts.holders(image_id) == {"host-0", second}, 10)
    time.sleep(A_WHILE)
    assert hosts[first].tried[image_id] <= 2
    assert [hosts[other].tried[image_id] for other in (second, *others)] == [1, 0, 0]
    hosts[first].failure = None
    members = [host.id for host in hosts if host.id != others[0]]
    mine = next(each for each in iter(new_id, None) if ranked(each, members)[0] == first)
    images = [hosts.upload(others[0], image_id=each) for each in (mine, *(new_id() for _ in range(19)))]
    wait_until(lambda: all(len(hosts.holders(each)) == 2 for each in images), 20)
    wait_until(lambda: mine in hosts[first].copied)


def test_one_that_can_again(hosts: Hosts) -> None:
    """What failed is tried again, less and less often; and at once when somebody comes or goes."""
    image_id, (first, *_) = new_image()
    hosts[first].failure = Unavailable("it failed")
    hosts.start()
    hosts.upload("host-0", image_id=image_id)
    wait_until(lambda: hosts[first].tried[image_id] == 3)
    hosts[first].failure = None
    began = time.monotonic()
    hosts.leave(next(member for member in ("host-1", "host-2") if member != first))
    wait_until(lambda: len(hosts.holders(image_id)) == 2)
    assert time.monotonic() - began < 2


def test_all_but_the_last_cannot(hosts: Hosts) -> None:
    """While there is one that can, an image does not stay without its copy."""
    image_id, (*others, last) = new_image()
    for other in others:
        hosts[other].failure = Unavailable("it failed")
    hosts.start(turn=0.2)
    hosts.upload("host-0", image_id=image_id)
    wait_until(lambda: hosts.holders(image_id) == {"host-0", last})
    assert tries(hosts) == 4


def test_a_full_member_is_passed_over(hosts: Hosts) -> None:
    """At once, by what it says of its space. When all are full they try all the same: some may be able to make room."""
    image_id, (first, second, *_) = new_image()
    hosts.join(first, free=999)
    hosts.start()
    hosts.upload("host-0", image_id=image_id)
    wait_until(lambda: hosts.holders(image_id) == {"host-0", second})
    for host in hosts:
        hosts.join(host.id, free=999)
    image_id, (first, *_) = new_image()
    hosts.upload("host-0", image_id=image_id)
    wait_until(lambda: hosts.holders(image_id) == {"host-0", first})
    assert tries(hosts) == 2


def test_one_that_is_busy_is_waited_for(hosts: Hosts) -> None:
    """Who finishes copies one after the other is not helped, however long its queue is; nor when it is another one's
    turn that it has to take."""
    busy = [image_id for image_id, others in (new_image() for _ in range(200)) if others[0] == "host-1"][:14]
    late = next(image_id for image_id, others in iter(new_image, None) if others[:2] == ["host-2", "host-1"])
    hosts["host-1"].pause = 0.3
    hosts["host-2"].failure = Unavailable("it failed")
    hosts.start(turn=1.2)
    for image_id in [*busy, late]:
        hosts.upload("host-0", image_id=image_id)
    wait_until(lambda: copies(hosts) == 15, 20)
    assert set(hosts["host-1"].copied) == {*busy, late}


def test_two_at_once(hosts: Hosts) -> None:
    """At each member, and no more."""
    for host in hosts:
        host.pause = 0.05
    hosts.start()
    for _ in range(80):
        hosts.upload("host-0")
    wait_until(lambda: copies(hosts) == 80, 20)
    assert {host.busiest for host in hosts} == {0, 2}


def test_the_rate(hosts: Hosts) -> None:
    """All copies of one member together keep to it."""
    images = [image_id for image_id, others in (new_image() for _ in range(200)) if others[0] == "host-1"][:10]
    hosts.start(rate=1_000_000)
    began = time.monotonic()
    for image_id in images:
        hosts.upload("host-0", 100_000, image_id)
    wait_until(lambda: copies(hosts) == 10)
    assert 0.7 < time.monotonic() - began < 2.5


@pytest.mark.parametrize("reason", ["stale", "no lease", "not live"])
def test_a_member_that_cannot_be_sure(hosts: Hosts, reason: str) -> None:
    """With records that are old, without a lease, or when it is not on record as live itself, a member begins nothing;
    later it does."""
    image_id, (first, *_) = new_image()
    host = hosts[first]
    if reason == "stale":
        host.mirror.lost()
    elif reason == "no lease":
        host.trusted = False
    else:
        host.mirror.leave(first)
    hosts.start()
    hosts.upload("host-0", image_id=image_id)
    time.sleep(A_WHILE)
    assert tries(hosts) == 0
    host.trusted = True
    host.mirror.heard()
    hosts.join(first)
    wait_until(lambda: hosts.holders(image_id) == {"host-0", first})


def test_a_deleted_image(hosts: Hosts) -> None:
    """What was deleted while it waited for its copy gets none."""
    for host in hosts:
        host.gate.clear()
    hosts.start()
    images = [hosts.upload("host-0") for _ in range(80)]
    wait_until(lambda: tries(hosts) == 8)
    for image_id in images:
        hosts.delete(image_id)
    for host in hosts:
        host.gate.set()
    time.sleep(A_WHILE)
    assert tries(hosts) == 8


def test_the_end(hosts: Hosts) -> None:
    """It waits for the copies that are under way, and begins none of those that are due."""
    for host in hosts:
        host.gate.clear()
        host.pause = 0.2
    hosts.start()
    for _ in range(80):
        hosts.upload("host-0")
    wait_until(lambda: tries(hosts) == 8)
    hosts.stop()
    assert copies(hosts) == tries(hosts) == 8
