"""Requests that make no sense, and several on one connection: a clear answer or a close, and nothing is left."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.client import Connection
from tests.harness import Service
from tests.service.conftest import StartService

MIB = 1 << 20


@pytest.fixture
def service(guarded_service: Service) -> Service:
    return guarded_service


# Nonsense


@pytest.mark.parametrize(
    "target",
    [
        "/images/..%2f..%2f..%2fetc%2fpasswd",
        "/images/..%2f..%2f..%2fetc%2fpasswd/download",
        "/images/../../../../etc/passwd",
        "/images/%2e%2e/%2e%2e/etc/passwd/download",
        "/images/%00",
        "/images/%00/download",
        "/images/.incoming",
        "/images/.imgsvc/download",
        "/" * 10_000,
        "/images" + "/" * 10_000,
        "/images/" + "a/" * 10_000,
        "/images/%",
        "/images/%zz%1",
        "/images/%ff%fe",
        "/images/\xff\xfe",
        "/images?type=%ff",
        "/images?type=%00",
        "/images?" + "&" * 20_000,
        "/images?" + "type=kvm&" * 5_000,
        "/images#fragment",
        "//images",
        "\\images",
        "images",
        "http://elsewhere/images/x",
        "*",
        "?",
    ],
    ids=lambda target: target[:40].encode().hex() if "\xff" in target else target[:40],
)
def test_a_path_that_makes_no_sense(connection: Connection, target: str) -> None:
    """A client's error, or for what can be understood an answer; never the server's error, and never another file."""
    connection.send(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode("latin-1"))
    assert connection.readable(4)
    answer = connection.answer()
    assert answer.status in (200, 400, 404, 414), answer
    assert b"root:" not in answer.body


@pytest.mark.parametrize(
    "request_",
    [
        "\r\n\r\n\r\n",
        "GET\r\n\r\n",
        "GET /images\r\n\r\n",
        "GET /images HTTP/9.9\r\n\r\n",
        "GET /images HTTP/x\r\n\r\n",
        "GET  /images  HTTP/1.1\r\n\r\n",
        "GET /im ages HTTP/1.1\r\nHost: x\r\n\r\n",
        "G\x00T /images HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /im\x00ages HTTP/1.1\r\nHost: x\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + "\x00" * 600,
        "GET /images HTTP/1.1\r\nHost x\r\n\r\n",
        "GET /images HTTP/1.1\r\n: x\r\n\r\n",
        "GET /images HTTP/1.1\r\nHo\x00st: x\r\n\r\n",
        "GET /images HTTP/1.1\r\nHost : x\r\n\r\n",
        "GET /images HTTP/1.1\r\nHost: x\r\nX: " + "x" * 100_000 + "\r\n\r\n",
        "GET /images HTTP/1.1\r\nHost: x\r\nX: " + "x" * 2_000_000,
        "GET /images HTTP/1.1\r\nHost: x\r\n" + "X: y\r\n" * 20_000 + "\r\n",
        "GET /" + "x" * 200_000 + " HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=lambda request: repr(request[:30]),
)
def test_what_is_no_request(connection: Connection, request_: str) -> None:
    """It is refused, or the connection is ended."""
    connection.send_until_refused(request_.encode("latin-1"), 1)
    connection.refused()


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5, 6",
        "Content-Length: -5",
        "Content-Length: +5",
        "Content-Length: 5.0",
        "Content-Length: 0x5",
        "Content-Length: 1_0",
        "Content-Length: five",
        "Content-Length: \xb2",
        "Content-Length:",
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: xchunked",
    ],
)
def test_a_length_that_is_none(service: Service, connection: Connection, headers: str) -> None:
    """What could be read in two ways is not read at all: there is no image, and the connection ends."""
    before = len(service.images())
    connection.send(f"PUT /images HTTP/1.1\r\nHost: x\r\nX-Image-Type: kvm\r\n{headers}\r\n\r\n".encode("latin-1"))
    connection.send("hello")
    status = connection.refused()
    assert status == 0 or connection.closed(2)
    assert len(service.images()) == before


def test_a_length_given_twice_alike(connection: Connection) -> None:
    """The same length twice is that length, or refused."""
    connection.begin_upload(5, "Content-Length: 5")
    connection.send("hello")
    assert connection.answer().status in (200, 400)


def test_no_length_at_all(service: Service, connection: Connection) -> None:
    """A PUT without a length or chunks has no body: it is refused, or an image of no bytes."""
    connection.send("PUT /images HTTP/1.1\r\nHost: x\r\nX-Image-Type: kvm\r\n\r\n")
    answer = connection.answer()
    assert answer.status in (200, 411)
    if answer.status == 200:
        assert (answer.json()["size"], answer.json()["status"]) == (0, "complete")


# Several requests on one connection


def test_pipelined_requests(service: Service, connection: Connection) -> None:
    """Requests sent at once are answered one after the other, in order."""
    connection.begin_upload(5)
    connection.send("helloGET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /images/x HTTP/1.1\r\nHost: x\r\n\r\n")
    connection.begin_upload(6)
    connection.send("hello!")
    answers = [connection.answer() for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 404, 200]
    assert (answers[0].json()["size"], answers[3].json()["size"]) == (5, 6)


def test_a_refused_body_is_no_request(service: Service, connection: Connection) -> None:
    """What follows a refused upload is its body, and is not looked at as requests."""
    image = service.upload(b"keep me")
    evil = f"DELETE /images/{image['id']} HTTP/1.1\r\nHost: x\r\n\r\n"
    connection.begin_upload(len(evil), image_type="other")
    connection.send(evil)
    assert connection.answer().status == 400
    assert connection.closed(2)
    assert service.image(image["id"]) == image


def test_a_body_where_none_is_expected(service: Service, connection: Connection) -> None:
    """A GET with a body is answered, and its body is not taken for the next request."""
    connection.send("GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
    connection.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert [connection.answer().status for _ in range(2)] == [200, 200]


def test_a_large_body_where_none_is_expected(service: Service, connection: Connection) -> None:
    """Nobody keeps 200 MB that a DELETE brings along."""
    connection.send("DELETE /images/x HTTP/1.1\r\nHost: x\r\nContent-Length: 200000000\r\n\r\n")
    connection.send_until_refused(bytes(MIB), 200_000_000)
    assert connection.answer().status in (400, 404, 413)
    assert service.memory() < 200 * MIB


def test_http_1_0(service: Service) -> None:
    """A client that speaks HTTP/1.0 gets answers that it can read: no chunks, and an end."""
    image = service.upload(b"content")
    for path in ("/images", f"/images/{image['id']}", f"/images/{image['id']}/download"):
        with Connection(service.port) as connection:
            connection.send(f"GET {path} HTTP/1.0\r\n\r\n")
            answer = connection.answer()
            assert (answer.status, "Transfer-Encoding" in answer.headers) == (200, False)
            assert answer.body == service.get(path).body
            assert connection.closed(2)
    with Connection(service.port) as connection:
        connection.send("PUT /images HTTP/1.0\r\nX-Image-Type: kvm\r\nContent-Length: 5\r\n\r\nhello")
        assert connection.answer().json()["size"] == 5


def test_sixty_four_uploads_at_once(start_service: StartService) -> None:
    """They stay below 400 MiB of memory, however slow the disk is compared with the senders."""
    service = start_service()
    barrier = threading.Barrier(64)

    def upload(_: int) -> None:
        with Connection(service.port, timeout=60) as connection:
            connection.begin_upload(6 * MIB)
            connection.send(bytes(3 * MIB))
            barrier.wait(60)
            connection.send(bytes(3 * MIB))
            answer = connection.answer()
            assert answer.status == 200, answer
            assert answer.json()["status"] == "complete"

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(upload, range(64)))
    assert service.memory("VmHWM") < 400 * MIB


@pytest.mark.parametrize(
    ("request_line", "status", "message"),
    [
        ("GET /images/%ff", 404, "image not found"),
        ("GET /images/%ff/download", 404, "image not found"),
        ("BREW /nowhere", 404, "not found"),
        ("BREW /images", 405, "method not allowed"),
    ],
)
def test_what_no_handler_was_asked_for(connection: Connection, request_line: str, status: int, message: str) -> None:
    """A path that is no UTF-8 names no image, and a path that is not there has no methods."""
    connection.send(f"{request_line} HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = connection.answer()
    assert (answer.status, answer.message) == (status, message)
    assert (answer.headers["Allow"] is not None) == (status == 405)
