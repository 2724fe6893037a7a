"""kill -9 at random moments, with uploads, fetches and deletions in flight, and during the start: what was acknowledged
holds, and nothing is left that tells a lie."""

from __future__ import annotations

import os
import random
import urllib.error
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from tests.client import Connection
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service
from tests.service.conftest import Settings, StartService
from tests.service.crash import Clients, assert_no_lie, end_lease, kill_repeatedly
from tests.service.helpers import begin_upload
from tests.source import Resource, Source

MIB = 1 << 20
# What runs on one host for as long as another is killed again and again.
PATIENT: Settings = {"idle_timeout": 3600, "fetch_stall_timeout": 3600}

kills = pytest.mark.parametrize(
    "kills", [10, pytest.param(100, marks=[pytest.mark.release, pytest.mark.timeout(1200)])]
)


class Bystander:
    """Another host that shares the records, with an upload and a fetch under way until `finish`."""

    def __init__(self, service: Service, source: Source) -> None:
        self._service = service
        self._source = source
        self._content = os.urandom(2 * MIB)
        self._resource = Resource(self._content, stall_after=MIB)
        self._fetched = service.fetch(source.serve("/bystander", self._resource))["id"]
        self._connection = Connection(service.port)
        self._uploaded = begin_upload(service, self._connection, 2 * MIB, self._content[:MIB])
        service.wait_status(self._fetched, "downloading")
        self.images = {self._fetched, self._uploaded}

    def assert_undisturbed(self) -> None:
        assert {self._service.image(image_id)["status"] for image_id in self.images} == {"downloading"}
        assert self._service.incoming() == self.images

    def finish(self) -> None:
        """Both end well, and the source was asked once."""
        self._resource.resume()
        self._connection.send(self._content[MIB:])
        assert self._connection.answer().status == 200
        for image_id in self.images:
            self._service.wait_status(image_id, "complete")
            assert self._service.download(image_id).body == self._content
        assert len(self._source.asked("/bystander")) == 1
        assert self._service.stored() == self.images

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def bystander(new_host: StartService, source: Source) -> Iterator[Bystander]:
    with closing(Bystander(new_host(**PATIENT), source)) as bystander:
        yield bystander


@kills
def test_killed_at_random_moments(start_service: StartService, source: Source, seed: int, kills: int) -> None:
    """Killed again and again, while starting and while busy, the service loses nothing that it acknowledged."""
    clients = Clients(start_service(fetch_concurrency=8), source, random.Random(seed))
    interrupted = 0

    def check() -> None:
        nonlocal interrupted
        interrupted += assert_no_lie(clients)

    kill_repeatedly(clients, random.Random(seed), kills, killed=lambda: None, settled=check)
    assert interrupted, "no kill hit an upload, so nothing was tested"
    assert clients.kept() & clients.fetched.keys()


@kills
def test_one_of_two_hosts_killed_at_random_moments(  # noqa: PLR0917 - each a fixture
    new_host: StartService, etcd: EtcdCluster, bystander: Bystander, source: Source, seed: int, kills: int
) -> None:
    """The same with records in etcd, where now and then the host is gone for longer than its lease; what the other
    host is doing meanwhile is left alone."""
    service = new_host(fetch_concurrency=8)
    moments = random.Random(seed)
    clients = Clients(service, source, random.Random(seed))
    interrupted = 0

    def gone() -> None:
        with suppress(urllib.error.HTTPError):  # killed before it had another lease than the one that was ended before
            if moments.random() < 0.7:
                end_lease(etcd, service)

    def check() -> None:
        nonlocal interrupted
        interrupted += assert_no_lie(clients, bystander.images)
        bystander.assert_undisturbed()

    kill_repeatedly(clients, moments, kills, killed=gone, settled=check)
    bystander.finish()
    assert interrupted, "no kill hit an upload, so nothing was tested"


def test_gone_for_longer_than_the_lease(
    new_host: StartService, etcd: EtcdCluster, bystander: Bystander, source: Source
) -> None:
    """A host that nobody knows any more as the owner of its transfers still settles all of them, and no others."""
    service = new_host(fetch_concurrency=1)
    running = service.fetch(source.serve("/running", Resource(bytes(MIB), stall_after=1)))["id"]
    waiting = service.fetch(source.serve("/waiting", b"waiting"))["id"]
    with Connection(service.port) as connection:
        uploading = begin_upload(service, connection, 2 * MIB, bytes(MIB))
        service.wait_status(running, "downloading")
        service.kill()
    end_lease(etcd, service)
    source.serve("/running", b"running")
    service.start()

    assert service.image(uploading)["status"] == "error"
    for image_id, content in ((running, b"running"), (waiting, b"waiting")):
        service.wait_status(image_id, "complete")
        assert service.download(image_id).body == content
    assert service.stored() == {running, waiting}
    assert service.incoming() == set()
    bystander.assert_undisturbed()
    bystander.finish()
