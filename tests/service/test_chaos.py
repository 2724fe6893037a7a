"""Two hosts and the three members of their etcd, killed and frozen at random for a minute, with everything in flight."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence

import pytest

from tests.etcd_cluster import EtcdCluster
from tests.harness import Service, wait_for
from tests.service.conftest import StartService, on_etcd
from tests.service.crash import Clients
from tests.source import Source

SECONDS = 60
# A request is answered within ten; a slow sender, and a busy machine, take their time as well.
SLOWEST = 15.0


class Trouble:
    """What is done to hosts and members."""

    def __init__(self, hosts: Sequence[Service], cluster: EtcdCluster, chance: random.Random) -> None:
        self._hosts = hosts
        self._cluster = cluster
        self._chance = chance
        self._lost: set[int] = set()

    def make(self) -> None:
        deeds = [self._lose_a_member, self._lose_a_member, self._kill_a_host, self._kill_a_host, self.end, self.end]
        deed: Callable[[], None] = self._chance.choice(deeds)
        deed()

    def end(self) -> None:
        self._cluster.restore()
        self._lost.clear()

    def _lose_a_member(self) -> None:
        left = sorted({0, 1, 2} - self._lost)
        if left:
            member = self._chance.choice(left)
            self._chance.choice([self._cluster.kill, self._cluster.stop])(member)
            self._lost.add(member)

    def _kill_a_host(self) -> None:
        host = self._chance.choice(self._hosts)
        host.kill()
        time.sleep(self._chance.uniform(0, 1))
        host.start(wait=False)
        host.wait_listening()


@pytest.mark.release
@pytest.mark.timeout(300)
def test_everything_fails_at_random(
    start_service: StartService, etcd_cluster: EtcdCluster, etcd_prefix: str, source: Source, seed: int
) -> None:
    """Whatever happens in whichever order: each request is answered in time, and in the end nothing is in transfer,
    lost, back or left over."""
    settings = on_etcd(etcd_cluster, etcd_prefix)
    hosts = [start_service(**settings, fetch_concurrency=8) for _ in range(2)]
    clients = [Clients(host, source, random.Random(seed + n)) for n, host in enumerate(hosts)]
    chance = random.Random(seed)
    trouble = Trouble(hosts, etcd_cluster, chance)
    for each in clients:
        each.start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        time.sleep(chance.uniform(0.2, 3))
        trouble.make()
    trouble.end()
    for each in clients:
        each.stop()
        each.service.wait_ready()
        assert each.slowest < SLOWEST
    for each in clients:
        each.finish_uploads()
    assert_no_lie_anywhere(hosts, clients)


def assert_no_lie_anywhere(hosts: Sequence[Service], clients: Sequence[Clients]) -> None:
    def in_transfer() -> list[dict[str, object]]:
        return [image for image in hosts[0].images() if image["status"] not in ("complete", "error")]

    # In this order: a claim may be of a record that is still to come, and a record outlasts its claim by a moment.
    for host in hosts:
        wait_for(lambda host=host: host.incoming() == set(), 30, ".incoming is empty")  # type: ignore[misc]
    wait_for(lambda: in_transfer() == [], 5, "every transfer has ended")
    images = {image["id"]: image for image in hosts[0].images()}
    complete = {image_id for image_id, image in images.items() if image["status"] == "complete"}
    for each in clients:
        assert each.kept() <= complete, [images.get(image_id) for image_id in each.kept() - complete]
        assert not each.deleted & images.keys(), [images[image_id] for image_id in each.deleted & images.keys()]
    stored = [image_id for host in hosts for image_id in host.stored()]
    assert sorted(stored) == sorted(complete)
    acknowledged = {**clients[0].digests, **clients[1].digests}
    for host in hosts:
        for image_id in host.stored():
            digest = hashlib.sha256(host.download(image_id).body).hexdigest()
            assert digest == images[image_id]["sha256"] == acknowledged.get(image_id, digest)
