"""A ZFS quota that images and records share: full for this service, although the disk is not."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from tests.client import Answer, Connection
from tests.harness import Service, wait_for
from tests.service.conftest import MIB, StartService
from tests.source import Resource, Source
from tests.zfs import ZfsPool

QUOTA = 48 * MIB


@pytest.fixture
def dataset(zfs_pool: ZfsPool) -> Iterator[str]:
    name = f"quota-{uuid.uuid4()}"
    zfs_pool.create(name, quota=str(QUOTA))
    yield name
    zfs_pool.destroy(name)


def test_a_quota(zfs_pool: ZfsPool, dataset: str, start_service: StartService, source: Source) -> None:
    """Uploads with and without a length get 507 and fetches end in `error` that says so; an image that is there is
    unharmed, DELETE works, and then there is room again. ZFS counts late what was written and what was removed."""
    service = start_service(zfs_pool.directory / dataset / "data")
    content = os.urandom(8 * MIB)
    good = service.upload(content)
    assert refused(service, 2 * QUOTA).status == 507
    answer = refused(service, None)
    assert (answer.status, "space" in answer.message or "quota" in answer.message) == (507, True), answer
    make_room(zfs_pool, service)
    image = service.fetch(source.serve("/guest", Resource(os.urandom(2 * QUOTA), announce=None)))
    failed = service.wait_status(image["id"], "error", timeout=60)
    assert "space" in failed["error"] or "quota" in failed["error"].lower(), failed
    make_room(zfs_pool, service)
    assert service.download(good["id"]).body == content
    assert {image["status"] for image in service.images()} <= {"complete", "error"}
    for image in service.images():
        assert service.delete(image["id"]).status == 200
    make_room(zfs_pool, service)
    assert service.upload(os.urandom(30 * MIB))["status"] == "complete"
    service.close()


def refused(service: Service, length: int | None) -> Answer:
    with Connection(service.port, timeout=60) as connection:
        connection.begin_upload(length)
        if length is None:
            connection.send_until_refused(b"%x\r\n%b\r\n" % (MIB, os.urandom(MIB)), 2 * QUOTA)
        return connection.answer()


def make_room(pool: ZfsPool, service: Service) -> None:
    wait_for(lambda: service.incoming() == set(), 20, ".incoming is empty")
    pool.settle()
