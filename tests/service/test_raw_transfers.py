"""Uploads and downloads of clients that are slow, broken or greedy: a clear answer or a close, and nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client import Connection
from tests.harness import Service, wait_for
from tests.service.conftest import IDLE, LIMIT, StartService
from tests.service.helpers import assert_is_error, marked

MIB = 1 << 20


@pytest.fixture
def service(guarded_service: Service) -> Service:
    return guarded_service


# Expect: 100-continue


def test_a_good_upload_is_told_to_go_on(connection: Connection) -> None:
    """Expect: 100-continue gets its 100 before the body, and 200 after it."""
    connection.begin_upload(5, "Expect: 100-continue")
    assert connection.head()[0] == 100
    connection.send("hello")
    answer = connection.answer()
    assert (answer.status, answer.json()["size"]) == (200, 5)


@pytest.mark.parametrize(
    ("length", "image_type", "status"),
    [(5, "other", 400), (None, "", 400), (LIMIT + 1, "kvm", 413), (10**17, "kvm", 413)],
)
def test_a_bad_upload_is_not(connection: Connection, length: int | None, image_type: str, status: int) -> None:
    """One that cannot be taken gets its final answer instead of the 100, and the connection ends."""
    connection.begin_upload(length, "Expect: 100-continue", image_type=image_type)
    assert_is_error(connection.answer(), status)
    assert connection.closed(2)


# Chunked bodies


@pytest.mark.parametrize("sizes", [[1] * 300, [1, 65_536, 3], [MIB - 1, 2, MIB], [3 * MIB], []])
def test_chunks_of_any_size(service: Service, connection: Connection, sizes: list[int]) -> None:
    """However a body is cut into chunks, its bytes are stored."""
    content = os.urandom(sum(sizes))
    connection.begin_upload(None)
    at = 0
    for size in sizes:
        connection.send_chunk(content[at : at + size])
        at += size
    connection.send_chunk(b"")
    answer = connection.answer()
    assert answer.status == 200
    assert service.download(answer.json()["id"]).body == content


def test_chunks_in_odd_packets(service: Service, connection: Connection) -> None:
    """Packets that end within a chunk's size, its data or its end make no difference; nor do capitals and zeros."""
    connection.begin_upload(None)
    for packet in ("0", "00", "A\r", "\nabcdefghij", "\r", "\n", "1\r\nk\r\n", "00\r", "\n\r", "\n"):
        connection.send(packet)
        time.sleep(0.02)
    answer = connection.answer()
    assert answer.status == 200
    assert service.download(answer.json()["id"]).body == b"abcdefghijk"


@pytest.mark.parametrize("size", ["zz", "-5", "+5", "0x5", "1_0", "", " ", "f" * 40, "5 5", "5" * 100_000])
def test_a_chunk_size_that_is_none(service: Service, connection: Connection, size: str) -> None:
    """The upload ends there, and is no image."""
    mark = str(uuid.uuid4())
    connection.begin_upload(None, f"X-Image-Comment: {mark}")
    connection.send_chunk(b"good")
    connection.send_until_refused(f"{size}\r\nhello\r\n0\r\n\r\n".encode(), 1)
    connection.refused()
    wait_for(lambda: marked(service, mark) in ([], ["error"]), 2, "no image, or one in error")


# Clients that vanish


@pytest.mark.parametrize("end", [Connection.close, Connection.reset])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_client_that_vanishes_at_any_byte(service: Service, end: Callable[[Connection], None], chunked: bool) -> None:
    """In the headers there is no image; in the body, and before the last chunk, there is one in `error`."""
    mark = str(uuid.uuid4())
    announced = "Transfer-Encoding: chunked" if chunked else "Content-Length: 3000"
    head = f"PUT /images HTTP/1.1\r\nHost: x\r\nX-Image-Type: kvm\r\nX-Image-Comment: {mark}\r\n{announced}\r\n\r\n"
    body = b"bb8\r\n" + bytes(3000) + b"\r\n0\r\n\r\n" if chunked else bytes(3000)
    request = head.encode() + body
    cuts = [
        *range(0, len(head) + 12, 9),
        *range(len(head) + 12, len(request), 301),
        *range(len(request) - 8, len(request)),
    ]
    for cut in cuts:
        connection = Connection(service.port)
        connection.send(request[:cut])
        end(connection)
    wait_for(lambda: set(marked(service, mark)) <= {"error"}, 5, "all of them are in error")
    assert len(marked(service, mark)) <= sum(cut >= len(head) for cut in cuts)


def test_a_client_that_vanishes_before_its_answer(service: Service) -> None:
    """An upload that came whole is complete or in `error`, not in between, when nobody waits for the answer."""
    mark = str(uuid.uuid4())
    for _ in range(10):
        connection = Connection(service.port)
        connection.begin_upload(3000, f"X-Image-Comment: {mark}")
        connection.send(bytes(3000))
        connection.reset()
    wait_for(lambda: set(marked(service, mark)) <= {"complete", "error"}, 5, "each upload has ended")


def test_clients_that_vanish_from_downloads(service: Service) -> None:
    """A download that nobody reads any more is let go at once."""
    image = service.upload(bytes(16 * MIB))
    for n in range(10):
        connection = Connection(service.port)
        connection.send(f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.head()[0] == 200
        connection.recv(1 + n * 10_000)
        if n % 2:
            connection.reset()
        else:
            connection.close()
    wait_for(lambda: service.image_files() == [], 0.8 * IDLE, "each file is closed without waiting for a time-out")
    path = f"/images/{image['id']}/download"
    wait_for(lambda: len(service.events("request", path=path)) == 10, 5, "all are logged")
    # One that was ended by a time-out has another one.
    assert {line["status"] for line in service.events("request", path=path)} == {499}


# Clients that are silent, or slow


@pytest.mark.parametrize("sent", ["", "G", "GET /images HTTP/1.1\r\nHost: x\r\n", "PUT /images HTTP/1.1\r\nX-Image-Ty"])
def test_silence_before_the_body(connection: Connection, sent: str) -> None:
    """A connection on which no request comes is ended after idleTimeout, with 408 or without a word."""
    began = time.monotonic()
    connection.send(sent)
    assert connection.refused(IDLE + 4) in (0, 408)
    assert time.monotonic() - began > 0.8 * IDLE


def test_silence_after_an_answer(connection: Connection) -> None:
    """A connection that is kept alive and not used again is ended after idleTimeout."""
    connection.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert connection.answer().status == 200
    assert connection.closed(IDLE + 4)


@pytest.mark.parametrize("length", [1000, None])
@pytest.mark.parametrize("sent", [b"", b"64\r\n" + bytes(90)])
def test_silence_in_an_upload(service: Service, connection: Connection, length: int | None, sent: bytes) -> None:
    """An upload that stops for idleTimeout gets 408 and an end; its image is in `error` and says so."""
    mark = str(uuid.uuid4())
    began = time.monotonic()
    connection.begin_upload(length, f"X-Image-Comment: {mark}")
    connection.send(sent)
    assert connection.readable(IDLE + 3), "the upload was not ended"
    assert_is_error(connection.answer(), 408)
    assert time.monotonic() - began > 0.8 * IDLE
    assert connection.closed(2)
    assert marked(service, mark) == ["error"]


def test_silence_in_a_document(connection: Connection) -> None:
    """The same goes for the JSON of a POST."""
    connection.send('POST /images HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"source":')
    assert connection.refused(IDLE + 4) in (0, 408)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_slow_upload_is_not_silent(connection: Connection, chunked: bool) -> None:
    """One that keeps sending, however little, may take several times idleTimeout."""
    body = b"a very slow body"
    connection.begin_upload(None if chunked else len(body))
    for byte in body:
        time.sleep(0.25 * IDLE)
        connection.send(b"1\r\n%c\r\n" % byte if chunked else bytes([byte]))
    if chunked:
        connection.send_chunk(b"")
    answer = connection.answer()
    assert (answer.status, answer.json()["size"]) == (200, len(body))


def test_a_download_that_nobody_reads(service: Service) -> None:
    """It is ended after idleTimeout, and its file closed."""
    image = service.upload(bytes(LIMIT))
    with Connection(service.port, receive_buffer=4096) as connection:
        connection.send(f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(service.image_files, 2, "the file is open")
        wait_for(lambda: service.image_files() == [], IDLE + 4, "the file is closed")
        assert connection.closed(2)
    assert service.delete(image["id"]).status == 200


def test_a_slow_download_is_not_silent(service: Service) -> None:
    """A reader that takes several times idleTimeout for less than a block gets every byte."""
    content = os.urandom(20 * MIB)
    image = service.upload(content)
    with Connection(service.port, receive_buffer=65536) as connection:
        connection.send(f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.head()[0] == 200
        received = bytearray()
        began = time.monotonic()
        while time.monotonic() - began < 5 * IDLE:
            received += connection.recv(16_384)
            time.sleep(0.1)
        assert len(received) < MIB
        while len(received) < len(content):
            piece = connection.recv(MIB)
            assert piece, f"cut after {len(received)} bytes"
            received += piece
        assert received == content


# Too much


def test_too_large_with_a_length(service: Service, connection: Connection) -> None:
    """More than maxImageSize is 413 before the body, and makes no image."""
    before = len(service.images())
    began = time.monotonic()
    connection.begin_upload(LIMIT + 1)
    assert_is_error(connection.answer(), 413)
    assert time.monotonic() - began < 1, "the answer could not be read to its end at once"
    assert len(service.images()) == before


def test_too_large_without_a_length(service: Service, connection: Connection) -> None:
    """In mid-stream it is 413 too, read by a client that keeps sending until there is an answer."""
    mark = str(uuid.uuid4())
    connection.begin_upload(None, f"X-Image-Comment: {mark}")
    sent = connection.send_until_refused(b"%x\r\n%b\r\n" % (65536, bytes(65536)), 4 * LIMIT)
    assert LIMIT < sent < 2 * LIMIT
    assert_is_error(connection.answer(), 413)
    wait_for(lambda: marked(service, mark) == ["error"], 2, "the image is in error")


@pytest.mark.parametrize("chunked", [True, False])
def test_too_large_for_a_client_that_does_not_look(service: Service, chunked: bool) -> None:
    """One that sends all it has before it looks for an answer finds 413 and not a reset."""
    pieces = [bytes(MIB)] * (LIMIT // MIB + 8)
    answer = service.put(iter(pieces) if chunked else b"".join(pieces))
    assert_is_error(answer, 413)


def test_exactly_as_large_as_allowed(service: Service) -> None:
    """An image of maxImageSize fits, with a length and without."""
    for image in (service.upload(bytes(LIMIT)), service.upload(iter([bytes(MIB)] * (LIMIT // MIB)))):
        assert image["size"] == LIMIT
        service.delete(image["id"])


@pytest.mark.parametrize("how", [["-H", "Expect:"], [], ["-H", "Transfer-Encoding: chunked"], ["-0"]])
def test_curl_is_told_that_it_is_too_large(service: Service, tmp_path: Path, how: list[str]) -> None:
    """A real curl sees 413 and the reason, however it sends."""
    file = tmp_path / "large"
    with file.open("wb") as large:
        large.truncate(4 * LIMIT)
    command = ["curl", "-sS", "-T", str(file), "-H", "X-Image-Type: kvm", "-w", "\n%{http_code}", *how]
    curl = subprocess.run([*command, f"{service.url}/images"], capture_output=True, text=True, timeout=30, check=False)
    body, _, status = curl.stdout.rpartition("\n")
    assert (status, json.loads(body)["code"]) == ("413", 413), curl


def test_no_room(start_service: StartService) -> None:
    """When nothing may be written but the reserve, every upload is 507, announced or not."""
    service = start_service(disk_reserve="99%")
    with Connection(service.port) as announced, Connection(service.port) as chunked:
        announced.begin_upload(10 * MIB, "Expect: 100-continue")
        assert_is_error(announced.answer(), 507)
        chunked.begin_upload(None)
        chunked.send_until_refused(b"%x\r\n%b\r\n" % (65536, bytes(65536)), 4 * LIMIT)
        assert_is_error(chunked.answer(), 507)
    wait_for(lambda: service.incoming() == set(), 2, ".incoming is empty")
    assert {image["status"] for image in service.images()} <= {"error"}
