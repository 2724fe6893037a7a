"""A member is lost in mid-transfer, for good or for longer than its lease: what becomes of what it was bringing in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.client import Connection
from tests.cluster_of_three import LEASE, ClusterOfThree, Member, StartCluster
from tests.etcd_cluster import EtcdCluster
from tests.harness import wait_for
from tests.service.conftest import StartService, on_etcd
from tests.service.helpers import begin_upload
from tests.source import Resource
from tests.tus import Tus, id_of

MIB = 1 << 20
# For members that are there to drop what is deleted: two seconds, on a machine with time.
STOPS = 3.0
# Within which nothing is left in transfer without a live owner.
SETTLED = 3.0 * LEASE
# Fetches at once, and those that wait behind them.
RUNNING, WAITING = 2, 20


@pytest.fixture(scope="module")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOfThree]:
    directories = [tmp_path_factory.mktemp(name) for name in "abc"]
    with ClusterOfThree(directories, cluster_replicas=1, fetch_concurrency=RUNNING) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: ClusterOfThree) -> Iterator[ClusterOfThree]:
    """Three members, all of which are ready at the beginning, and of whose logs nothing bad may come."""
    _cluster.start()
    yield _cluster
    for member in _cluster.members:
        member.check_log()


@dataclass
class Fetching:
    """The image of a source that stops after a part of its bytes."""

    path: str
    url: str
    resource: Resource
    id: str


def fetching(cluster: ClusterOfThree, member: Member, count: int) -> list[Fetching]:
    """So many fetches at the member, of which the first have begun."""
    found = []
    for number in range(count):
        path = f"/{time.monotonic_ns()}"
        resource = Resource(os.urandom(MIB) + b"%d" % number, stall_after=MIB // 2)
        url = cluster.source.serve(path, resource)
        found.append(Fetching(path, url, resource, member.fetch(url)["id"]))
    for fetch in found[:RUNNING]:
        member.wait_status(fetch.id, "downloading")
    return found


def owners(cluster: ClusterOfThree, fetches: list[Fetching]) -> set[str]:
    stored = cluster.stored()
    return {stored[fetch.id].owner for fetch in fetches}


def assert_fetched(cluster: ClusterOfThree, fetch: Fetching, members: set[str]) -> None:
    """By one of the members, whole, under the id that it always had, and nothing of it is anywhere else."""
    (holder,) = {member for member in cluster.members if member.id in cluster.stored()[fetch.id].replicas}
    assert holder.id in members
    assert holder.download(fetch.id).body == fetch.resource.body
    assert holder.fetch(fetch.url)["id"] == fetch.id
    for member in cluster.live():
        assert (fetch.id in member.stored()) == (member is holder)
        wait_for(lambda member=member: fetch.id not in member.incoming(), 5, "nothing is left")  # type: ignore[misc]


def test_a_member_that_is_killed(cluster: ClusterOfThree) -> None:
    """The others fetch what it fetched and what waited, each a part, and once. Its plain upload is in error, which names
    it; one that can be resumed waits for it, and goes on when it is back."""
    lost, *others = cluster.members
    live = {member.id for member in others}
    fetches = fetching(cluster, lost, RUNNING + WAITING)
    tus = Tus(lost)
    path, content = tus.create(MIB), os.urandom(MIB)
    tus.bring(path, 0, content[: MIB // 2])
    with Connection(lost.port) as connection:
        uploaded = begin_upload(lost, connection, 2 * MIB, bytes(MIB))
        name, url = lost.id, lost.url
        lost.kill()
    killed = time.monotonic()

    wait_for(lambda: owners(cluster, fetches) <= live, SETTLED, "the others have taken over")
    failed = others[0].wait_status(uploaded, "error", timeout=killed + SETTLED - time.monotonic())
    assert name in failed["error"]
    assert url in failed["error"]
    assert owners(cluster, fetches) == live
    for fetch in fetches:
        fetch.resource.resume()
    for fetch in fetches:
        others[1].wait_status(fetch.id, "complete")
        assert len(cluster.source.asked(fetch.path)) == (2 if fetch in fetches[:RUNNING] else 1)
    assert others[0].image(id_of(path))["status"] == "downloading"
    answer = Tus(others[0]).patch(path, MIB // 2)
    assert (answer.status, f"{name} at {url}" in answer.message) == (503, True), answer.message

    lost.start()
    assert tus.offset(path) == MIB // 2
    tus.bring(path, MIB // 2, content[MIB // 2 :])
    assert lost.download(id_of(path)).body == content
    for fetch in fetches:
        assert_fetched(cluster, fetch, live)
    assert uploaded not in lost.incoming() | lost.stored()


@pytest.mark.release
def test_a_member_that_is_back_before_its_lease_ends(start_cluster: StartCluster) -> None:
    """It settles its own as ever, on a new lease: the end of the old one takes nothing away from it."""
    cluster = start_cluster(cluster_replicas=1, cluster_lease_ttl=6)
    lost, other, _ = cluster.members
    (fetch,) = fetching(cluster, lost, 1)
    with Connection(lost.port) as connection:
        uploaded = begin_upload(lost, connection, 2 * MIB, bytes(MIB))
        lost.kill()
    lost.start()
    assert "stopped" in other.image(uploaded)["error"]
    time.sleep(7)
    assert cluster.stored()[fetch.id].owner == lost.id
    fetch.resource.resume()
    other.wait_status(fetch.id, "complete")
    assert_fetched(cluster, fetch, {lost.id})


def test_a_member_that_is_frozen(cluster: ClusterOfThree) -> None:
    """When it goes on, it gives way: its source's connection ends, its uploader gets an error, nothing of either is left,
    and its successor is not disturbed. What waited for it goes on."""
    frozen, *others = cluster.members
    (fetch,) = fetching(cluster, frozen, 1)
    tus = Tus(frozen)
    path, content = tus.create(MIB), os.urandom(MIB)
    tus.bring(path, 0, content[: MIB // 2])
    with Connection(frozen.port) as connection:
        uploaded = begin_upload(frozen, connection, 2 * MIB, bytes(MIB))
        frozen.freeze()
        live = {member.id for member in others}
        wait_for(lambda: owners(cluster, [fetch]) <= live, SETTLED, "another has taken over")
        others[0].wait_status(uploaded, "error", timeout=SETTLED)
        others[0].wait_status(fetch.id, "downloading")
        frozen.cont()
        assert connection.readable(5), "the uploader was not told"
        assert connection.answer().status == 409
    first, second = cluster.source.asked(fetch.path)
    assert first.closed.wait(5), "the source is still read by two"
    wait_for(lambda: frozen.incoming() == {id_of(path), f"{id_of(path)}.notes"}, 5, "the rest is gone")
    tus.bring(path, MIB // 2, content[MIB // 2 :])
    assert not second.closed.is_set()
    fetch.resource.resume()
    others[0].wait_status(fetch.id, "complete")
    assert_fetched(cluster, fetch, live)
    assert len(cluster.source.asked(fetch.path)) == 2
    assert frozen.stored() & {fetch.id, uploaded} == set()


@pytest.mark.parametrize("away", ["frozen", pytest.param("killed", marks=pytest.mark.release)])
def test_deletion_while_a_member_is_away(cluster: ClusterOfThree, away: str) -> None:
    """Whoever is asked: every member that is there drops its copy and stops its transfer within two seconds, and the one
    that is away as soon as it is back."""
    one, other, lost = cluster.members
    image_id, kept = one.upload(os.urandom(MIB))["id"], one.upload(b"kept")["id"]
    (fetch,) = fetching(cluster, other, 1)
    for member in (other, lost):
        member.download(image_id)
        wait_for(lambda member=member: image_id in member.stored(), 5, "it has a copy")  # type: ignore[misc]
    wait_for(lambda: len(cluster.stored()[image_id].replicas) == 3, 5, "all have copies")
    lost.freeze() if away == "frozen" else lost.kill()
    for deleted in (image_id, fetch.id):
        assert one.delete(deleted).status == 200
        wait_for(lambda: not any(holds(member, deleted) for member in (one, other)), STOPS, "it is gone")  # noqa: B023
    assert cluster.source.asked(fetch.path)[0].closed.wait(STOPS)
    assert not {image_id, fetch.id} & cluster.stored().keys()
    assert image_id in lost.stored()
    cluster.start()
    wait_for(lambda: not holds(lost, image_id), 10, "the copy is gone")
    for member in cluster.members:
        assert member.get(f"/images/{image_id}").status == 404
    assert kept in one.stored()


def holds(member: Member, image_id: str) -> bool:
    return image_id in member.stored() | member.incoming()


@pytest.mark.release
def test_a_member_that_is_cut_from_etcd(start_cut_cluster: StartCluster) -> None:
    """It serves what it has, and says how old its knowledge is; what it was bringing in is taken over. When it is back it
    gives way."""
    cluster = start_cut_cluster(cluster_replicas=1)
    cut, *others = cluster.members
    live = {member.id for member in others}
    kept = cut.upload(b"kept")["id"]
    (fetch,) = fetching(cluster, cut, 1)
    with cut.connect(timeout=30) as connection:
        uploaded = begin_upload(cut, connection, 2 * MIB, bytes(MIB))
        cluster.cut_from_etcd(cut)
        wait_for(lambda: owners(cluster, [fetch]) <= live, 1.5 * SETTLED, "another has taken over")
        others[0].wait_status(uploaded, "error", timeout=SETTLED)
        answer = cut.download(kept)
        assert (answer.status, answer.body) == (200, b"kept")
        assert int(answer.headers["X-Imgsvc-Stale"]) >= LEASE
        assert {image["id"] for image in cut.images()} == {kept, fetch.id, uploaded}
        assert not connection.readable(0)
        cluster.heal()
        assert connection.readable(15), "the uploader was not told"
        assert connection.answer().status == 409
    first, second = cluster.source.asked(fetch.path)
    assert first.closed.wait(5), "the source is still read by two"
    assert not second.closed.is_set()
    fetch.resource.resume()
    others[0].wait_status(fetch.id, "complete")
    assert_fetched(cluster, fetch, live)
    assert cut.incoming() == set()


@pytest.mark.release
def test_an_upload_that_waits_for_its_member_expires(
    etcd: EtcdCluster, etcd_prefix: str, start_service: StartService
) -> None:
    """Not before its client could have gone on, and soon after."""
    settings = {**on_etcd(etcd, etcd_prefix), "cluster_lease_ttl": LEASE, "uploads_expire": 6}
    lost, other = start_service(**settings), start_service(**settings)
    tus = Tus(lost)
    path = tus.create(MIB)
    tus.bring(path, 0, bytes(MIB // 2))
    time.sleep(2)
    tus.bring(path, MIB // 2, bytes(MIB // 4))
    last = time.monotonic()
    time.sleep(1)  # in which the others are told
    lost.kill()
    failed = other.wait_status(id_of(path), "error", timeout=15)
    assert 6 <= time.monotonic() - last < 6.6 + SETTLED
    assert lost.url in failed["error"]
    lost.start()
    assert tus.head(path).status == 410
    assert lost.incoming() == set()


@pytest.mark.release
def test_a_source_that_is_asked_for_while_its_member_is_gone(cluster: ClusterOfThree) -> None:
    """POSTs of it at the others get the image that there is, before it is taken over and after."""
    lost, *others = cluster.members
    (fetch,) = fetching(cluster, lost, 1)
    lost.kill()
    with ThreadPoolExecutor(2) as pool:

        def ask(member: Member) -> set[str]:
            ids = set()
            while cluster.stored()[fetch.id].owner not in {member.id for member in others}:
                ids.add(member.fetch(fetch.url)["id"])
            return ids

        assert set().union(*pool.map(ask, others)) == {fetch.id}
    fetch.resource.resume()
    others[0].wait_status(fetch.id, "complete")
    assert len(cluster.source.asked(fetch.path)) == 2
