"""Downloads of images that are on their way from another member, over a real context and a member that misbehaves."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Iterator

import pytest
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer

from imgsvc.metadata.image import Image, Status
from imgsvc.metadata.mirror import Known, LiveMember
from tests.api.conftest import Service
from tests.api.test_streaming import MIB, connected, until
from tests.source import Resource, Source

BODY = os.urandom(6 * MIB + 5)


class Elsewhere:
    """An image that one other member holds, which answers with `resource`."""

    def __init__(self, service: Service, source: Source) -> None:
        self.source = source
        self.image = service.complete(BODY)
        service.disk.delete(self.image.id)
        self.mirror = service.context.pulls._supply.choice._mirror
        self.mirror.join(LiveMember("other", source.url))
        self._put(self.image)

    @property
    def path(self) -> str:
        return f"/images/{self.image.id}/download"

    def serve(self, resource: Resource) -> Resource:
        resource = dataclasses.replace(resource, body=BODY, etag=f'"{self.image.sha256}"')
        self.source.serve(self.path, resource)
        return resource

    def asked(self) -> int:
        return len(self.source.asked(self.path))

    def _put(self, image: Image) -> None:
        self.mirror.put(
            Known(image.id, image.to_json(), 1, Status.COMPLETE, image.type, image.size, replicas=("other",))
        )


@pytest.fixture
def elsewhere(service: Service) -> Iterator[Elsewhere]:
    with Source() as source:
        yield Elsewhere(service, source)


@pytest.mark.gen_test
async def test_whole(http_client: AsyncHTTPClient, base_url: str, elsewhere: Elsewhere, service: Service) -> None:
    """It comes with what is said of any image, and is here from then on."""
    elsewhere.serve(Resource())
    answer = await http_client.fetch(base_url + elsewhere.path)
    assert answer.body == BODY
    assert answer.headers["ETag"] == f'"{elsewhere.image.sha256}"'
    await until(lambda: list(service.disk.ids()) == [elsewhere.image.id])
    assert (await http_client.fetch(base_url + elsewhere.path)).body == BODY
    assert elsewhere.asked() == 1


@pytest.mark.gen_test
async def test_what_needs_no_bytes(http_client: AsyncHTTPClient, base_url: str, elsewhere: Elsewhere) -> None:
    """HEAD, and conditions that do not hold, are answered from the record alone."""
    url, tag = base_url + elsewhere.path, f'"{elsewhere.image.sha256}"'
    head = await http_client.fetch(url, method="HEAD")
    assert (head.code, head.headers["Content-Length"], head.headers["ETag"]) == (200, str(len(BODY)), tag)
    for fields, status in (
        ({"If-None-Match": tag}, 304),
        ({"If-Match": '"x"'}, 412),
        ({"Range": f"bytes={len(BODY)}-"}, 416),
    ):
        assert (await http_client.fetch(url, headers=fields, raise_error=False)).code == status
    assert elsewhere.asked() == 0


@pytest.mark.gen_test
async def test_a_range_waits_for_its_part(http_client: AsyncHTTPClient, base_url: str, elsewhere: Elsewhere) -> None:
    """And for no more; the last of all waits for the whole."""
    resource = elsewhere.serve(Resource(stall_after=3 * MIB))
    url = base_url + elsewhere.path
    first = await http_client.fetch(url, headers={"Range": f"bytes=5-{3 * MIB - 1}"})
    assert (first.code, first.body) == (206, BODY[5 : 3 * MIB])
    last = asyncio.ensure_future(http_client.fetch(url, headers={"Range": "bytes=-5"}))
    done, _ = await asyncio.wait({last}, timeout=0.2)
    assert not done
    resource.resume()
    assert (await last).body == BODY[-5:]
    assert elsewhere.asked() == 1


@pytest.mark.gen_test(timeout=20)
async def test_hundreds_that_wait(
    http_client: AsyncHTTPClient, base_url: str, elsewhere: Elsewhere, service: Service
) -> None:
    """One pull is for all of them, and those that wait hold up nobody else."""
    resource = elsewhere.serve(Resource(stall_after=150_000))
    many = AsyncHTTPClient(force_instance=True, max_clients=300)
    wanted = {"Range": "bytes=100-299999"}
    waiting = [asyncio.ensure_future(many.fetch(base_url + elsewhere.path, headers=wanted)) for _ in range(300)]
    await until(lambda: len(service.in_flight) == 300)
    await asyncio.sleep(0.5)
    began = time.monotonic()
    await http_client.fetch(f"{base_url}/healthz")
    assert time.monotonic() - began < 0.5
    resource.resume()
    for answer in waiting:
        assert (await answer).body == BODY[100:300_000]
    many.close()
    assert elsewhere.asked() == 1


@pytest.mark.gen_test
async def test_clients_that_leave(
    http_server: HTTPServer, http_port: int, elsewhere: Elsewhere, service: Service
) -> None:
    """While they wait: they are gone at once, and the pull goes on."""
    resource = elsewhere.serve(Resource(stall_after=2 * MIB))
    request = f"GET {elsewhere.path} HTTP/1.1\r\nHost: x\r\n"
    async with connected(http_port) as whole, connected(http_port) as part:
        await whole.send(f"{request}\r\n".encode())
        await part.send(f"{request}Range: bytes=-1\r\n\r\n".encode())
        await whole.reader.readexactly(2 * MIB)
    await until(lambda: not service.in_flight._requests, 1.0)
    assert service.context.pulls.running == 1
    resource.resume()
    await until(lambda: list(service.disk.ids()) == [elsewhere.image.id])


@pytest.mark.gen_test
async def test_a_member_that_dies(http_server: HTTPServer, http_port: int, elsewhere: Elsewhere) -> None:
    """Its clients are cut; later ones are told that there is none, and by which name it is missed."""
    answers = iter([elsewhere.serve(Resource(cut_after=2 * MIB))])
    elsewhere.source.serve(elsewhere.path, lambda _exchange: next(answers, Resource(status=500)))
    async with connected(http_port) as wire:
        await wire.send(f"GET {elsewhere.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, body = await wire.answer()
    assert head.startswith(b"HTTP/1.1 200")
    assert f"Content-Length: {len(BODY)}".encode() in head
    assert len(body) <= 2 * MIB
    assert BODY.startswith(body)
    async with connected(http_port) as wire:
        await wire.send(f"GET {elsewhere.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head, body = await wire.answer()
    assert head.startswith(b"HTTP/1.1 503")
    assert b"other at http" in body


@pytest.mark.gen_test
async def test_a_member_asks(
    http_client: AsyncHTTPClient, base_url: str, elsewhere: Elsewhere, service: Service
) -> None:
    """It gets what is here, and never causes a further pull."""
    elsewhere.serve(Resource())
    fields = {"X-Imgsvc-Peer": "third"}
    answer = await http_client.fetch(base_url + elsewhere.path, headers=fields, raise_error=False)
    assert (answer.code, elsewhere.asked()) == (503, 0)
    own = service.complete(b"own")
    answer = await http_client.fetch(f"{base_url}/images/{own.id}/download", headers=fields)
    assert (answer.body, answer.headers["X-Imgsvc-Load"]) == (b"own", "1")


@pytest.mark.gen_test
async def test_a_shutdown(http_server: HTTPServer, http_port: int, elsewhere: Elsewhere, service: Service) -> None:
    """Those that wait are cut."""
    elsewhere.serve(Resource(stall_after=2 * MIB))
    async with connected(http_port) as wire:
        await wire.send(f"GET {elsewhere.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await wire.reader.readexactly(MIB)
        await service.in_flight.drain(0.1)
        assert len((await wire.answer())[1]) < len(BODY)
    await asyncio.to_thread(service.context.pulls.close)
    assert list(service.disk.unfinished()) == []
