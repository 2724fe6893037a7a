"""All of etcd goes away while an upload runs: `cluster.etcdGrace` says how long the end of it waits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.client import Connection
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service, wait_for
from tests.service.conftest import StartService, on_etcd
from tests.service.helpers import begin_upload
from tests.source import Resource, Source
from tests.tus import Tus, id_of

MIB = 1 << 20
LEASE = 2

# An upload that lacks its second MiB: its id, and where that MiB goes.
Begin = Callable[[Service, Connection, bytes], str]


def plain(service: Service, connection: Connection, content: bytes) -> str:
    return begin_upload(service, connection, 2 * MIB, content[:MIB])


def resumable(service: Service, connection: Connection, content: bytes) -> str:
    tus = Tus(service)
    path = tus.create(2 * MIB)
    tus.begin(connection, path, 0, 2 * MIB)
    connection.send(content[:MIB])
    return id_of(path)


@contextmanager
def etcd_away(service: Service, etcd: EtcdCluster) -> Iterator[None]:
    """Killed, and started again in the end."""
    etcd.kill(0)
    yield
    etcd.start(0)
    wait_for(lambda: service.get("/readyz").status == 200, 20, "ready again")


def assert_complete(service: Service, image_id: str, content: bytes) -> None:
    assert service.wait_status(image_id, "complete")["size"] == len(content)
    assert service.download(image_id).body == content
    wait_for(lambda: service.incoming() == set(), 5, ".incoming is empty")


@pytest.mark.parametrize(("begin", "status"), [(resumable, 204), pytest.param(plain, 200, marks=pytest.mark.release)])
def test_etcd_is_back_within_the_grace(
    own_etcd: EtcdCluster, start_service: StartService, begin: Begin, status: int
) -> None:
    """Bytes go on coming in without etcd, and whoever sent them never learns of it."""
    service = start_service(**on_etcd(own_etcd, "/test"))
    content = os.urandom(2 * MIB)
    with Connection(service.port, timeout=30) as connection:
        image_id = begin(service, connection, content)
        with etcd_away(service, own_etcd):
            connection.send(content[MIB:])
            assert not connection.readable(1.5), connection.answer()
        assert connection.head()[0] == status
    assert_complete(service, image_id, content)


@pytest.mark.parametrize("begin", [plain, pytest.param(resumable, marks=pytest.mark.release)])
def test_etcd_is_back_after_the_grace(own_etcd: EtcdCluster, start_service: StartService, begin: Begin) -> None:
    """The sender gets 503 and when to ask again; the image is whole, and says so once etcd is back."""
    service = start_service(**on_etcd(own_etcd, "/test"), cluster_etcd_grace=1)
    content = os.urandom(2 * MIB)
    with Connection(service.port, timeout=30) as connection:
        image_id = begin(service, connection, content)
        with etcd_away(service, own_etcd):
            connection.send(content[MIB:])
            assert connection.readable(4.0), "no answer"
            answer = connection.answer()
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert answer.message.startswith(f"image {image_id} is whole here")
    assert_complete(service, image_id, content)


@pytest.mark.release
def test_etcd_is_frozen_for_longer_than_the_leases(
    own_etcd: EtcdCluster, start_service: StartService, source: Source
) -> None:
    """All leases are gone at once when it goes on, and nobody takes from the others what they are still bringing in."""
    settings = {**on_etcd(own_etcd, "/test"), "cluster_lease_ttl": LEASE}
    one, other = start_service(**settings), start_service(**settings)
    resources = [Resource(os.urandom(MIB), stall_after=MIB // 2) for _ in range(2)]
    fetched = [
        host.fetch(source.serve(f"/{number}", resource))["id"]
        for number, (host, resource) in enumerate(zip((one, other), resources, strict=True))
    ]
    for image_id in fetched:
        one.wait_status(image_id, "downloading")
    content = os.urandom(2 * MIB)
    with Connection(one.port, timeout=30) as connection:
        uploaded = plain(one, connection, content)
        own_etcd.stop(0)
        time.sleep(1.5 * LEASE)
        own_etcd.cont(0)
        time.sleep(2 * LEASE)
        connection.send(content[MIB:])
        assert connection.head()[0] == 200
    for resource in resources:
        resource.resume()
    for host, image_id, resource in zip((one, other), fetched, resources, strict=True):
        assert_complete(host, image_id, resource.body)
        assert image_id in host.stored()
    assert_complete(one, uploaded, content)
    assert [len(source.asked(f"/{number}")) for number in range(2)] == [1, 1]
