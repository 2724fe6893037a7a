"""As many copies as are wanted, at real members: made in the background or before an upload is answered, dropped when
the disk is short, and never one too few."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.client import Answer, Connection
from tests.cluster_of_three import ClusterOfThree, Member, StartCluster
from tests.harness import Service, wait_for
from tests.mounts import Mount
from tests.service.conftest import StartService

MIB = 1 << 20
# For what must not happen.
A_WHILE = 1.0


def put(service: Service, body: bytes, copies: object, **headers: str) -> Answer:
    """An upload that so many members are to hold before it is answered."""
    return service.request("PUT", "/images", body, {"X-Image-Type": "kvm", "X-Image-Replicas": str(copies), **headers})


def replicas(member: Member, image_id: str) -> list[str]:
    return list(member.image(image_id)["replicas"])


def wait_replicas(member: Member, image_id: str, count: int, seconds: float = 15) -> list[str]:
    wait_for(lambda: len(replicas(member, image_id)) >= count, seconds, f"{count} members hold it")
    return replicas(member, image_id)


def named(cluster: ClusterOfThree, names: Sequence[str]) -> list[Member]:
    return [member for member in cluster.members if member.id in names]


def test_a_dead_member(start_cluster: StartCluster) -> None:
    """Each image gets its second copy; when a holder dies it gets another one, which is whole; who is back has still
    what it had."""
    cluster = start_cluster()
    a, *_ = cluster.members
    contents = [os.urandom(MIB) for _ in range(6)]
    images = [a.upload(content)["id"] for content in contents]
    for image_id in images:
        assert len(wait_replicas(a, image_id, 2)) == 2
    a.kill()
    live = cluster.live()
    for image_id, content in zip(images, contents, strict=True):
        assert len(wait_replicas(live[0], image_id, 3)) == 3
        for member in live:
            assert image_id in member.stored()
            assert member.download(image_id).body == content
    cluster.start()
    assert a.stored() == set(images)


@pytest.mark.release
def test_a_restart(start_cluster: StartCluster) -> None:
    """Of a member that is back within cluster.rebalanceDelay, nothing is copied."""
    cluster = start_cluster(cluster_rebalance_delay=60)
    a, b, c = cluster.members
    image_id = a.upload(b"content")["id"]
    (other,) = [member for member in named(cluster, wait_replicas(a, image_id, 2)) if member is not a]
    other.kill()
    wait_for(lambda: other.id not in [member["id"] for member in a.get("/members").json()], 10, "its lease has ended")
    time.sleep(A_WHILE)
    cluster.start()
    time.sleep(A_WHILE)
    assert sum(image_id in member.stored() for member in (a, b, c)) == 2


@pytest.fixture(scope="module")
def _single_copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOfThree]:
    directories = [tmp_path_factory.mktemp(name) for name in "abc"]
    with ClusterOfThree(directories, cluster_replicas=1, cluster_lease_ttl=4) as cluster:
        yield cluster


@pytest.fixture
def single_copies(_single_copies: ClusterOfThree) -> Iterator[ClusterOfThree]:
    """A cluster that wants one copy of each image, for more than one test, with all its members live."""
    _single_copies.start()
    a, *_ = _single_copies.members
    wait_for(lambda: len(a.get("/members").json()) == 3, 10, "all are live")
    yield _single_copies
    for member in _single_copies.members:
        member.check_log()


def test_an_upload_that_waits(single_copies: ClusterOfThree) -> None:
    """X-Image-Replicas: when the answer comes, so many have the image on their disks, and on record."""
    a, b, c = single_copies.members
    for copies in (1, 2, 3):
        content = os.urandom(3 * MIB)
        answer = put(a, content, copies)
        assert answer.status == 200
        image = answer.json()
        holders = named(single_copies, replicas(a, image["id"]))
        assert len(holders) == copies
        assert image["replicas"] == sorted(member.id for member in holders)
        assert sum(image["id"] in member.stored() for member in (a, b, c)) == copies
        for member in holders:
            assert member.download(image["id"]).body == content


def begin_waiting(connection: Connection, member: Member) -> str:
    """An upload that three members are to hold, and which is complete at this one; returns its id."""
    before = {image["id"] for image in member.images()}
    connection.begin_upload(7, "X-Image-Replicas: 3")
    connection.send(b"content")
    complete: list[str] = []

    def came() -> bool:
        complete.extend(image["id"] for image in member.images() if image["status"] == "complete")
        return bool(set(complete) - before)

    wait_for(came, 5, "it is complete here")
    return next(iter(set(complete) - before))


def test_a_client_that_leaves(single_copies: ClusterOfThree) -> None:
    """While it waits for a member that hangs: the image stays, and the copies are made all the same."""
    a, _, c = single_copies.members
    c.freeze()
    with a.connect() as connection:
        image_id = begin_waiting(connection, a)
        assert not connection.readable(0.3)
    c.cont()
    assert len(wait_replicas(a, image_id, 3)) == 3


@pytest.mark.release
def test_a_stop_meanwhile(single_copies: ClusterOfThree) -> None:
    """Who waits for copies is told, and does not hold up the stop for longer than other requests do."""
    a, _, c = single_copies.members
    c.freeze()
    with a.connect() as connection:
        image_id = begin_waiting(connection, a)
        began = time.monotonic()
        assert a.terminate() == 0
        assert time.monotonic() - began < 8
        assert connection.answer().status == 503
    c.cont()
    single_copies.start()
    assert a.download(image_id).body == b"content"


def test_too_few_members(single_copies: ClusterOfThree) -> None:
    """A member that died a moment ago cannot do its part: the 503 says how many did, and the image stays. Once it is
    known to be dead, the upload is refused before its body."""
    a, b, c = single_copies.members
    before = a.images()
    c.kill()
    answer = put(a, b"content", 3)
    assert answer.status == 503
    (image,) = (image for image in a.images() if image not in before)
    assert answer.message == f"the image {image['id']} is complete here, and 2 of 3 members have it"
    assert image["status"] == "complete"
    assert sorted(replicas(a, image["id"])) == sorted([a.id, b.id])
    wait_for(lambda: len(a.get("/members").json()) == 2, 10, "its lease has ended")
    with a.connect() as connection:
        connection.begin_upload(1000, "X-Image-Replicas: 3")
        answer = connection.answer()
    assert (answer.status, answer.message) == (503, "3 members are to hold the image, and 2 are live")
    assert put(a, b"content", 2).status == 200
    assert len(a.images()) == len(before) + 2


def test_a_wrong_number(start_service: StartService) -> None:
    """It is 400 before the body, and says which header is wrong; also when it is said twice, for nobody knows what was
    meant. Where records are not shared, one copy can be had and two cannot."""
    service = start_service()
    for said in ("0", "-1", "two", "1.5", "", "17", "2, 2", "+2", "02", "1\r\nX-Image-Replicas: 1"):
        with service.connect() as connection:
            connection.begin_upload(1000, f"X-Image-Replicas: {said}")
            answer = connection.answer()
        assert (answer.status, "X-Image-Replicas" in answer.message) == (400, True), said
    answer = put(service, b"content", 2)
    assert (answer.status, "shares its records with no other" in answer.message) == (400, True)
    assert service.images() == []
    assert put(service, b"content", 1).status == 200


def test_a_full_disk(mount: Mount, tmp_path: Path, start_cluster: StartCluster) -> None:
    """Copies that are not needed make way for what comes in, those that were not served for the longest time first;
    what only this member has stays. An upload does not fail for want of space that such copies take."""
    small = tmp_path / "a"
    small.mkdir()
    mount("-t", "tmpfs", "-o", f"size={48 * MIB}", "imgsvc-test", small)
    cluster = start_cluster(cluster_replicas=1, cluster_cache_high_water="100%")
    a, b, c = cluster.members
    contents = {b.upload(content)["id"]: content for content in (os.urandom(8 * MIB) for _ in range(4))}
    spare = list(contents)
    own = a.upload(os.urandom(8 * MIB))["id"]
    for image_id in [*spare, spare[0]]:
        assert a.download(image_id).body == contents[image_id]
    wait_for(lambda: a.stored() == {own, *spare}, 5, "all are here")
    first = a.upload(os.urandom(12 * MIB))["id"]
    assert a.stored() == {own, first, spare[2], spare[3], spare[0]}
    second = a.upload(os.urandom(12 * MIB))["id"]
    assert a.stored() == {own, first, second, spare[0]}
    assert a.put(os.urandom(24 * MIB)).status == 507
    assert a.stored() == {own, first, second, spare[0]}
    for image_id in spare:
        assert b.id in replicas(a, image_id)
        assert c.download(image_id).body == contents[image_id]


@pytest.mark.release
def test_above_the_mark(mount: Mount, tmp_path: Path, start_cluster: StartCluster) -> None:
    """What is beyond cluster.cacheHighWater goes by itself, and is not copied again."""
    for name, size in (("a", 48), ("b", 200), ("c", 200)):
        (tmp_path / name).mkdir()
        mount("-t", "tmpfs", "-o", f"size={size * MIB}", "imgsvc-test", tmp_path / name)
    cluster = start_cluster(cluster_replicas=2, cluster_cache_high_water="40%")
    a, b, c = cluster.members
    images = [put(b, os.urandom(8 * MIB), 3).json()["id"] for _ in range(4)]
    wait_for(lambda: len(a.stored()) <= 2, 20, "copies are dropped")
    time.sleep(A_WHILE)
    assert len(a.stored()) == 2
    assert b.stored() == c.stored() == set(images)
    for image_id in images:
        assert (a.id in replicas(b, image_id)) == (image_id in a.stored())


@pytest.mark.release
def test_the_end(start_cluster: StartCluster) -> None:
    """A member that copies slowly in the background, or waits for others, stops at once all the same."""
    cluster = start_cluster(cluster_replicas=3, cluster_copy_bytes_per_second=MIB)
    a, b, c = cluster.members
    image_id = a.upload(os.urandom(24 * MIB))["id"]
    wait_for(lambda: image_id in b.incoming() and image_id in c.incoming(), 10, "they copy")
    began = time.monotonic()
    assert b.terminate() == 0
    assert time.monotonic() - began < 6
    assert c.terminate() == 0
    assert b.stored() == c.stored() == set()
