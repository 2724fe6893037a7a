"""The wire contract's section "Image JSON"."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.client import Answer
from tests.harness import Service
from tests.source import Resource, Source

CONTENT = b"twenty-four bytes it is\n"
KEYS = ["id", "source", "type", "comment", "status", "size", "expected_size", "download_start", "download_end"]
NEW_KEYS = ["sha256", "error"]
# Where members share records.
SHARED_KEYS = ["replicas"]
NEVER = "0001-01-01T00:00:00Z"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")


def assert_is_wire_form(answer: Answer) -> dict[str, Any]:
    """The keys in their order, compact, with a newline, as application/json; returns the image."""
    assert answer.headers["Content-Type"] == "application/json"
    image: dict[str, Any] = answer.json()
    assert list(image) in (KEYS + NEW_KEYS, KEYS + NEW_KEYS + SHARED_KEYS)
    assert answer.body == json.dumps(image, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    return image


def moment(text: str) -> datetime:
    assert TIME.fullmatch(text), text
    return datetime.fromisoformat(text)


def test_every_answer_with_an_image_has_its_wire_form(service: Service, source: Source) -> None:
    """PUT, POST, GET and DELETE all give the keys in the contract's order, compact, with a trailing newline."""
    uploaded = assert_is_wire_form(service.put(CONTENT, comment='ünïcode & <b> "quoted"'))
    assert_is_wire_form(service.get(f"/images/{uploaded['id']}"))
    assert_is_wire_form(service.delete(uploaded["id"]))
    posted = assert_is_wire_form(service.post({"source": source.serve("/guest", CONTENT), "type": "kvm"}))
    service.wait_status(posted["id"], "complete")
    assert_is_wire_form(service.get(f"/images/{posted['id']}"))


def test_an_id_is_a_version_4_uuid_of_the_services_own(service: Service, source: Source) -> None:
    """Whatever a POST sends beyond source, type, comment and sha256 is ignored."""
    mine = str(uuid.uuid4())
    document = {"id": mine, "status": "complete", "size": 7, "error": "no", "owner": "me"}
    url = source.serve("/guest", Resource(CONTENT, hold=True))
    image = service.post({**document, "source": url, "type": "kvm"}).json()
    assert image["id"] != mine
    assert uuid.UUID(image["id"]).version == 4
    assert str(uuid.UUID(image["id"])) == image["id"]
    assert (image["status"], image["size"], image["sha256"], image["error"]) == ("pending", 0, "", "")
    assert list(image) in (KEYS + NEW_KEYS, KEYS + NEW_KEYS + SHARED_KEYS)


@pytest.mark.parametrize("comment", ["", "plain", "für Gäste", "客人 𝄞", "Ã¼", "a\tb", "x" * 8000])
def test_a_comment_header_is_utf_8(service: Service, comment: str) -> None:
    """X-Image-Comment carries any text as UTF-8."""
    image = service.upload(CONTENT, comment=comment.encode())
    assert image["comment"] == comment
    assert service.image(image["id"])["comment"] == comment


def test_a_comment_header_that_is_no_utf_8_breaks_nothing(service: Service) -> None:
    """It is refused, or kept as some text that JSON can carry."""
    answer = service.put(CONTENT, comment=b"caf\xe9")
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert "caf" in answer.json()["comment"]
    service.images()


def test_sizes_of_an_upload(service: Service) -> None:
    """`expected_size` is the announced length, or -1 when there was none; `size` is what is stored."""
    announced = service.upload(CONTENT)
    assert (announced["size"], announced["expected_size"]) == (24, 24)
    unknown = service.upload(iter([CONTENT[:3], CONTENT[3:]]))
    assert (unknown["size"], unknown["expected_size"]) == (24, -1)
    assert service.download(unknown["id"]).body == CONTENT


def test_sizes_of_a_fetch(service: Service, source: Source) -> None:
    """`expected_size` is what the source announced, also while it is still sending, or -1 when it did not say."""
    sizes = {}
    for name, resource in {
        "announced": Resource(CONTENT),
        "chunked": Resource(CONTENT, chunked=True),
        "until the end": Resource(CONTENT, announce=None),
    }.items():
        resource.stall_after = 5
        image = service.fetch(source.serve(f"/{name.replace(' ', '-')}", resource))
        downloading = service.wait_status(image["id"], "downloading")
        resource.resume()
        complete = service.wait_status(image["id"], "complete")
        sizes[name] = (downloading["expected_size"], complete["expected_size"], complete["size"])
    assert sizes == {"announced": (24, 24, 24), "chunked": (-1, -1, 24), "until the end": (-1, -1, 24)}


def test_times_of_an_upload(service: Service) -> None:
    """`download_start` and `download_end` are RFC 3339 in UTC, around the transfer."""
    before = datetime.now(UTC)
    image = service.upload(CONTENT)
    after = datetime.now(UTC)
    start, end = moment(image["download_start"]), moment(image["download_end"])
    tick = timedelta(milliseconds=1)
    assert before - tick <= start <= end <= after + tick


def test_a_time_that_has_not_come_is_gos_zero_time(service: Service, source: Source) -> None:
    """Pending: neither time is there; downloading: the start; complete: both."""
    resource = Resource(CONTENT, hold=True, stall_after=5)
    image = service.fetch(source.serve("/guest", resource))
    assert (image["download_start"], image["download_end"]) == (NEVER, NEVER)
    resource.begin()
    downloading = service.wait_status(image["id"], "downloading")
    assert moment(downloading["download_start"]).year > 1
    assert downloading["download_end"] == NEVER
    resource.resume()
    complete = service.wait_status(image["id"], "complete")
    assert moment(complete["download_start"]) <= moment(complete["download_end"])


def test_no_trailing_zeros_in_a_time(service: Service) -> None:
    """Fractions of a second are written as Go writes them."""
    times = [service.upload(CONTENT)[key] for _ in range(15) for key in ("download_start", "download_end")]
    assert not [text for text in times if re.search(r"\.\d*0Z|\.Z", text)]


def test_the_digest_is_there_when_the_image_is(service: Service, source: Source) -> None:
    """`sha256` is empty until `complete`, and then the hex digest of the stored bytes."""
    content = os.urandom(3_000_001)
    assert service.upload(content)["sha256"] == hashlib.sha256(content).hexdigest()
    resource = Resource(content, stall_after=2_000_000)
    image = service.fetch(source.serve("/guest", resource))
    assert image["sha256"] == ""
    assert service.wait_status(image["id"], "downloading")["sha256"] == ""
    resource.resume()
    assert service.wait_status(image["id"], "complete")["sha256"] == hashlib.sha256(content).hexdigest()


def test_an_error_has_its_reason(service: Service, source: Source) -> None:
    """`error` is a sentence when the status is `error`, with no digest; else it is empty."""
    image = service.fetch(source.serve("/guest", Resource(status=404)))
    failed = service.wait_status(image["id"], "error")
    assert "404" in failed["error"]
    assert failed["sha256"] == ""
    assert moment(failed["download_end"]) > datetime.now(UTC) - timedelta(minutes=1)
    assert_is_wire_form(service.get(f"/images/{image['id']}"))
    assert (image["error"], service.upload(CONTENT)["error"]) == ("", "")


def test_status_only_goes_forward(service: Service, source: Source) -> None:
    """Seen from outside an image is `pending`, then `downloading`, then `complete`, and `size` never falls."""
    image = service.fetch(source.serve("/guest", Resource(os.urandom(400_000), rate=400_000)))
    seen = [image]
    while seen[-1]["status"] not in ("complete", "error"):
        seen.append(service.image(image["id"]))
        time.sleep(0.01)
    order = ["pending", "downloading", "complete"]
    steps = [order.index(state["status"]) for state in seen]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2}
    sizes = [state["size"] for state in seen]
    assert sizes == sorted(sizes)
