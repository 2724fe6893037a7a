"""Copies that somebody waits for: at whom they are ordered, and what is said when there are too few."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from imgsvc.cluster.orders import Orders
from imgsvc.cluster.presence import has_room
from imgsvc.cluster.rendezvous import ranked
from imgsvc.errors import Conflict, Invalid, NoSpace, Unavailable
from imgsvc.metadata.image import Image
from imgsvc.metadata.mirror import LiveMember
from tests.cluster.hosts import Hosts
from tests.rooms import wait_until

FITS = functools.partial(has_room, lambda _total: 0)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path, 4) as hosts:
        yield hosts


class Line:
    """To the hosts, which do as they are told."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    def copy(self, member: LiveMember, image_id: str, within: float) -> None:
        assert within > 0
        self._hosts[member.id].copy(self._hosts.known(image_id).image)


@pytest.fixture
def orders(hosts: Hosts) -> Iterator[Orders]:
    """Those of host-0."""
    with closing(Orders(hosts["host-0"].mirror, Line(hosts), "host-0", FITS, patience=20)) as orders:
        yield orders


def upload(hosts: Hosts) -> tuple[Image, list[str]]:
    """An image at host-0, and the others in its order."""
    image_id = hosts.upload("host-0")
    order = [member for member in ranked(image_id, [host.id for host in hosts]) if member != "host-0"]
    return hosts.known(image_id).image, order


def test_those_that_come_first(hosts: Hosts, orders: Orders) -> None:
    """They are asked, and no others: so that copies are where they will be looked for. The answer names them."""
    image, (first, second, _) = upload(hosts)
    assert orders.wait_for(image, 1) == image
    assert hosts.holders(image.id) == {"host-0"}
    assert orders.wait_for(image, 3).replicas == tuple(sorted(["host-0", first, second]))
    assert hosts.holders(image.id) == {"host-0", first, second}


@pytest.mark.parametrize("failure", [Unavailable("it failed"), NoSpace("it is full"), ValueError("a mistake")])
def test_one_that_cannot(hosts: Hosts, orders: Orders, failure: Exception) -> None:
    """Another is asked in its place."""
    image, (first, second, third) = upload(hosts)
    hosts[first].failure = failure
    orders.wait_for(image, 3)
    assert hosts.holders(image.id) == {"host-0", second, third}


def test_a_full_one_is_asked_last(hosts: Hosts, orders: Orders) -> None:
    """It may be able to make room, if there is nobody else."""
    image, (first, second, third) = upload(hosts)
    hosts.join(first, free=10)
    orders.wait_for(image, 3)
    assert hosts.holders(image.id) == {"host-0", second, third}
    orders.wait_for(image, 4)
    assert hosts[first].copied == [image.id]


def test_too_few(hosts: Hosts, orders: Orders) -> None:
    """When nobody is left to be asked, that is said at once, with the number."""
    image, (first, second, third) = upload(hosts)
    hosts[first].failure = hosts[third].failure = Unavailable("it failed")
    began = time.monotonic()
    with pytest.raises(Unavailable, match=f"the image {image.id} is complete here, and 2 of 3 members have it"):
        orders.wait_for(image, 3)
    assert time.monotonic() - began < 10
    assert hosts.holders(image.id) == {"host-0", second}


def test_too_late(hosts: Hosts) -> None:
    """It is said as soon as the time is over, and the copies go on."""
    image, (first, second, _) = upload(hosts)
    hosts[second].gate.clear()
    orders = Orders(hosts["host-0"].mirror, Line(hosts), "host-0", FITS, patience=1.5)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="and 2 of 3 members have it"):
        orders.wait_for(image, 3)
    assert 1.4 < time.monotonic() - began < 2.5
    hosts[second].gate.set()
    wait_until(lambda: hosts.holders(image.id) == {"host-0", first, second})


def test_a_copy_that_came_another_way(hosts: Hosts, orders: Orders) -> None:
    """One that is on record counts, whoever saw to it; one of a member that is not live does not."""
    image, (first, second, third) = upload(hosts)
    for host in hosts:
        host.failure = Unavailable("it failed")
    hosts.hold(image.id, first)
    orders.wait_for(image, 2)
    hosts.leave(first)
    with pytest.raises(Unavailable, match="1 of 2"):
        orders.wait_for(image, 2)
    for host in hosts:
        host.failure = None
    hosts[second].gate.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(orders.wait_for, image, 2)
        hosts.hold(image.id, third)
        waiting.result(2)
    hosts[second].gate.set()


def test_a_deleted_image(hosts: Hosts, orders: Orders) -> None:
    """Who waits for copies of it is told so."""
    image, (first, *_) = upload(hosts)
    hosts[first].gate.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(orders.wait_for, image, 2)
        wait_until(lambda: bool(hosts[first].tried))
        hosts.delete(image.id)
        with pytest.raises(Conflict, match="deleted"):
            waiting.result(2)
    hosts[first].failure = Unavailable("it is gone")
    hosts[first].gate.set()


def test_the_end(hosts: Hosts, orders: Orders) -> None:
    """Who waits when the service stops is told how many have the image."""
    image, (first, *_) = upload(hosts)
    hosts[first].gate.clear()
    slow = Orders(hosts["host-0"].mirror, Line(hosts), "host-0", FITS)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(slow.wait_for, image, 2)
        wait_until(lambda: bool(hosts[first].tried))
        slow.close()
        with pytest.raises(Unavailable, match="1 of 2"):
            waiting.result(2)
    hosts[first].gate.set()


def test_more_than_there_are(hosts: Hosts, orders: Orders) -> None:
    """It is said before anything comes in, also where there can be no other members at all."""
    orders.require(4)
    with pytest.raises(Unavailable, match="5 members are to hold the image, and 4 are live"):
        orders.require(5)
    alone = Orders(None, Line(hosts), "host-0", FITS)
    alone.require(1)
    with pytest.raises(Invalid, match="with no other"):
        alone.require(2)


def test_many_at_once(hosts: Hosts) -> None:
    """All get what they asked for."""
    orders = Orders(hosts["host-0"].mirror, Line(hosts), "host-0", FITS, patience=10)
    images = [upload(hosts)[0] for _ in range(100)]
    with ThreadPoolExecutor(100) as pool:
        list(pool.map(lambda image: orders.wait_for(image, 3), images))
    assert all(len(hosts.holders(image.id)) == 3 for image in images)
