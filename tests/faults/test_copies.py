"""What becomes of copies when a member is lost, for a while or for good, or its disk rots."""

from __future__ import annotations

import http.client
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster_of_three import LEASE, ClusterOfThree, Member
from tests.faults.disks import Disks
from tests.harness import wait_for

SETTINGS: dict[str, object] = {"cluster_replicas": 2, "scrub_interval": 0}
MIB = 1 << 20
SOON = 3 * LEASE + 9.0


def holders_of(cluster: ClusterOfThree, image_id: str, count: int) -> list[Member]:
    wait_for(lambda: len(cluster.stored()[image_id].replicas) == count, 10, f"{count} hold it")
    return [member for member in cluster.members if member.id in cluster.stored()[image_id].replicas]


def whole(member: Member, image_id: str) -> bytes | None:
    """The whole body; None when the connection was cut, or the answer is not 200."""
    try:
        answer = member.download(image_id)
    except (http.client.IncompleteRead, ConnectionError):
        return None
    return answer.body if answer.status == 200 else None


def test_a_member_is_lost_for_good(cluster: ClusterOfThree, tmp_path: Path) -> None:
    """What it held is copied again by the others, and nothing is missed; a new one takes its place."""
    lost, *left = cluster.members
    contents = {lost.upload(content)["id"]: content for content in (os.urandom(100_000) for _ in range(6))}
    for image_id in contents:
        holders_of(cluster, image_id, 2)
    lost.kill()

    def copied() -> bool:
        stored = cluster.stored()
        return all({member.id for member in left} <= set(stored[image_id].replicas) for image_id in contents)

    wait_for(copied, SOON, "all has two live copies")
    with cluster.new_member("d", tmp_path / "d") as new:
        for image_id, content in contents.items():
            assert whole(new, image_id) == content


@pytest.mark.parametrize("away", ["killed", "frozen"])
def test_a_delete_while_a_holder_is_away(cluster: ClusterOfThree, away: str) -> None:
    """It is deleted everywhere else at once, and there as soon as the holder is back."""
    gone, one, other = cluster.members
    image_id = one.upload(b"content")["id"]
    assert [whole(member, image_id) for member in cluster.members] == [b"content"] * 3
    holders_of(cluster, image_id, 3)
    leave: dict[str, Callable[[], None]] = {"killed": gone.kill, "frozen": gone.freeze}
    leave[away]()
    assert one.delete(image_id).status == 200
    for member in (one, other):
        wait_for(lambda member=member: image_id not in member.stored(), SOON, "the bytes are gone")  # type: ignore[misc]
        assert member.download(image_id).status == 404
    assert image_id in gone.stored()
    cluster.start()
    wait_for(lambda: image_id not in gone.stored(), SOON, "the bytes are gone there too")
    for member in cluster.members:
        assert member.get(f"/images/{image_id}").status == 404
    assert cluster.stored() == {}


def test_a_member_with_another_secret(cluster: ClusterOfThree, tmp_path: Path) -> None:
    """It gets no bytes and gives none, and who asks is told why."""
    image_id = cluster.members[0].upload(b"content")["id"]
    holders_of(cluster, image_id, 2)
    with cluster.new_member("d", tmp_path / "d", cluster_secret="another") as stranger:
        answer = stranger.download(image_id)
        assert answer.status == 503
        assert "403: X-Imgsvc-Signature is wrong: has member member-d the same cluster.secret?" in answer.message
        own = stranger.upload(b"its own")["id"]
        answer = cluster.members[0].download(own)
        assert (answer.status, stranger.url in answer.message) == (503, True)


def test_a_pull_does_not_spread_rot(cluster: ClusterOfThree) -> None:
    """Whichever holder is asked: a client of another member never gets a whole body of wrong bytes, and the one with the
    damage is told, sets it aside and takes a good copy."""
    content, disks = os.urandom(3 * MIB), Disks()
    image_id = cluster.members[0].upload(content)["id"]
    rotten, good = holders_of(cluster, image_id, 2)
    puller = next(member for member in cluster.members if member not in (rotten, good))
    rotten.expect_errors("image damaged")
    for other in (puller, good):
        other.expect_errors("wrong bytes from a member")
    disks.rot(rotten, image_id, 2 * MIB)
    damaged = (rotten.images_dir / image_id).read_bytes()
    good.freeze()  # so that the pull begins at the one with the damage
    try:
        assert whole(puller, image_id) is None
        assert image_id not in puller.stored()
    finally:
        good.cont()
    wait_for(lambda: whole(puller, image_id) == content, SOON, "it can be had")
    wait_for(lambda: disks.digest(rotten, image_id) == disks.digest(good, image_id), SOON, "it is mended")
    assert (rotten.images_dir / ".quarantine" / image_id).read_bytes() == damaged
    for member in cluster.members:
        assert whole(member, image_id) == content
    wait_for(lambda: rotten.id in cluster.stored()[image_id].replicas, SOON, "it is on record as a holder again")
