"""A cluster of three over an etcd of three, to which things happen at random, and which is looked at after each."""

from __future__ import annotations

import os
import random
import time
from contextlib import closing

import pytest

from tests.cluster_of_three import ClusterOfThree, Member
from tests.faults.checks import Checks
from tests.faults.clients import Clients
from tests.faults.deeds import Deeds
from tests.faults.disks import Disks
from tests.faults.model import Model
from tests.faults.plan import FULL_DISKS, PARTITIONS, Step, plan

SETTINGS: dict[str, object] = {
    "fetch_retries": 3,
    # A scrub follows the other, so that what rots is found.
    "scrub_interval": 3,
    "scrub_bytes_per_second": 50_000_000,
    # Copies beyond the wanted number go at once, so that there is always something to pull.
    "cluster_cache_high_water": "1%",
}
# To have the same run again: its seed, and how many of its steps.
SEED = os.environ.get("FAULTS_SEED", "")
STEPS = os.environ.get("FAULTS_STEPS", "")
# A request is answered within ten seconds, and a busy machine takes its time as well.
_ANSWER_SECONDS = 16.0
# After so many steps all is healed, and looked at as in the end.
_STAGE = 40
# What a member says of a disk that we damaged.
_ROT = ("image damaged", "bytes of a complete image are missing", "wrong bytes from a member")


@pytest.mark.timeout(240)
def test_thirty_faults(cluster: ClusterOfThree) -> None:
    run(cluster, 30)


@pytest.mark.release
@pytest.mark.timeout(1800)
def test_two_hundred_faults(cluster: ClusterOfThree) -> None:
    run(cluster, 200)


def run(cluster: ClusterOfThree, count: int) -> None:
    without = frozenset() if cluster.network is not None else PARTITIONS | FULL_DISKS
    seed, count = int(SEED or random.randrange(1 << 32)), int(STEPS or count)
    print("seed", seed, "without", *without)  # noqa: T201 - pytest keeps it for when the test fails
    for member in cluster.members:
        member.timeout = _ANSWER_SECONDS
        member.expect_errors(*_ROT)
    model, disks = Model(), Disks()
    done: list[Step] = []
    began = time.monotonic()
    with closing(Clients(model, cluster.source)) as clients:
        deeds, checks = Deeds(cluster, model, disks, clients), Checks(cluster, model, disks)
        try:
            for step in plan(seed, count, without):
                done.append(step)
                print(f"{time.monotonic() - began:6.1f} s: {step}")  # noqa: T201 - as above
                deeds.do(step)
                clients.look()
                checks.hold(step.random)
                if step.number % _STAGE == 0:
                    settle(deeds, clients, checks)
            settle(deeds, clients, checks)
        except BaseException as error:
            raise AssertionError(f"{error}\n{story(cluster, seed, done)}") from error


def settle(deeds: Deeds, clients: Clients, checks: Checks) -> None:
    """All is healed, and comes to rest."""
    deeds.heal()
    clients.finish()
    checks.hold_for_all()


def story(cluster: ClusterOfThree, seed: int, done: list[Step]) -> str:
    """What was done, and what the members said of it."""
    steps = "\n".join(map(str, done))
    logs = "\n".join(f"--- {member.name}\n{_tail(member)}" for member in cluster.members)
    return f"FAULTS_SEED={seed} FAULTS_STEPS={len(done) - 1}\n{steps}\n{_etcd(cluster)}\n{logs}"


def _etcd(cluster: ClusterOfThree) -> str:
    """Whether etcd's own members have the same records: those of 3.5.1 may come to differ when they are killed."""
    said = []
    for i in range(3):
        try:
            revision = int(
                cluster.etcd.call("/v3/kv/range", {"key": "AA==", "serializable": True}, i)["header"]["revision"]
            )
            said.append(
                f"revision {revision}, hash {cluster.etcd.call('/v3/maintenance/hash', {'revision': revision}, i)}"
            )
        except OSError as error:
            said.append(f"no answer: {error}")
    return "\n".join(f"etcd {i}: {each}" for i, each in enumerate(said))


def _tail(member: Member) -> str:
    """Without the requests that are answered well: most are our own questions."""
    lines = [line for line in member.log if line.get("event") != "request" or line.get("status", 0) >= 400]
    return "\n".join(map(str, lines[-40:]))
