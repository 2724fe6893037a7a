"""Downloads of the real program: ranges on the wire, and files that end too early."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.client import Connection
from tests.harness import Service, wait_for
from tests.service.conftest import IDLE, LIMIT, MIB

CONTENT = os.urandom(16 * MIB + 7)


@pytest.fixture
def service(guarded_service: Service) -> Service:
    return guarded_service


def logged(service: Service, image_id: str) -> list[tuple[int, int]]:
    """Status and bytes of the downloads of an image."""
    lines = service.events("request", path=f"/images/{image_id}/download")
    return [(line["status"], line["bytes"]) for line in lines]


def test_parts_make_the_whole(service: Service) -> None:
    """Whatever the ranges, on one connection, each has exactly its bytes; put together they are the image."""
    image = service.upload(CONTENT)
    few = random.sample(range(3 * MIB), 20)
    cuts = sorted({0, 1, MIB - 1, MIB, 3 * MIB + 1, *few, 4 * MIB, 8 * MIB, 12 * MIB + 1, len(CONTENT)})
    wanted, whole = [], bytearray()
    with Connection(service.port) as connection:
        for first, end in itertools.pairwise(cuts):
            connection.send(
                f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\nRange: bytes={first}-{end - 1}\r\n\r\n"
            )
            answer = connection.answer()
            assert (answer.status, answer.headers["Content-Range"]) == (206, f"bytes {first}-{end - 1}/{len(CONTENT)}")
            assert answer.headers["ETag"] == f'"{image["sha256"]}"'
            whole += answer.body
            wanted.append((206, end - first))
    assert whole == CONTENT
    wait_for(lambda: len(logged(service, image["id"])) == len(wanted), 2, "all requests are logged")
    assert logged(service, image["id"]) == wanted


def test_a_range_behind_the_end_keeps_the_connection(service: Service) -> None:
    """After 416, and 412 and 304, the next request is answered."""
    image = service.upload(CONTENT)
    answers = []
    with Connection(service.port) as connection:
        for field in (f"Range: bytes={len(CONTENT)}-", 'If-Match: "x"', "If-None-Match: *", "Range: bytes=-1"):
            connection.send(f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\n{field}\r\n\r\n")
            status, headers = connection.head()
            answers.append((status, connection.rest(headers) if status != 304 else b""))
    assert [status for status, _ in answers] == [416, 412, 304, 206]
    assert answers[-1][1] == CONTENT[-1:]


@pytest.mark.parametrize("field", ["", f"Range: bytes={MIB}-\r\n"])
def test_a_file_that_is_cut_short(service: Service, field: str) -> None:
    """Under a download that waits in the middle: it is cut, not ended as if it were whole, and logged as cut."""
    image = service.upload(bytes(LIMIT))
    path = service.images_dir / image["id"]
    with Connection(service.port, receive_buffer=4096) as connection:
        connection.send(f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\n{field}\r\n")
        status, headers = connection.head()
        received = len(connection.recv(MIB))
        truncate(path, LIMIT - 1)
        try:
            while piece := connection.recv(MIB):
                received += len(piece)
        except ConnectionResetError:
            pass
    assert status == (206 if field else 200)
    assert 0 < received < int(headers["Content-Length"])
    wait_for(lambda: logged(service, image["id"]), 2, "the download is logged")
    ((status, sent),) = logged(service, image["id"])
    assert status == 599
    assert received <= sent < int(headers["Content-Length"])
    assert service.delete(image["id"]).status == 200


def test_a_range_that_nobody_reads(service: Service) -> None:
    """It is ended after idleTimeout, and its file closed, as the whole is."""
    image = service.upload(bytes(LIMIT))
    with Connection(service.port, receive_buffer=4096) as connection:
        connection.send(f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\nRange: bytes=5-\r\n\r\n")
        wait_for(service.image_files, 2, "the file is open")
        wait_for(lambda: service.image_files() == [], IDLE + 3, "the file is closed")
        assert connection.closed(2)
    wait_for(lambda: logged(service, image["id"]), 5, "the download is logged")
    assert [status for status, _ in logged(service, image["id"])] == [599]


def test_slow_readers_keep_nobody_waiting(service: Service) -> None:
    """While 64 clients hardly read, the next one gets its image at once, and memory stays where it was."""
    content = os.urandom(LIMIT)
    image = service.upload(content)
    before = service.memory()
    with ExitStack() as slow:
        readers = [slow.enter_context(Connection(service.port, receive_buffer=4096)) for _ in range(64)]
        for reader in readers:
            reader.send(f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\n\r\n")
        for reader in readers:
            assert reader.head()[0] == 200
        began = time.monotonic()
        assert service.download(image["id"]).body == content
        assert time.monotonic() - began < 3
        assert service.memory() - before < 40 * MIB


@pytest.mark.parametrize("leave", [Connection.reset, Connection.finish])
def test_a_client_that_leaves(service: Service, leave: Callable[[Connection], None]) -> None:
    """The file is closed at once, and the request logged with what was sent until then."""
    image = service.upload(bytes(LIMIT))
    with Connection(service.port, receive_buffer=4096) as connection:
        connection.send(f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\n\r\n")
        received = len(connection.recv(MIB))
        time.sleep(0.2)  # until the service waits
        leave(connection)
        wait_for(lambda: service.image_files() == [], IDLE / 2, "the file is closed")
    wait_for(lambda: logged(service, image["id"]), 2, "the download is logged")
    ((status, sent),) = logged(service, image["id"])
    assert status == 499
    assert received <= sent < LIMIT


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
