"""Fault 7 of the Go program: a client that reset in the middle of a large list pinned a core for ever."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import statistics
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imgsvc.metadata.image import Image, ImageType
from imgsvc.metadata.sqlite import SqliteMetadataStore, insert_record
from imgsvc.metadata.store import Member
from tests.client import Connection
from tests.harness import wait_for
from tests.service.conftest import StartService

MIB = 1 << 20


@pytest.fixture
def many_images(tmp_path: Path) -> Path:
    """A data directory with 20,000 records, none of which has bytes."""
    directory = tmp_path / "many"
    directory.mkdir()
    filename = directory / "imgsvc.db"
    with contextlib.closing(SqliteMetadataStore(filename, Member(str(uuid.uuid4()), "here", "http://127.0.0.1"))):
        pass  # it has made its tables
    with contextlib.closing(sqlite3.connect(filename)) as connection, connection:
        for n in range(20_000):
            image = Image(id=str(uuid.uuid4()), type=ImageType.KVM, comment=f"{n} " + "x" * 500, revision=1)
            insert_record(connection, image.started(5).failed("never meant"), claimed_source=None)
    return directory


def test_a_reset_in_a_large_list(start_service: StartService, many_images: Path) -> None:
    """Clients that reset, close or stop reading in the middle of 20,000 images leave a service that is idle, and
    answers."""
    service = start_service(many_images, idle_timeout=1)
    assert len(service.images()) == 20_000
    before = service.census()
    for end in [Connection.reset, Connection.close] * 5:
        connection = Connection(service.port, receive_buffer=4096)
        connection.send("GET /images HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.head()[0] == 200
        connection.recv(1000)
        end(connection)
    silent = Connection(service.port, receive_buffer=4096)
    silent.send("GET /images HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_for(lambda: service.census().sockets <= before.sockets, 10, "every connection is ended")
    silent.close()
    busy = service.cpu_seconds()
    time.sleep(3)
    assert service.cpu_seconds() - busy < 0.6
    assert service.get("/healthz").status == 200
    assert len(service.images("?type=container")) == 0


def test_a_large_list_that_nobody_reads_is_over(start_service: StartService, many_images: Path) -> None:
    """It is cut, has its line in the log, and the end of the service does not wait for it."""
    service = start_service(many_images, idle_timeout=1, shutdown_timeout=20)
    with Connection(service.port, receive_buffer=4096) as silent:
        silent.send("GET /images HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: service.events("request", path="/images"), 10, "the request is over")
    (line,) = service.events("request", path="/images")
    assert line["status"] == 599
    began = time.monotonic()
    assert service.terminate() == 0
    assert time.monotonic() - began < 5


def test_a_large_list_in_http_1_0(start_service: StartService, many_images: Path) -> None:
    """It has no length and no chunks, so the connection ends with it, whatever the client asked for."""
    service = start_service(many_images)
    with Connection(service.port) as connection:
        connection.send("GET /images HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        _, body = connection.read_to_the_end().split(b"\r\n\r\n", 1)
    assert len(json.loads(body)) == 20_000


def test_the_head_of_a_large_list(start_service: StartService, many_images: Path) -> None:
    """HEAD of 20,000 images costs no more than a page of them, and the connection goes on."""
    service = start_service(many_images, scrub_interval=0)  # its first pass looks at all records, too
    busy = service.cpu_seconds()
    with Connection(service.port) as connection:
        connection.send("HEAD /images HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.answer("HEAD").status == 200
        assert connection.answer().json() == {"status": "ok"}
    time.sleep(0.5)
    assert service.cpu_seconds() - busy < 0.2


def test_a_large_list_does_not_block_the_others(start_service: StartService, many_images: Path) -> None:
    """While 20,000 images are listed again and again, another request waits for a fraction of the time that one list
    takes, and memory stays bounded."""
    service = start_service(many_images)
    service.images()
    waits = []
    with ThreadPoolExecutor(2) as pool:
        all_began = time.monotonic()
        lists = [pool.submit(service.get, "/images") for _ in range(20)]
        while not all(one.done() for one in lists):
            began = time.monotonic()
            assert service.get("/healthz").status == 200
            waits.append(time.monotonic() - began)
            time.sleep(0.01)
    one_list = (time.monotonic() - all_began) / 20
    assert statistics.median(waits) < one_list / 4
    assert service.memory("VmHWM") < 200 * MIB
