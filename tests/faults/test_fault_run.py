"""A cluster of three over an etcd of three, to which things happen at random, and which is looked at after each."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.cluster_of_three import ClusterOfThree, StartCluster
from tests.faults.checks import Checks
from tests.faults.clients import Clients
from tests.faults.deeds import Deeds
from tests.faults.disks import Disks
from tests.faults.model import Model
from tests.faults.plan import FULL_DISKS, PARTITIONS, Step, plan
from tests.mounts import Mount
from tests.namespaces import Network, why_no_namespaces

# To have the same run again: its seed, and how many of its steps.
SEED = os.environ.get("FAULTS_SEED", "")
STEPS = os.environ.get("FAULTS_STEPS", "")
_DISK_BYTES = 64 << 20
# A request is answered within ten seconds, and a busy machine takes its time as well.
_ANSWER_SECONDS = 16.0
# After so many steps all is healed, and looked at as in the end.
_STAGE = 40


@pytest.mark.timeout(180)
def test_thirty_faults(cluster: ClusterOfThree, without: frozenset[str]) -> None:
    run(cluster, 30, without)


@pytest.mark.release
@pytest.mark.timeout(1200)
def test_two_hundred_faults(cluster: ClusterOfThree, without: frozenset[str]) -> None:
    run(cluster, 200, without)


@pytest.fixture
def without() -> frozenset[str]:
    """The faults that cannot be had here: who is not root gets the others."""
    return frozenset() if not why_no_namespaces() else PARTITIONS | FULL_DISKS


@pytest.fixture
def cluster(
    start_cluster: StartCluster, request: pytest.FixtureRequest, tmp_path: Path, without: frozenset[str]
) -> Iterator[ClusterOfThree]:
    if without:
        yield start_cluster(**_SETTINGS)
        return
    directories = [tmp_path / name for name in "abc"]
    mount: Mount = request.getfixturevalue("mount")
    for directory in directories:
        directory.mkdir()
        mount("-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "imgsvc-test", directory)
    with (
        Network() as network,
        ClusterOfThree(directories, network, **_SETTINGS) as cluster,
    ):
        yield cluster


# A scrub follows the other, so that what rots is found.
_SETTINGS: dict[str, object] = {"scrub_interval": 2, "scrub_bytes_per_second": 50_000_000, "fetch_retries": 3}


def run(cluster: ClusterOfThree, count: int, without: frozenset[str]) -> None:
    seed = int(SEED or random.randrange(1 << 32))
    model, disks = Model(), Disks()
    done: list[Step] = []
    began = time.monotonic()
    print("seed", seed)  # noqa: T201 - pytest keeps it for when the test fails
    for member in cluster.members:
        member.timeout = _ANSWER_SECONDS
        member.expect_errors("image damaged", "bytes of a complete image are missing")
    with closing(Clients(model, cluster.source)) as clients:
        deeds, checks = Deeds(cluster, model, disks, clients), Checks(cluster, model, disks)
        try:
            for step in plan(seed, int(STEPS or count), without):
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
    deeds.heal()
    clients.finish()
    checks.hold_for_all()


def story(cluster: ClusterOfThree, seed: int, done: list[Step]) -> str:
    """What was done, and what the members said of it."""
    steps = "\n".join(map(str, done))
    logs = "\n".join(f"--- {member.name}\n{member.tail()}" for member in cluster.members)
    return f"FAULTS_SEED={seed} FAULTS_STEPS={len(done)}\n{steps}\n{logs}"
