"""A sender may say which digest the bytes must have; others are not kept."""

from __future__ import annotations

import base64
import hashlib

import pytest

from tests.client import Body, Connection
from tests.harness import Service
from tests.source import Resource, Source

CONTENT = b"a guest image, known by its digest\n" * 1000
DIGEST = hashlib.sha256(CONTENT)
HEX = DIGEST.hexdigest()
WRONG = hashlib.sha256(b"another").hexdigest()
SAID = {
    "X-Image-Sha256": HEX,
    "Content-Digest": f"sha-256=:{base64.b64encode(DIGEST.digest()).decode()}:",
    "Repr-Digest": f"sha-256=:{base64.b64encode(DIGEST.digest()).decode()}:",
}


def put(service: Service, body: Body, **headers: str) -> tuple[int, dict[str, object]]:
    answer = service.request("PUT", "/images", body, {"X-Image-Type": "kvm", **headers})
    return answer.status, answer.json()


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_with_the_right_digest(service: Service, name: str, chunked: bool) -> None:
    status, image = put(service, iter([CONTENT]) if chunked else CONTENT, **{name: SAID[name]})
    assert (status, image["status"], image["sha256"], image["expected_sha256"]) == (200, "complete", HEX, HEX)


def test_nothing_is_expected_when_nothing_was_said(service: Service) -> None:
    """The document is then the one that clients know."""
    status, image = put(service, CONTENT)
    assert status == 200
    assert [key for key in image if key != "replicas"][-2:] == ["sha256", "error"]


@pytest.mark.parametrize("body", [CONTENT, b""], ids=len)
def test_an_upload_with_a_wrong_digest(service: Service, body: bytes) -> None:
    """422 with both digests; the record says the same, and no bytes are kept."""
    before = {image["id"] for image in service.images()}
    status, answer = put(service, body, **{"X-Image-Sha256": WRONG})
    assert status == 422
    said = f"the bytes have the SHA-256 {hashlib.sha256(body).hexdigest()}, and were to have {WRONG}"
    assert answer == {"message": said, "code": 422, "stack": []}
    (image,) = (image for image in service.images() if image["id"] not in before)
    assert (image["status"], image["error"], image["size"], image["sha256"]) == ("error", said, 0, "")
    assert service.download(image["id"]).status == 404
    assert not list(service.images_dir.rglob(f"{image['id']}*"))


@pytest.mark.parametrize("name", SAID)
def test_a_header_that_is_no_digest(service: Service, name: str) -> None:
    """400 ahead of the body, and no record of it."""
    before = service.images()
    with Connection(service.port) as connection:
        connection.begin_upload(len(CONTENT), f"{name}: 0123", "Expect: 100-continue")
        answer = connection.answer()
    assert (answer.status, answer.message) == (400, answer.message)
    assert name in answer.message
    assert service.images() == before


def test_a_fetch_with_the_right_digest(service: Service, source: Source) -> None:
    url = source.serve("/right", CONTENT)
    image = service.post({"source": url, "type": "kvm", "sha256": HEX.upper()}).json()
    assert image["expected_sha256"] == HEX
    assert service.wait_status(image["id"], "complete", "error")["sha256"] == HEX


def test_a_fetch_with_a_wrong_digest(service: Service, source: Source) -> None:
    """Ends in `error` with both digests, is not tried again, and keeps no bytes."""
    url = source.serve("/wrong", CONTENT)
    posted = service.post({"source": url, "type": "kvm", "sha256": WRONG}).json()
    image = service.wait_status(posted["id"], "complete", "error")
    assert image["error"] == f"the bytes have the SHA-256 {HEX}, and were to have {WRONG}"
    assert (image["status"], image["size"], len(source.asked("/wrong"))) == ("error", 0, 1)
    assert not list(service.images_dir.rglob(f"{image['id']}*"))


@pytest.mark.parametrize("again", [{"sha256": HEX}, {}], ids=["corrected", "withdrawn"])
def test_a_corrected_digest(service: Service, source: Source, again: dict[str, str]) -> None:
    """Of an image in error the newest POST says what is expected."""
    url = source.serve(f"/corrected-{len(again)}", CONTENT)
    first = service.post({"source": url, "type": "kvm", "sha256": WRONG}).json()
    service.wait_status(first["id"], "error")
    second = service.post({"source": url, "type": "kvm", **again}).json()
    assert second["id"] == first["id"]
    assert service.wait_status(first["id"], "complete", "error")["status"] == "complete"


@pytest.mark.parametrize(
    ("sha256", "message"),
    [("0123", "invalid sha256: a SHA-256 is 64 hex digits"), (17, "sha256 is not a string")],
)
def test_a_post_with_what_is_no_digest(service: Service, source: Source, sha256: object, message: str) -> None:
    answer = service.post({"source": source.url + "/none", "type": "kvm", "sha256": sha256})
    assert (answer.status, answer.message) == (400, message)


def test_what_is_expected_outlives_the_process(service: Service, source: Source) -> None:
    """A fetch that a kill interrupted is still held to its digest."""
    resource = Resource(CONTENT, stall_after=100)
    url = source.serve("/outlives", resource)
    posted = service.post({"source": url, "type": "kvm", "sha256": WRONG}).json()
    source.wait_asked("/outlives")
    service.kill()
    source.serve("/outlives", CONTENT)
    service.start()
    assert WRONG in service.wait_status(posted["id"], "complete", "error")["error"]
