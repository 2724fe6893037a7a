"""The sixth fault of the Go program: disk full left records `downloading` for ever, and DELETE failed too.

Metadata and images share one small tmpfs here, which only root may mount.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.client import Connection
from tests.harness import Service, wait_for
from tests.mounts import Mount
from tests.service.conftest import Settings, StartService
from tests.source import Resource, Source

MIB = 1 << 20
DISK = 48 * MIB


@pytest.fixture
def small_disk(mount: Mount, tmp_path: Path) -> Path:
    """A file system of its own with 48 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount("-t", "tmpfs", "-o", f"size={DISK}", "imgsvc-test", directory)
    return directory


@pytest.fixture
def full_service(small_disk: Path, start_service: StartService, records: Settings) -> Service:
    """A service on the small disk."""
    return start_service(small_disk / "data", **records)


def free(service: Service) -> int:
    disk = os.statvfs(service.data_dir)
    return disk.f_bavail * disk.f_frsize


def fill(path: Path) -> None:
    """Another program's file, which takes every last byte."""
    with path.open("wb", buffering=0) as file:
        for size in (MIB, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def assert_unharmed(service: Service, before: int) -> None:
    """Nothing is left of what did not fit, and the space is back but for some metadata."""
    wait_for(lambda: service.incoming() == set(), 5, ".incoming is empty")
    assert service.image_files() == []
    assert free(service) > before - 2 * MIB


def test_an_upload_that_does_not_fit(full_service: Service) -> None:
    """With a length it is 507 before the body, without one 507 in mid-stream; other images are unharmed."""
    content = os.urandom(4 * MIB)
    good = full_service.upload(content)
    before = free(full_service)
    with Connection(full_service.port) as connection:
        connection.begin_upload(4 * DISK)
        announced = connection.answer()
    with Connection(full_service.port) as connection:
        connection.begin_upload(None)
        sent = connection.send_until_refused(b"%x\r\n%b\r\n" % (MIB, os.urandom(MIB)), 4 * DISK)
        chunked = connection.answer()
    for answer in (announced, chunked):
        assert (answer.status, answer.json()["code"]) == (507, 507)
        assert "space" in answer.message
    assert 20 * MIB < sent < 2 * DISK
    assert_unharmed(full_service, before)
    assert full_service.download(good["id"]).body == content
    assert {image["status"] for image in full_service.images()} <= {"complete", "error"}


@pytest.mark.parametrize("announce", [-1, None])
def test_a_fetch_that_does_not_fit(full_service: Service, source: Source, announce: int | None) -> None:
    """It ends in `error` that says so, announced or not."""
    before = free(full_service)
    image = full_service.fetch(source.serve("/guest", Resource(bytes(2 * DISK), announce=announce)))
    assert "space" in full_service.wait_status(image["id"], "error")["error"]
    assert_unharmed(full_service, before)
    assert full_service.delete(image["id"]).status == 200


def test_the_reserve_is_left_free(small_disk: Path, start_service: StartService, records: Settings) -> None:
    """However many uploads at once, images leave diskReserve free, but for a block each that was under way."""
    service = start_service(small_disk / "data", **records, disk_reserve="40%")
    connections = [Connection(service.port) for _ in range(3)]
    for connection in connections:
        connection.begin_upload(None)
    chunk = b"%x\r\n%b\r\n" % (MIB, os.urandom(MIB))
    while connections:
        assert free(service) >= 0.4 * DISK - 3 * MIB
        for connection in list(connections):
            if connection.readable(0):
                assert connection.answer().status == 507
                connection.close()
                connections.remove(connection)
            else:
                connection.send_until_refused(chunk, MIB)


def test_announced_uploads_are_not_promised_the_same_space(full_service: Service) -> None:
    """Two uploads that would fit alone, and not together: the second is refused before its body."""
    with Connection(full_service.port) as first, Connection(full_service.port) as second:
        first.begin_upload(30 * MIB)
        first.send(bytes(MIB))
        wait_for(full_service.images, 5, "the first has its record")
        second.begin_upload(30 * MIB)
        assert second.answer().status == 507
        for _ in range(29):
            first.send(bytes(MIB))
        assert first.answer().status == 200


def test_another_program_fills_the_disk(small_disk: Path, start_service: StartService, records: Settings) -> None:
    """When the very last byte is taken in mid-transfer, upload and fetch end in `error` and say so, images can be
    read and deleted, and after that there is room again. This is the fault: metadata has to be written, on the same
    full disk, to say so."""
    service = start_service(small_disk / "data", **records, disk_reserve=0)
    content = os.urandom(8 * MIB)
    good = service.upload(content)
    with Source() as source, Connection(service.port) as connection:
        resource = Resource(bytes(16 * MIB), stall_after=4 * MIB)
        fetched = service.fetch(source.serve("/guest", resource))
        connection.begin_upload(16 * MIB)
        connection.send(bytes(4 * MIB))
        wait_for(lambda: len(service.images()) == 3, 5, "the upload has its record")
        service.wait_status(fetched["id"], "downloading")
        fill(small_disk / "filler")
        resource.resume()
        connection.send_until_refused(bytes(65536), 12 * MIB)
        answer = connection.answer()
        assert (answer.status, "space" in answer.message) == (507, True)
        assert "space" in service.wait_status(fetched["id"], "error")["error"]
    # What the failed transfers gave back is taken again, so that DELETE meets a disk that is full to the last byte.
    wait_for(lambda: service.incoming() == set(), 5, ".incoming is empty")
    fill(small_disk / "filler2")
    assert service.download(good["id"]).body == content
    for image in service.images():
        assert image["status"] in ("complete", "error")
        assert service.delete(image["id"]).status == 200
    assert service.images() == []
    assert free(service) > 6 * MIB
    assert service.upload(bytes(4 * MIB))["status"] == "complete"


def test_a_known_source(mount: Mount, start_service: StartService, records: Settings, tmp_path: Path) -> None:
    """When not one more file can be made, a POST of it is answered with its image; one of another is 507."""
    directory = tmp_path / "images"
    directory.mkdir()
    mount("-t", "tmpfs", "-o", f"size={DISK},nr_inodes=100", "imgsvc-test", directory)
    service = start_service(image_store_config_dir=directory, **records)
    with Source() as source:
        known = service.fetch(source.serve("/known", b"bytes"))
        image = service.wait_status(known["id"], "complete")
        left = os.statvfs(directory).f_favail
        for number in range(left):
            (directory / f"of-others-{number}").touch()
        answers = [service.post({"source": known["source"], "type": "kvm"})]
        answers.append(service.post({"source": f"{source.url}/other", "type": "kvm"}))
    assert [answer.status for answer in answers] == [202, 507]
    assert answers[0].json() == image


def test_a_start_on_a_full_disk(small_disk: Path, start_service: StartService, records: Settings) -> None:
    """Killed in mid-upload with the disk full, the service starts again, settles what it left, and deletes."""
    service = start_service(small_disk / "data", **records, disk_reserve=0)
    good = service.upload(bytes(8 * MIB))
    with Connection(service.port) as connection:
        connection.begin_upload(16 * MIB)
        connection.send(bytes(4 * MIB))
        wait_for(lambda: len(service.images()) == 2, 5, "the upload has its record")
        service.kill()
    fill(small_disk / "filler")
    service.start()
    assert {image["status"] for image in service.images()} == {"complete", "error"}
    assert service.delete(good["id"]).status == 200
    assert service.upload(bytes(4 * MIB))["status"] == "complete"


def test_a_fetch_over_several_connections(small_disk: Path, start_service: StartService, source: Source) -> None:
    """Another program fills the disk meanwhile: the fetch ends, and all that waited to be written is let go of."""
    service = start_service(small_disk / "data", fetch_split_size=MIB, fetch_retries=3)
    before = free(service)
    url = source.serve("/image", Resource(os.urandom(24 * MIB), etag='"one"', rate=4.0 * MIB))
    image = service.fetch(url)["id"]
    source.wait_asked("/image", count=3)
    fill(small_disk / "other")
    ended = service.wait_status(image, "error")
    assert "space" in ended["error"]
    (small_disk / "other").unlink()
    assert_unharmed(service, before)
    assert len(source.exchanges) < 9
