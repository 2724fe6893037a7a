"""A disk that does not give back what was written to it: ZFS checks what it reads, and says EIO."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from http.client import IncompleteRead

import pytest

from tests.service.conftest import MIB, StartService
from tests.service.test_scrub import scrub
from tests.zfs import ZfsPool


@pytest.fixture
def dataset(zfs_pool: ZfsPool) -> Iterator[str]:
    name = f"scrub-{uuid.uuid4()}"
    zfs_pool.create(name, primarycache="none", compression="off")
    yield name
    zfs_pool.destroy(name)


def test_a_block_that_a_client_finds(zfs_pool: ZfsPool, dataset: str, new_host: StartService) -> None:
    """A member of a cluster looks at once, for another one may have the image."""
    service = new_host(zfs_pool.directory / dataset / "data", scrub_interval=0)
    body = os.urandom(2 * MIB)
    image = service.upload(body)
    service.close()
    zfs_pool.unmount(dataset)
    zfs_pool.rot(body[MIB : MIB + 64])
    zfs_pool.mount(dataset)
    service.expect_errors("image damaged")
    service.start()
    with pytest.raises(IncompleteRead):
        service.download(image["id"])
    assert "Input/output error" in service.wait_status(image["id"], "error", timeout=10.0)["error"]
    service.close()


def test_a_block_that_cannot_be_read(zfs_pool: ZfsPool, dataset: str, start_service: StartService) -> None:
    """The image is set aside, with what can be read of it, and says why; the others are as they were."""
    service = start_service(zfs_pool.directory / dataset / "data")
    body = os.urandom(2 * MIB)
    image, other = service.upload(body), service.upload(os.urandom(MIB))
    service.close()
    zfs_pool.unmount(dataset)  # with what memory has of it
    zfs_pool.rot(body[MIB : MIB + 64])
    zfs_pool.mount(dataset)
    service.start()
    with pytest.raises(IncompleteRead):
        service.download(image["id"])
    service.check_log()
    status, (finding, _) = scrub(service)
    assert (status, finding.startswith(f"{image['id']}: cannot read image")) == (1, True)
    error = service.wait_status(image["id"], "error", timeout=1.0)["error"]
    assert "Input/output error" in error
    assert error.endswith("; its bytes are in quarantine")
    assert service.download(image["id"]).status == 404
    assert service.image(other["id"]) == other
    aside = service.images_dir / ".quarantine" / image["id"]
    with aside.open("rb") as file:
        assert file.read(MIB) == body[:MIB]
    service.close()
