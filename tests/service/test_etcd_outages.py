"""Members of etcd are killed and frozen under two hosts at work: without one they go on, without two they say so, and
afterwards everything works again by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

import pytest

from imgsvc.metadata.image import new_id
from tests.client import Answer, Connection
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service, wait_for
from tests.service.conftest import two_hosts
from tests.service.helpers import begin_upload, post_at_once
from tests.source import Resource, Source

MIB = 1 << 20
# A request that meets a silent member may wait for it once, or for the election of a leader.
GOES_ON = 5.0
ANSWERS = 10.0

Harm = Callable[[EtcdCluster, int], None]


@pytest.fixture(scope="module")
def _hosts(_three_members: EtcdCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Service]]:
    with two_hosts(_three_members, "/test-outages", tmp_path_factory, cluster_etcd_grace=8) as hosts:
        yield hosts


@pytest.fixture
def hosts(_hosts: tuple[Service, Service], etcd_cluster: EtcdCluster) -> Iterator[tuple[Service, Service]]:
    """Two hosts on a cluster of three, which is whole at the beginning; their logs must stay clean."""
    for service in _hosts:
        wait_for(lambda service=service: service.get("/readyz").status == 200, 10, "ready")  # type: ignore[misc]
    yield _hosts
    for service in _hosts:
        service.check_log()


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds, what


class InFlight:
    """An upload and a fetch under way; a context manager that ends the upload's connection."""

    def __init__(self, service: Service, source: Source) -> None:
        self._service = service
        self._source = source
        self.content = os.urandom(2 * MIB)
        self.path = f"/{time.monotonic_ns()}"
        self.resource = Resource(self.content, stall_after=MIB)
        self.fetched = service.fetch(source.serve(self.path, self.resource))["id"]
        self.connection = Connection(service.port, timeout=30)
        self.uploaded = begin_upload(service, self.connection, 2 * MIB, self.content[:MIB])
        service.wait_status(self.fetched, "downloading")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.connection.close()

    def send_the_rest(self) -> None:
        self.resource.resume()
        self.connection.send(self.content[MIB:])

    def assert_complete(self) -> None:
        for image_id in (self.fetched, self.uploaded):
            self._service.wait_status(image_id, "complete")
            assert self._service.download(image_id).body == self.content
        assert len(self._source.asked(self.path)) == 1
        wait_for(lambda: self._service.incoming() == set(), GOES_ON, ".incoming is empty")


def assert_one_fetch(hosts: Sequence[Service], source: Source) -> None:
    """Of 32 POSTs of a source at once all get one image, and the source is asked once."""
    path = f"/{new_id()}"
    images = post_at_once(list(hosts), source.serve(path, b"content"))
    assert len({image["id"] for image in images}) == 1
    hosts[0].wait_status(images[0]["id"], "complete")
    assert len(source.asked(path)) == 1


def assert_works(service: Service, source: Source) -> None:
    """All that can be asked of it, each within seconds."""
    with within(GOES_ON, "upload"):
        uploaded = service.upload(b"content")["id"]
    with within(GOES_ON, "fetch"):
        fetched = service.fetch(source.serve(f"/{uploaded}", b"content"))["id"]
        service.wait_status(fetched, "complete")
    with within(GOES_ON, "list"):
        assert {uploaded, fetched} <= {image["id"] for image in service.images()}
    with within(GOES_ON, "download"):
        assert service.download(fetched).body == b"content"
    with within(GOES_ON, "delete"):
        assert service.delete(uploaded).status == 200


@pytest.mark.parametrize("harm", [EtcdCluster.kill, EtcdCluster.stop])
def test_one_member_of_three_is_lost(
    hosts: tuple[Service, Service], etcd_cluster: EtcdCluster, source: Source, harm: Harm
) -> None:
    """Whichever it is, the leader included: requests go on within a few seconds, and transfers as if nothing were."""
    for victim in range(3):
        with InFlight(hosts[0], source) as one, InFlight(hosts[1], source) as other:
            harm(etcd_cluster, victim)
            assert_one_fetch(hosts, source)
            for service, transfer in zip(hosts, (one, other), strict=True):
                assert_works(service, source)
                transfer.send_the_rest()
                with within(GOES_ON, "the end of an upload"):
                    assert transfer.connection.answer().status == 200
                transfer.assert_complete()
        etcd_cluster.restore()
    assert_settled(hosts)


@pytest.mark.parametrize("harm", [EtcdCluster.kill, pytest.param(EtcdCluster.stop, marks=pytest.mark.release)])
def test_two_members_of_three_are_lost(
    hosts: tuple[Service, Service], etcd_cluster: EtcdCluster, source: Source, harm: Harm
) -> None:
    """Each request is answered within ten seconds, however many there are, from the first that meets the outage on: with
    503, or, when it changes nothing, from memory, which it says. What was under way is kept: once etcd is back, it is complete by itself, and everything works again."""
    one, other = hosts
    image = one.upload(b"before")
    meanwhile = {"source": source.serve("/meanwhile", b"meanwhile"), "type": "kvm"}
    requests: list[Callable[[], Answer]] = [
        *[lambda: one.put(b"meanwhile")] * 40,
        lambda: one.post(meanwhile),
        lambda: one.post({**meanwhile, "source": source.serve(f"/{new_id()}", b"another")}),
        lambda: other.delete(new_id()),
        lambda: other.get("/readyz"),
    ]
    reads: list[Callable[[], Answer]] = [
        lambda: other.get("/images"),
        lambda: other.get(f"/images/{image['id']}"),
        lambda: one.download(image["id"]),
    ]
    with ThreadPoolExecutor(len(requests + reads)) as pool, InFlight(one, source) as transfer:
        leader = etcd_cluster.leader()
        asking = [pool.submit(ask_until_refused, request) for request in requests]
        asking += [pool.submit(ask_until_stale, request) for request in reads]
        time.sleep(0.3)
        for victim in (leader, (leader + 1) % 3):
            harm(etcd_cluster, victim)
        transfer.send_the_rest()
        with within(ANSWERS, "the end of an upload"):
            answer = transfer.connection.answer()
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        slowest = [one.result() for one in asking]
    assert max(slowest) < ANSWERS, slowest
    assert one.get("/healthz").status == 200

    etcd_cluster.restore()
    for service in hosts:
        wait_for(lambda service=service: service.get("/readyz").status == 200, ANSWERS, "ready again")  # type: ignore[misc]
        assert_works(service, source)
    transfer.assert_complete()
    assert one.image(image["id"]) == image
    assert other.delete(image["id"]).status == 200
    wait_for(lambda: image["id"] not in one.stored(), ANSWERS, "the bytes are gone")
    assert_settled(hosts)


def test_who_writes_in_an_outage_does_not_keep_others_from_reading(
    hosts: tuple[Service, Service], etcd_cluster: EtcdCluster
) -> None:
    """However many requests wait for an etcd that says nothing, what this host has is read within a second and a half."""
    service = hosts[0]
    image = service.upload(b"content")
    sources = [{"source": f"http://127.0.0.1:1/{new_id()}", "type": "kvm"} for _ in range(32)]
    for member in range(3):
        etcd_cluster.stop(member)
    with ThreadPoolExecutor(32) as pool:
        writing = [pool.submit(service.post, wanted) for wanted in sources]
        time.sleep(0.5)
        for path in (f"/images/{image['id']}/download", f"/images/{image['id']}", "/images"):
            with within(1.5, path):
                answer = service.get(path)
            assert (answer.status, "X-Imgsvc-Stale" in answer.headers) == (200, True), path
        assert not all(one.done() for one in writing)
        assert {one.result().status for one in writing} == {503}
    etcd_cluster.restore()
    wait_for(lambda: service.delete(image["id"]).status == 200, ANSWERS, "it works again")


def assert_settled(hosts: Sequence[Service]) -> None:
    """Of what was refused nothing is left: every record is of a complete image, which one of the hosts has. That of an
    upload which was refused with all its bytes on the disk says so a little later than `.incoming` is empty."""

    def in_transfer() -> list[str]:
        return [image["id"] for image in hosts[0].images() if image["status"] in ("pending", "downloading")]

    wait_for(lambda: not in_transfer(), GOES_ON, "no image is in transfer")
    images = hosts[0].images()
    assert [image for image in images if image["status"] != "complete"] == []
    assert set().union(*(service.stored() for service in hosts)) == {image["id"] for image in images}


def ask_until_refused(request: Callable[[], Answer]) -> float:
    """Seconds that the slowest answer took, up to the first that is 503."""
    slowest = 0.0
    while True:
        began = time.monotonic()
        answer = request()
        slowest = max(slowest, time.monotonic() - began)
        if answer.status == 503:
            assert answer.headers["Retry-After"] == "1"
            return slowest


def ask_until_stale(request: Callable[[], Answer]) -> float:
    """Seconds that the slowest answer took, up to the first that says that it may be out of date; all are good ones."""
    slowest, until = 0.0, time.monotonic() + 3 * ANSWERS
    while time.monotonic() < until:
        began = time.monotonic()
        answer = request()
        slowest = max(slowest, time.monotonic() - began)
        assert answer.status == 200
        if answer.headers["X-Imgsvc-Stale"] is not None:
            assert int(answer.headers["X-Imgsvc-Stale"]) >= 1
            return slowest
    raise AssertionError("nothing is out of date")
