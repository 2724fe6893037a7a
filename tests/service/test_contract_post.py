"""The wire contract's rows for POST: an image is made from a source."""

from __future__ import annotations

import json
import subprocess
import threading

import pytest

from tests.client import Connection
from tests.harness import Service, wait_for
from tests.service.conftest import Settings, StartService
from tests.source import Resource, Source

CONTENT = b"a guest image, fetched\n"


def test_a_source_is_fetched_in_the_background(service: Service, source: Source) -> None:
    """POST answers 202 with the image, `pending`, before the source has answered; later it is complete."""
    resource = Resource(CONTENT, hold=True)
    url = source.serve("/guest", resource)
    answer = service.post({"source": url, "type": "container", "comment": "später"})
    assert answer.status == 202
    assert answer.headers["Content-Type"] == "application/json"
    image = answer.json()
    expected = {"source": url, "type": "container", "comment": "später", "status": "pending", "size": 0}
    assert expected.items() <= image.items()
    resource.begin()
    complete = service.wait_status(image["id"], "complete", "error")
    assert (complete["status"], complete["size"]) == ("complete", len(CONTENT))
    assert service.download(image["id"]).body == CONTENT


def test_a_comment_is_optional(service: Service, source: Source) -> None:
    """Without a comment the image has an empty one."""
    answer = service.post({"source": source.serve("/guest", CONTENT), "type": "kvm"})
    assert (answer.status, answer.json()["comment"]) == (202, "")
    service.wait_status(answer.json()["id"], "complete")


def test_an_operators_curl_posts(service: Service, source: Source) -> None:
    """`curl -d` works, though it announces the JSON as a form."""
    document = json.dumps({"source": source.serve("/guest", CONTENT), "type": "kvm"})
    command = ["curl", "-sS", "-w", "%{stderr}%{http_code}", "-d", document, f"{service.url}/images"]
    curl = subprocess.run(command, check=True, capture_output=True, timeout=30)
    assert curl.stderr == b"202"
    service.wait_status(json.loads(curl.stdout)["id"], "complete")


def test_the_body_may_come_in_chunks(service: Service, source: Source) -> None:
    """A chunked document is as good as one with a length."""
    document = json.dumps({"source": source.serve("/guest", CONTENT), "type": "kvm"}).encode()
    answer = service.request("POST", "/images", iter([document[:10], document[10:]]))
    assert answer.status == 202


@pytest.mark.parametrize("state", ["pending", "downloading", "complete"])
def test_the_same_source_again_is_the_same_image(service: Service, source: Source, state: str) -> None:
    """A second POST of a source is 202 with the image that exists, in its present state and with its own type and
    comment; the source is asked once."""
    resource = Resource(CONTENT, hold=state == "pending", stall_after=3 if state == "downloading" else None)
    url = source.serve("/guest", resource)
    image = service.fetch(url, "kvm", "first")
    service.wait_status(image["id"], state)
    again = service.post({"source": url, "type": "container", "comment": "second"})
    assert again.status == 202
    assert again.json() == service.image(image["id"])
    resource.begin()
    resource.resume()
    assert service.wait_status(image["id"], "complete")["comment"] == "first"
    assert len(source.asked("/guest")) == 1


def test_a_source_that_failed_is_fetched_again(service: Service, source: Source) -> None:
    """POST of a source whose image is in `error` is the same image, `pending`, without the old reason, and it is
    fetched again."""
    url = source.serve("/guest", Resource(b"busy", status=500))
    image = service.fetch(url, comment="mine")
    assert "500" in service.wait_status(image["id"], "error")["error"]
    healthy = Resource(CONTENT, hold=True)
    source.serve("/guest", healthy)
    again = service.fetch(url, "container", "other")
    assert (again["id"], again["status"], again["error"]) == (image["id"], "pending", "")
    assert (again["type"], again["comment"]) == ("kvm", "mine")
    healthy.begin()
    complete = service.wait_status(image["id"], "complete")
    assert (complete["error"], service.download(image["id"]).body) == ("", CONTENT)
    assert len(source.asked("/guest")) == 2


def test_parallel_posts_of_a_failed_source_fetch_it_once(service: Service, source: Source) -> None:
    """Eight POSTs at once of a source whose image is in `error` start one fetch."""
    url = source.serve("/guest", Resource(b"", status=404))
    image = service.fetch(url)
    service.wait_status(image["id"], "error")
    resource = Resource(CONTENT, hold=True)
    source.serve("/guest", resource)
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(service.fetch(url)["id"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    resource.begin()
    service.wait_status(image["id"], "complete")
    assert answers == [image["id"]] * 8
    assert len(source.asked("/guest")) == 2


def test_a_deleted_source_can_be_fetched_anew(service: Service, source: Source) -> None:
    """After DELETE the source is free: a POST makes a new image."""
    url = source.serve("/guest", CONTENT)
    first = service.fetch(url)
    service.wait_status(first["id"], "complete")
    assert service.delete(first["id"]).status == 200
    second = service.fetch(url)
    assert second["id"] != first["id"]
    service.wait_status(second["id"], "complete")


def test_sources_that_differ_at_all_are_different(service: Service, source: Source) -> None:
    """Sources are compared as text."""
    one, other = service.fetch(source.serve("/guest", CONTENT)), service.fetch(source.serve("/guest?x", CONTENT))
    assert one["id"] != other["id"]
    for image in (one, other):
        service.wait_status(image["id"], "complete")


URL = "http://127.0.0.1:9/never"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"type": "kvm"}, "missing image source"),
        ({"source": "", "type": "kvm"}, "missing image source"),
        ({"source": URL}, "invalid image type"),
        ({"source": URL, "type": ""}, "invalid image type"),
        ({"source": URL, "type": "other"}, "invalid image type"),
        ({"source": URL, "type": "KVM"}, "invalid image type"),
    ],
)
def test_what_is_missing_is_said(service: Service, document: object, message: str) -> None:
    """A document without a source or a good type is 400, in the Go program's words."""
    answer = service.post(document)
    assert (answer.status, answer.message) == (400, message)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"not json",
        b'{"source": "http://127.0.0.1:9/never", "type": "kvm"',
        b'\xff\xfe{"source"}',
        b'{"source": "http://127.0.0.1:9/\xff", "type": "kvm"}',
        b"[" * 60_000,
        b'{"a":' * 12_000,
        b"[]",
        b"null",
        b"3",
        b'"http://127.0.0.1:9/never"',
        [{"source": URL, "type": "kvm"}],
        {"source": 3, "type": "kvm"},
        {"source": [URL], "type": "kvm"},
        {"source": True, "type": "kvm"},
        {"source": URL, "type": 3},
        {"source": URL, "type": ["kvm"]},
        {"source": URL, "type": "kvm", "comment": 3},
        {"source": URL, "type": "kvm", "comment": {"a": "b"}},
    ],
    ids=lambda document: repr(document)[:30],
)
def test_what_is_no_such_document_is_refused(service: Service, document: object) -> None:
    """Not JSON, not an object, and a wrong JSON type are 400, say so, and make no image."""
    before = len(service.images())
    answer = service.post(document)
    assert answer.status == 400
    assert answer.message
    assert len(service.images()) == before


@pytest.mark.parametrize(
    "source_url",
    [
        "guest.img",
        "/srv/guest.img",
        "//host/guest.img",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "ftp://127.0.0.1/guest.img",
        "gopher://127.0.0.1/x",
        "http:",
        "http://",
        "http:///guest.img",
        "http:guest.img",
        "https://:80/x",
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1:port/x",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/\r\nX-Evil: 1",
        "http://127.0.0.1/\x00",
        " http://127.0.0.1/",
        "http://[::1/x",
    ],
)
def test_a_source_is_an_absolute_http_url(service: Service, source_url: str) -> None:
    """Any other source is 400, at once."""
    answer = service.post({"source": source_url, "type": "kvm"})
    assert answer.status == 400, answer.body
    assert "source" in answer.message


def test_a_scheme_may_be_in_capitals(service: Service, source: Source) -> None:
    """URLs say nothing else by it."""
    image = service.fetch(source.serve("/guest", CONTENT).replace("http", "HTTP"))
    service.wait_status(image["id"], "complete")


@pytest.mark.parametrize("comment", ["\ud800", "a\x00b", "\x7f\x1b[31m", "𝄞", '"\\\r\n\u2028'])
def test_odd_text_does_no_harm(service: Service, source: Source, comment: str) -> None:
    """A comment is any text; one that is no text at all (half a surrogate pair) may be refused, or stored as
    something that is. The list can be read either way."""
    answer = service.post({"source": source.serve("/guest", CONTENT), "type": "kvm", "comment": comment})
    if comment != "\ud800":
        assert (answer.status, answer.json()["comment"]) == (202, comment)
    else:
        assert answer.status in (202, 400)
    if answer.status == 202:
        image = service.wait_status(answer.json()["id"], "complete")
        assert image["comment"] == answer.json()["comment"]
    service.images()


def test_a_huge_document_is_refused(service: Service) -> None:
    """A body that nobody needs is answered, with 400 or 413, and not kept in memory."""
    before = service.memory()
    document = {"source": URL, "type": "kvm", "comment": "x" * (64 << 20)}
    with Connection(service.port) as connection:
        body = json.dumps(document).encode()
        connection.send(f"POST /images HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n")
        connection.send_until_refused(body[: 1 << 20], len(body))
        assert connection.answer().status in (400, 413)
    assert service.memory() - before < 32 << 20


def test_fetches_wait_their_turn(start_service: StartService, records: Settings, source: Source) -> None:
    """No more than fetch.concurrency sources are asked at once; the others stay `pending`, and come next."""
    service = start_service(**records, fetch_concurrency=2)
    resources = [Resource(CONTENT, hold=True) for _ in range(4)]
    images = [service.fetch(source.serve(f"/{n}", resource)) for n, resource in enumerate(resources)]
    wait_for(lambda: len(source.exchanges) == 2, 5, "two sources are asked")
    assert [service.image(image["id"])["status"] for image in images] == ["pending"] * 4
    resources[0].begin()
    wait_for(lambda: len(source.exchanges) == 3, 5, "a third source is asked")
    for resource in resources:
        resource.begin()
    for image in images:
        service.wait_status(image["id"], "complete")
