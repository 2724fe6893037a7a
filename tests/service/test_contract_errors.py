"""The wire contract's section "Errors", and what every answer carries."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.client import Answer, Client, Connection
from tests.harness import Service, wait_for
from tests.service.conftest import StartService
from tests.service.helpers import assert_is_error

NOBODY = str(uuid.UUID(int=1))


@dataclass(frozen=True)
class Mistake:
    """A request that a client should not make, and the status that it gets."""

    method: str
    path: str
    status: int
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def send(self, client: Client) -> Answer:
        return client.request(self.method, self.path, self.body, self.headers)


MISTAKES = [
    Mistake("GET", "/images?type=other", 400),
    Mistake("PUT", "/images", 400, b"x"),
    Mistake("PUT", "/images", 400, b"x", {"X-Image-Type": "other"}),
    Mistake("POST", "/images", 400, b"{"),
    Mistake("POST", "/images", 400, b"{}"),
    Mistake("POST", "/images", 400, b'{"source": "file:///etc/passwd", "type": "kvm"}'),
    Mistake("GET", f"/images/{NOBODY}", 404),
    Mistake("GET", "/images/nonsense", 404),
    Mistake("DELETE", f"/images/{NOBODY}", 404),
    Mistake("GET", f"/images/{NOBODY}/download", 404),
    Mistake("GET", "/nowhere", 404),
    Mistake("GET", "/", 404),
    Mistake("DELETE", "/images", 405),
    Mistake("PATCH", f"/images/{NOBODY}", 405, b"x"),
    Mistake("PUT", f"/images/{NOBODY}/download", 405, b"x"),
    Mistake("BREW", "/healthz", 405),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.method} {mistake.path}")
def test_every_error_is_the_same_document(service: Service, mistake: Mistake) -> None:
    """Each error is the HTTP status with message, code and an empty stack, whatever the route."""
    assert_is_error(mistake.send(service), mistake.status)


def test_a_message_says_nothing_of_the_server(service: Service) -> None:
    """No path of the server, no type of exception and no module is in an error."""
    for mistake in MISTAKES:
        text = mistake.send(service).body.decode()
        for word in (str(service.data_dir), "Traceback", ".py", "imgsvc", "Error("):
            assert word not in text


def test_the_operator_may_expose_the_stack(start_service: StartService) -> None:
    """With exposeStack on, `stack` says where the error was raised; it is still a list of strings."""
    service = start_service(expose_stack=True)
    for mistake in MISTAKES:
        answer = mistake.send(service)
        error = answer.json()
        assert (answer.status, error["code"]) == (mistake.status, mistake.status)
        assert list(error) == ["message", "code", "stack"]
        assert all(isinstance(line, str) for line in error["stack"])
    assert any("imgsvc" in line for line in service.get(f"/images/{NOBODY}").json()["stack"])


def test_a_clients_mistakes_are_no_errors_of_the_service(service: Service) -> None:
    """None of them is logged as one, let alone with a traceback."""
    before = len(service.log)
    for mistake in MISTAKES:
        mistake.send(service)
    wait_for(lambda: len(service.log) >= before + len(MISTAKES), 5, "a line for each request")
    assert {line["level"] for line in service.log[before:]} <= {"info", "debug", "warning"}
    assert "Traceback" not in str(service.log[before:])


def test_every_answer_has_its_request_id(service: Service) -> None:
    """X-Request-Id is on errors too, and never the same twice."""
    ids = [mistake.send(service).headers["X-Request-Id"] for mistake in MISTAKES]
    image = service.put(b"content")
    ids += [image.headers["X-Request-Id"], service.download(image.json()["id"]).headers["X-Request-Id"]]
    ids += [service.get(path).headers["X-Request-Id"] for path in ("/images", "/healthz", "/readyz")]
    assert all(ids)
    assert len(set(ids)) == len(ids)


def test_every_request_has_its_line_in_the_log(service: Service) -> None:
    """One line with method, path, status, bytes, duration, remote and the request id of the answer."""
    image_id = service.upload(b"content")["id"]
    for method, path, status, size in [
        ("GET", f"/images/{image_id}/download", 200, 7),
        ("GET", f"/images/{image_id}", 200, None),
        ("DELETE", f"/images/{NOBODY}", 404, None),
        ("GET", "/nowhere", 404, None),
    ]:
        answer = service.request(method, path)
        request_id = answer.headers["X-Request-Id"]

        def lines(request_id: str = request_id) -> list[dict[str, Any]]:
            return [line for line in service.log if line.get("request") == request_id and "status" in line]

        wait_for(lines, 5, f"a line for {method} {path}")
        (line,) = lines()
        assert (line["method"], line["path"], line["status"]) == (method, path, status)
        assert line["bytes"] == (len(answer.body) if size is None else size)
        assert 0 <= line["duration"] < 10
        assert line["remote"].startswith("127.0.0.1")


def test_no_secrets_in_the_log(service: Service) -> None:
    """The password in a source's URL stays out of the log, though the source fails."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    image = service.fetch(f"http://guest:topsecret@127.0.0.1:{port}/x?token=alsosecret")
    failed = service.wait_status(image["id"], "error")
    service.get(f"/images?type=kvm&{failed['id']}")
    assert "topsecret" not in str(service.log)
    assert "topsecret" not in failed["error"]


def test_an_error_does_not_end_the_connection(service: Service) -> None:
    """After an error whose request was read to its end, the next request on the connection is answered."""
    with Connection(service.port) as connection:
        for mistake in MISTAKES:
            # What is refused ahead of its body ends with its connection: the body may be long.
            # So does a method that nobody knows, which may have a body of any kind.
            if mistake.method in ("PUT", "BREW") or (mistake.status == 405 and mistake.body):
                continue
            body = mistake.body or b""
            head = f"{mistake.method} {mistake.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.send(head.encode() + body)
            assert connection.answer().status == mistake.status
        connection.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.answer().status == 200
