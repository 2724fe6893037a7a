"""Fault 4 of the Go program: a failed upload left its partial file; an open descriptor per upload was leaked."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.client import Connection
from tests.harness import Service, wait_for
from tests.service.helpers import begin_upload
from tests.source import Resource, Source

MIB = 1 << 20


@pytest.mark.parametrize("end", [Connection.close, Connection.reset])
def test_a_failed_upload_leaves_nothing(service: Service, end: Callable[[Connection], None]) -> None:
    """Twenty uploads whose client goes away leave a record in `error` each, and no file, descriptor or socket."""
    service.upload(bytes(MIB))
    before = service.census()
    failed = []
    for n in range(20):
        connection = Connection(service.port)
        failed.append(begin_upload(service, connection, 4 * MIB, bytes(n * 100_000)))
        end(connection)
    for image_id in failed:
        image = service.wait_status(image_id, "error")
        assert image["error"]
        assert image["size"] == 0
    wait_for(lambda: service.incoming() == set(), 5, ".incoming is empty")
    wait_for(lambda: service.census().sockets <= before.sockets, 5, "no socket is left")
    assert service.image_files() == []
    assert len(service.census().files) <= len(before.files)
    assert not set(failed) & service.stored()


def test_a_failed_fetch_leaves_nothing(service: Service, source: Source) -> None:
    """The same for fetches."""
    service.wait_status(service.fetch(source.serve("/good", bytes(MIB)))["id"], "complete")
    before = service.census()
    for n in range(12):
        url = source.serve(f"/{n}", Resource(bytes(MIB), cut_after=n * 70_000, chunked=n % 2 == 0))
        service.wait_status(service.fetch(url)["id"], "error")
    wait_for(lambda: service.incoming() == set(), 5, ".incoming is empty")
    wait_for(lambda: service.census().sockets <= before.sockets, 5, "no socket is left")
    assert service.image_files() == []


def test_a_good_upload_leaves_no_descriptor(service: Service) -> None:
    """Fifty uploads, downloads and deletions leave the process as it was."""

    def once(_: int) -> None:
        image = service.upload(bytes(100_000))
        assert len(service.download(image["id"]).body) == 100_000
        assert service.delete(image["id"]).status == 200

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(once, range(100)))  # whatever is opened once and kept, threads for more clients than now included
    wait_for(lambda: service.image_files() == [], 5, "no image is open")
    before = service.census()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(once, range(50)))
    wait_for(lambda: service.image_files() == [], 5, "no image is open")
    wait_for(lambda: service.census().sockets <= before.sockets, 5, "no socket is left")
    assert len(service.census().files) <= len(before.files)
    assert service.census().threads <= before.threads + 8


def test_a_deleted_image_gives_its_space_back(service: Service) -> None:
    """A download under way when its image is deleted still gets all of it; then the file is let go."""
    content = os.urandom(16 * MIB)
    image = service.upload(content)
    with Connection(service.port, receive_buffer=4096) as connection:
        connection.send(f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.head()[0] == 200
        assert service.delete(image["id"]).status == 200
        received = bytearray()
        while len(received) < len(content):
            received += connection.recv(MIB)
    assert received == content
    wait_for(lambda: service.image_files() == [], 5, "the deleted file is closed")
