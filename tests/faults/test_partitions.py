"""Members that are cut off from etcd or from each other, or away: each serves what it can, says what it cannot, and is
one of them again when that is over."""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.client import Answer
from tests.cluster_of_three import LEASE, ClusterOfThree, Member
from tests.harness import wait_for
from tests.source import Resource

MIB = 1 << 20
# Each image is where it came in, and where it was downloaded.
SETTINGS: dict[str, object] = {"cluster_replicas": 1}
pytestmark = pytest.mark.usefixtures("partitions")
# A read is answered from memory within a second when etcd is silent, on a machine that others use as well.
READS = 3.0
# A write gives up within ten.
WRITES = 11.0
# Until a member is taken for dead and another one has done its work, and until it is back.
TAKEN_OVER = 3 * LEASE + 6.0
BACK = 15.0


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds, f"{what} took {time.monotonic() - began:.1f} s"


def stale(answer: Answer) -> bool:
    return int(answer.headers.get("X-Imgsvc-Stale", "0")) > 0


def copy_to(cluster: ClusterOfThree, image_id: str, *members: Member) -> None:
    """By downloads; and etcd knows."""
    for member in members:
        assert member.download(image_id).status == 200
    wanted = {member.id for member in members}
    wait_for(lambda: set(cluster.stored()[image_id].replicas) >= wanted, 10, f"{image_id} is held by {wanted}")


def download_from_all(members: list[Member], image_id: str, content: bytes) -> None:
    """Each has it soon."""
    for member in members:
        wait_for(lambda member=member: member.download(image_id).body == content, BACK, f"{member.name} has it")  # type: ignore[misc]


def test_a_member_cut_from_etcd_serves_what_it_has(cluster: ClusterOfThree) -> None:
    """And says how old its knowledge is; writes are refused, and say when to come again. When it is back it has dropped
    what was deleted meanwhile, and is live."""
    cut, one, _ = cluster.members
    content = os.urandom(MIB)
    kept, deleted = one.upload(content)["id"], one.upload(b"deleted")["id"]
    for image_id in (kept, deleted):
        copy_to(cluster, image_id, cut)
    cluster.cut_from_etcd(cut)
    # It notices with the first question to etcd.
    for path in (f"/images/{kept}", "/images", f"/images/{kept}/download"):
        with within(READS, path):
            answer = cut.get(path)
        assert (answer.status, stale(answer)) == (200, True), path
    with ThreadPoolExecutor(3) as pool, within(WRITES, "writes"):
        source = {"source": f"{cluster.source.url}/new", "type": "kvm"}
        refused = [
            pool.submit(cut.put, b"refused"),
            pool.submit(cut.post, source),
            pool.submit(cut.delete, kept),
        ]
        answers = [each.result() for each in refused]
    for answer in answers:
        assert answer.status == 503, answer.body
        assert int(answer.headers["Retry-After"]) > 0
    wait_for(lambda: cut.id not in cluster.live_in_etcd(), TAKEN_OVER, "it is taken for dead")
    assert cut.id not in {member["id"] for member in one.get("/members").json()}
    assert one.delete(deleted).status == 200
    assert cut.download(deleted).status == 200  # it cannot know
    assert cut.download(kept).body == content

    cluster.heal()
    wait_for(lambda: deleted not in cut.stored(), BACK, "it has dropped what was deleted")
    wait_for(lambda: cut.download(deleted).status == 404, BACK, "it knows what was deleted")
    wait_for(lambda: cut.id in cluster.live_in_etcd(), BACK, "it is live again")
    wait_for(lambda: not stale(cut.get("/images")), BACK, "what it says is new")
    assert {image["id"] for image in cut.images()} == {kept}
    wait_for(cut.is_ready, BACK, "it is ready")
    assert one.download(cut.upload(b"written again")["id"]).body == b"written again"


def test_transfers_of_a_member_cut_from_etcd(cluster: ClusterOfThree) -> None:
    """Its fetch is taken over by another, and its upload says that it is lost; when it is back, it has neither."""
    cut, one, _ = cluster.members
    content = os.urandom(MIB)
    first = Resource(content, stall_after=MIB // 2)
    url = cluster.source.serve("/slow", first)
    fetched = cut.fetch(url)["id"]
    one.wait_status(fetched, "downloading")
    with cut.connect(timeout=30) as connection:
        connection.begin_upload(MIB)
        connection.send(bytes(MIB // 2))
        wait_for(lambda: len(one.images()) == 2, 5, "the upload has its record")
        uploaded = next(image["id"] for image in one.images() if image["id"] != fetched)
        cluster.source.serve("/slow", content)
        cluster.cut_from_etcd(cut)
        with within(TAKEN_OVER, "the fetch by another"):
            image = one.wait_status(fetched, "complete", timeout=TAKEN_OVER)
        assert cut.id not in cluster.stored()[fetched].replicas
        assert image["size"] == MIB
        error = one.wait_status(uploaded, "error", timeout=TAKEN_OVER)["error"]
        assert cut.id in error or cut.url in error, error
        first.resume()
        cluster.heal()
        wait_for(lambda: cut.incoming() == set(), BACK, "nothing of it is left at the one that was cut off")
    download_from_all(cluster.members, fetched, content)
    assert one.image(uploaded)["status"] == "error"
    assert one.image(fetched)["sha256"] == image["sha256"]


def test_a_member_cut_from_the_others(cluster: ClusterOfThree) -> None:
    """It serves what it holds; of what only others hold it says who does, soon. So do they."""
    cut, one, other = cluster.members
    own, others = cut.upload(b"own")["id"], one.upload(b"of another")["id"]
    cluster.cut_from_peers(cut)
    assert cut.download(own).body == b"own"
    for member, image_id, holder in ((cut, others, one), (one, own, cut)):
        with within(WRITES, "a download of what cannot be had"):
            answer = member.download(image_id)
        assert answer.status == 503, answer
        assert holder.url in answer.message or holder.id in answer.message, answer.message
        assert "Retry-After" in answer.headers
    assert other.download(others).body == b"of another"
    assert cut.upload(b"it can be written to")["status"] == "complete"
    assert not stale(cut.get("/images"))
    cluster.heal()
    download_from_all(cluster.members, own, b"own")
    download_from_all(cluster.members, others, b"of another")


@pytest.fixture
def large() -> bytes:
    return os.urandom(6 * MIB)


class SlowDownload:
    """At a member that has to ask another one, which sends slowly."""

    def __init__(self, member: Member, image_id: str) -> None:
        self._connection = member.connect(timeout=20)
        self._connection.send(f"GET /images/{image_id}/download HTTP/1.1\r\nHost: test\r\n\r\n")
        self.status, self._headers = self._connection.head()
        assert self.status == 200
        self.body = self._connection.recv(1000)
        assert self.body

    def finish(self) -> bytes:
        """All that comes; raises IncompleteRead when that is not all."""
        wanted = int(self._headers["Content-Length"])
        while len(self.body) < wanted:
            more = self._connection.recv(65536)
            if not more:
                raise http.client.IncompleteRead(self.body, wanted - len(self.body))
            self.body += more
        return self.body

    def close(self) -> None:
        self._connection.close()


def test_a_cut_in_the_middle_of_a_pull(cluster: ClusterOfThree, large: bytes) -> None:
    """Another member that holds the image goes on where the first stopped."""
    *holders, puller = cluster.members
    image_id = holders[0].upload(large)["id"]
    copy_to(cluster, image_id, *holders)
    for holder in holders:
        cluster.slow(holder, 3 * MIB)
    download = SlowDownload(puller, image_id)
    sending = next(holder for holder in holders if cluster.connected(puller, holder))
    cluster.cut(puller, sending)
    with within(12, "the rest from the other"):
        assert download.finish() == large
    download.close()
    wait_for(lambda: image_id in puller.stored(), 5, "it keeps a copy")
    assert puller.download(image_id).body == large


def test_a_cut_in_the_middle_of_a_pull_from_the_only_one(cluster: ClusterOfThree, large: bytes) -> None:
    """The client's connection ends before the image does; nothing of it is kept, and later it can be had."""
    holder, puller, _ = cluster.members
    image_id = holder.upload(large)["id"]
    cluster.slow(holder, 3 * MIB)
    download = SlowDownload(puller, image_id)
    cluster.cut(puller, holder)
    with within(12, "the end of the connection"), pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        download.finish()
    download.close()
    assert len(download.body) < len(large)
    assert large.startswith(download.body)
    wait_for(lambda: puller.incoming() == set(), 5, "nothing is left of it")
    assert image_id not in puller.stored()
    cluster.heal()
    download_from_all([puller], image_id, large)


def test_the_only_copy_is_away(cluster: ClusterOfThree) -> None:
    """That is said plainly: 503 with the member's name, and not 404. It is there again with the member."""
    lost, one, other = cluster.members
    image_id = lost.upload(b"content")["id"]
    lost.kill()
    for member in (one, other):
        answer = member.download(image_id)
        assert answer.status == 503
        assert lost.url in answer.message, answer.message
        assert member.image(image_id)["status"] == "complete"
    wait_for(lambda: lost.id not in cluster.live_in_etcd(), TAKEN_OVER, "it is taken for dead")
    for member in (one, other):
        assert (member.download(image_id).status, member.image(image_id)["replicas"]) == (503, [lost.id])
    for i in range(3):
        cluster.etcd.kill(i)
    for member in (one, other):
        answer = member.download(image_id)
        assert (answer.status, lost.id in answer.message) == (503, True), answer
    cluster.etcd.restore()
    lost.start()
    download_from_all(cluster.members, image_id, b"content")
