"""The download route over a real context: headers, conditions and ranges together, and what fails in the middle."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from structlog.testing import capture_logs
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer

from imgsvc.metadata.image import Image, ImageType, new_id
from tests.api.conftest import Service
from tests.api.test_streaming import MIB, connected, until
from tests.flaky import LOST
from tests.images.helpers import put

BODY = bytes(range(256))
DIGEST = hashlib.sha256(BODY).hexdigest()
ENDED = datetime(2026, 11, 6, 8, 49, 37, 999_999, tzinfo=UTC)
LAST_MODIFIED = "Fri, 06 Nov 2026 08:49:37 GMT"
REPR_DIGEST = f"sha-256=:{base64.b64encode(hashlib.sha256(BODY).digest()).decode()}:"
EARLIER = format_datetime(ENDED - timedelta(days=1), usegmt=True)


class Asking:
    def __init__(self, client: AsyncHTTPClient, base_url: str, image: Image) -> None:
        self._client = client
        self._url = f"{base_url}/images/{image.id}/download"

    async def __call__(self, method: str = "GET", **fields: str) -> HTTPResponse:
        headers = {name.replace("_", "-"): value for name, value in fields.items()}
        return await self._client.fetch(self._url, method=method, headers=headers, raise_error=False)


def stored(service: Service, body: bytes = BODY, sha256: str | None = None, source: str = "") -> Image:
    """A complete image, of which the record says that it ended at ENDED."""
    image = Image(id=new_id(), type=ImageType.KVM, source=source).started(len(body))
    image = service.base.create(dataclasses.replace(image, download_start=ENDED))
    put(service.disk, image.id, body)
    done = image.completed(len(body), hashlib.sha256(body).hexdigest() if sha256 is None else sha256)
    return service.base.update(dataclasses.replace(done, download_end=ENDED))


@pytest.fixture
def ask(http_client: AsyncHTTPClient, base_url: str, service: Service) -> Asking:
    return Asking(http_client, base_url, stored(service))


def described(answer: HTTPResponse, *names: str) -> dict[str, str | None]:
    usual = ("ETag", "Last-Modified", "Repr-Digest", "Accept-Ranges", "Content-Type", "Content-Length", "Content-Range")
    return {name: answer.headers.get(name) for name in names or usual}


WHOLE = {
    "ETag": f'"{DIGEST}"',
    "Last-Modified": LAST_MODIFIED,
    "Repr-Digest": REPR_DIGEST,
    "Accept-Ranges": "bytes",
    "Content-Type": "application/octet-stream",
    "Content-Length": "256",
    "Content-Range": None,
}


@pytest.mark.gen_test
async def test_the_loop_closes_no_file(ask: Asking, service: Service) -> None:
    """It may be the last one of a deleted image, all blocks of which are freed then."""
    closed_by: list[str] = []

    def plan(_number: int, name: str) -> None:
        if name == "close":
            closed_by.append(threading.current_thread().name)

    service.faults.plan = plan
    assert (await ask()).code == 200
    await until(lambda: bool(closed_by))
    assert [name.partition("_")[0] for name in closed_by] == ["reads"]


@pytest.mark.gen_test
async def test_a_file_that_is_closed_after_the_pools(ask: Asking, service: Service) -> None:
    """As when the disk hangs while the service stops: that is no error."""
    service.context.reads_pool.close()
    assert (await ask("HEAD")).code == 200
    await until(lambda: "close" in service.faults.calls)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.gen_test
async def test_whole(ask: Asking, method: str) -> None:
    """HEAD says the same as GET."""
    answer = await ask(method)
    assert (answer.code, described(answer)) == (200, WHOLE)
    assert answer.body == (BODY if method == "GET" else b"")


@pytest.mark.gen_test
async def test_range(ask: Asking) -> None:
    """206 has exactly these bytes, their place, and the digest of the whole; the log counts what was sent."""
    with capture_logs() as logged:
        answer = await ask(Range="bytes=10-19")
    part = {"Content-Length": "10", "Content-Range": "bytes 10-19/256"}
    assert (answer.code, described(answer)) == (206, WHOLE | part)
    assert answer.body == BODY[10:20]
    (line,) = [line for line in logged if line["event"] == "request"]
    assert (line["status"], line["bytes"]) == (206, 10)


@pytest.mark.gen_test
async def test_head_has_no_ranges(ask: Asking) -> None:
    """A range is defined for GET alone; even one that cannot be satisfied changes nothing for HEAD."""
    for field in ("bytes=10-19", "bytes=256-"):
        answer = await ask("HEAD", Range=field)
        assert (answer.code, described(answer)) == (200, WHOLE)


@pytest.mark.parametrize("field", ["bytes=9-1", "lines=0-1", "bytes=0-1,5-6"])
@pytest.mark.gen_test
async def test_a_range_that_does_not_count(ask: Asking, field: str) -> None:
    """Invalid, of another unit, or several: the whole."""
    answer = await ask(Range=field)
    assert (answer.code, described(answer), answer.body) == (200, WHOLE, BODY)


@pytest.mark.gen_test
async def test_no_byte_in_the_range(ask: Asking) -> None:
    """416 says how many bytes there are, and speaks of itself and not of the image."""
    answer = await ask(Range="bytes=256-")
    assert answer.code == 416
    assert json.loads(answer.body) == {"message": "the image has no bytes in this range", "code": 416, "stack": []}
    wanted = {"ETag": None, "Last-Modified": None, "Repr-Digest": None, "Content-Type": "application/json"}
    assert described(answer, *wanted) == wanted
    assert answer.headers["Content-Range"] == "bytes */256"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.gen_test
async def test_not_modified(ask: Asking, method: str) -> None:
    """304 has the validators and nothing that describes bytes; it goes before any range."""
    for fields in ({"If_None_Match": f'W/"{DIGEST}"'}, {"If_None_Match": "*"}, {"If_Modified_Since": LAST_MODIFIED}):
        answer = await ask(method, Range="bytes=256-", **fields)
        wanted = {name: WHOLE[name] if name in ("ETag", "Last-Modified") else None for name in WHOLE}
        assert (answer.code, described(answer), answer.body) == (304, wanted, b"")
        assert "Date" in answer.headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.gen_test
async def test_a_list_of_tags_that_is_none(ask: Asking, method: str) -> None:
    """It matches nothing, for HEAD either."""
    for field in (f'x "{DIGEST}"', f'"x, "{DIGEST}"', "* x"):
        assert (await ask(method, If_None_Match=field)).code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.gen_test
async def test_precondition_failed(ask: Asking, method: str) -> None:
    """412 is an error like any other; it goes before 304, 416 and 206."""
    for fields in ({"If_Match": f'W/"{DIGEST}"'}, {"If_Unmodified_Since": EARLIER}):
        answer = await ask(method, If_None_Match="*", Range="bytes=0-1", **fields)
        assert (answer.code, answer.headers["Content-Type"]) == (412, "application/json")
        assert "ETag" not in answer.headers
        if method == "GET":
            assert json.loads(answer.body)["message"] == "a precondition of the request does not hold"
        else:
            assert int(answer.headers["Content-Length"]) > 0


@pytest.mark.gen_test
async def test_if_range(ask: Asking) -> None:
    """The part when the client's is of these bytes, and else the whole, also where the range would be none."""
    for validator in (f'"{DIGEST}"', LAST_MODIFIED):
        assert (await ask(Range="bytes=0-0", If_Range=validator)).body == BODY[:1]
        assert (await ask(Range="bytes=256-", If_Range=validator)).code == 416
    for validator in (f'W/"{DIGEST}"', '"other"', EARLIER):
        for field in ("bytes=0-0", "bytes=256-"):
            answer = await ask(Range=field, If_Range=validator)
            assert (answer.code, answer.body) == (200, BODY)


@pytest.mark.gen_test
async def test_a_weak_date(http_client: AsyncHTTPClient, base_url: str, service: Service) -> None:
    """An image that was fetched within one second has none that If-Range may go by."""
    ask = Asking(http_client, base_url, stored(service, source="http://mirror.example/x"))
    assert (await ask(Range="bytes=0-0", If_Range=LAST_MODIFIED)).code == 200
    assert (await ask(Range="bytes=0-0", If_Range=f'"{DIGEST}"')).code == 206


@pytest.mark.gen_test
async def test_without_a_digest(http_client: AsyncHTTPClient, base_url: str, service: Service) -> None:
    """An image that has none yet has no tag, and ranges all the same."""
    ask = Asking(http_client, base_url, stored(service, sha256=""))
    answer = await ask(Range="bytes=-1", If_Match="*")
    assert (answer.code, answer.body) == (206, BODY[-1:])
    wanted = {"ETag": None, "Repr-Digest": None, "Last-Modified": LAST_MODIFIED}
    assert described(answer, *wanted) == wanted
    assert (await ask(Range="bytes=0-0", If_Range='""')).code == 200


@pytest.mark.gen_test
async def test_an_empty_image(http_client: AsyncHTTPClient, base_url: str, service: Service) -> None:
    """It is whole with no bytes, and no range has one."""
    ask = Asking(http_client, base_url, stored(service, b""))
    for method, field in (("GET", "bytes=-5"), ("GET", "none"), ("HEAD", "bytes=0-")):
        answer = await ask(method, Range=field)
        assert (answer.code, answer.headers["Content-Length"], answer.body) == (200, "0", b"")
    answer = await ask(Range="bytes=0-")
    assert (answer.code, answer.headers["Content-Range"]) == (416, "bytes */0")
    assert (await ask(If_None_Match="*")).code == 304


@pytest.mark.parametrize("call", ["read", "send"])
@pytest.mark.gen_test
async def test_a_disk_that_fails(http_server: HTTPServer, http_port: int, service: Service, call: str) -> None:
    """Before the first byte of a range it is an error like any other; behind it, the connection is cut."""
    image = stored(service, bytes(8 * MIB))
    service.faults.next(call, LOST)
    async with connected(http_port) as wire:
        fields = b"Host: x\r\nConnection: close\r\nRange: bytes=1-%d\r\n" % (6 * MIB)
        await wire.send(b"GET /images/%b/download HTTP/1.1\r\n%b\r\n" % (image.id.encode(), fields))
        head, body = await wire.answer()
    if call == "send":
        assert head.startswith(b"HTTP/1.1 206")
        assert b"content-length: %d" % (6 * MIB) in head.lower()
        assert 0 < len(body) < 6 * MIB
    else:
        assert head.startswith(b"HTTP/1.1 503")
        assert json.loads(body)["message"] == str(LOST.error)
        assert not {b"etag", b"content-range", b"repr-digest"} & {line.split(b":")[0].lower() for line in head.split()}
