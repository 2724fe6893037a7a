"""The wire contract's section "Bytes": what is stored is what was sent, or nothing is."""

from __future__ import annotations

import gzip
import os
import socket
import time

import pytest

from tests.client import Connection
from tests.harness import Service, wait_for
from tests.service.conftest import StartService
from tests.source import Resource, Source

BLOCK = 1 << 20
CONTENT = os.urandom(200_000)


def assert_fails(service: Service, url: str, *words: str) -> None:
    """A fetch of the URL ends in `error`, says so in these words, and leaves no bytes anywhere."""
    image = service.fetch(url)
    failed = service.wait_status(image["id"], "error", "complete")
    assert failed["status"] == "error"
    for word in words:
        assert word in failed["error"].lower(), failed["error"]
    assert failed["error"]
    assert service.download(image["id"]).status == 404
    wait_for(lambda: image["id"] not in service.incoming(), 2, "nothing of it in .incoming")
    assert image["id"] not in service.stored()


def assert_fetches(service: Service, url: str, content: bytes) -> None:
    """A fetch of the URL stores exactly this."""
    image = service.fetch(url)
    complete = service.wait_status(image["id"], "complete", "error")
    assert complete["status"] == "complete", complete
    assert service.download(image["id"]).body == content


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_an_upload_is_stored_to_the_bit(service: Service, size: int) -> None:
    """Every size around the block's, with a length and in chunks, comes back as it was sent."""
    content = os.urandom(size)
    pieces = [content[n : n + 77_777] for n in range(0, size, 77_777)]
    for image in (service.upload(content), service.upload(iter(pieces))):
        assert image["size"] == size
        answer = service.download(image["id"])
        assert (answer.headers["Content-Length"], answer.body == content) == (str(size), True)
        assert (service.images_dir / image["id"]).read_bytes() == content


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_fetch_is_stored_to_the_bit(service: Service, source: Source, size: int, chunked: bool) -> None:
    """The same for what a source sends."""
    content = os.urandom(size)
    assert_fetches(service, source.serve("/guest", Resource(content, chunked=chunked)), content)


def test_a_gzipped_upload_stays_gzipped(service: Service) -> None:
    """Whatever its Content-Encoding says, a body is stored as it came."""
    content = gzip.compress(CONTENT)
    answer = service.request("PUT", "/images", content, {"X-Image-Type": "kvm", "Content-Encoding": "gzip"})
    assert answer.status == 200
    download = service.download(answer.json()["id"])
    assert download.body == content
    assert "Content-Encoding" not in download.headers


def test_a_download_is_not_compressed(service: Service) -> None:
    """Nor does a client get other bytes because it would take them compressed."""
    image = service.upload(b"a" * 100_000)
    answer = service.request("GET", f"/images/{image['id']}/download", headers={"Accept-Encoding": "gzip, br"})
    assert (answer.body, "Content-Encoding" in answer.headers) == (b"a" * 100_000, False)


def test_a_fetch_never_decompresses(service: Service, source: Source) -> None:
    """A response that is gzipped on the way is stored gzipped, and none is asked for."""
    resource = Resource.gzipped(CONTENT)
    assert_fetches(service, source.serve("/guest", resource), resource.body)
    assert "accept-encoding" not in source.asked("/guest")[0].headers


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_fetch_follows_redirects(service: Service, source: Source, status: int) -> None:
    """To a path, and to another server; the image keeps the source that was given."""
    with Source() as other:
        target = other.serve("/there", CONTENT)
        source.serve("/here", Resource.redirect(target, status))
        start = source.serve("/start", Resource.redirect("/here", status))
        assert_fetches(service, start, CONTENT)
        assert service.fetch(start)["source"] == start
        assert [exchange.method for exchange in source.exchanges + other.exchanges] == ["GET"] * 3


def test_redirects_come_to_an_end(service: Service, source: Source) -> None:
    """A loop of redirects is an error that says so."""
    url = source.serve("/loop", Resource.redirect("/loop"))
    assert_fails(service, url, "redirect")
    assert len(source.asked("/loop")) < 50


def test_as_many_redirects_as_the_settings_say(start_service: StartService, source: Source) -> None:
    """fetch.maxRedirects are followed, and not one more."""
    service = start_service(fetch_max_redirects=2)
    source.serve("/0", CONTENT)
    for n in range(1, 4):
        source.serve(f"/{n}", Resource.redirect(f"/{n - 1}"))
    assert_fetches(service, f"{source.url}/2", CONTENT)
    assert_fails(service, f"{source.url}/3", "redirect")


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1:{}/x", "gopher://127.0.0.1:{}/x"])
def test_a_redirect_to_anything_but_http_is_refused(service: Service, source: Source, location: str) -> None:
    """A source cannot make the service read its own files, or speak other protocols."""
    asked = len(source.exchanges)
    assert_fails(service, source.serve("/away", Resource.redirect(location.format(source.port))))
    assert len(source.exchanges) == asked + 1


@pytest.mark.parametrize("status", [201, 203, 204, 206, 304, 400, 401, 403, 404, 410, 416, 500, 503])
def test_any_other_status_is_an_error(service: Service, source: Source, status: int) -> None:
    """Only 200 brings an image; the reason names the status."""
    body = b"" if status in (204, 304) else b"this is no image"
    announce = None if status in (204, 304) else len(body)
    assert_fails(service, source.serve("/guest", Resource(body, status=status, announce=announce)), str(status))


@pytest.mark.parametrize("by", [1, 5_000, 300_000])
def test_a_body_shorter_than_announced(service: Service, source: Source, by: int) -> None:
    """A source that ends before its announced length is an error."""
    assert_fails(service, source.serve("/guest", Resource(CONTENT, announce=len(CONTENT) + by)))


@pytest.mark.parametrize("by", [1, 5_000])
def test_a_body_longer_than_announced(service: Service, source: Source, by: int) -> None:
    """A source that goes on after its announced length is an error: one of the two is not what was meant."""
    assert_fails(service, source.serve("/guest", Resource(CONTENT, announce=len(CONTENT) - by)))


@pytest.mark.parametrize("cut", [0, 1, 50_000, len(CONTENT)])
@pytest.mark.parametrize("reset", [True, False])
def test_a_chunked_body_that_is_cut(service: Service, source: Source, cut: int, reset: bool) -> None:
    """Without its last chunk a body is not whole, though all its bytes may have come."""
    resource = Resource(CONTENT, chunked=True, cut_after=cut, reset=reset)
    assert_fails(service, source.serve("/guest", resource))


def test_a_connection_that_is_reset(service: Service, source: Source) -> None:
    """A reset in mid-body is an error."""
    assert_fails(service, source.serve("/guest", Resource(CONTENT, cut_after=70_000, reset=True)))


def test_a_connection_that_is_refused(service: Service) -> None:
    """Nobody listening is an error that says so."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert_fails(service, f"http://127.0.0.1:{port}/guest", "connect")


def test_a_host_that_does_not_exist(service: Service) -> None:
    """A name that has no address is an error that names it."""
    assert_fails(service, "http://nosuchhost.invalid/guest", "nosuchhost.invalid")


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2_000_000,
    ],
    ids=["nothing", "no http", "negative", "no number", "bad chunk", "headers without end"],
)
def test_a_source_that_speaks_no_http(service: Service, source: Source, garbage: bytes) -> None:
    """Anything that is no proper answer is an error."""
    assert_fails(service, source.serve("/guest", Resource(garbage=garbage)))


@pytest.mark.parametrize("resource", [Resource(CONTENT, hold=True), Resource(CONTENT, stall_after=70_000)])
def test_a_source_that_stalls(start_service: StartService, source: Source, resource: Resource) -> None:
    """After fetch.stallTimeout without a byte a fetch is an error, before the first byte and after some."""
    service = start_service(fetch_stall_timeout=1)
    began = time.monotonic()
    assert_fails(service, source.serve("/guest", resource))
    assert 0.9 < time.monotonic() - began < 4
    assert source.asked("/guest")[0].closed.wait(2)


def test_a_slow_source_is_not_stalled(start_service: StartService, source: Source) -> None:
    """One that keeps sending, however little, may take longer than fetch.stallTimeout."""
    service = start_service(fetch_stall_timeout=1)
    assert_fetches(service, source.serve("/guest", Resource(b"x" * 60, rate=20)), b"x" * 60)


@pytest.mark.parametrize("announce", [-1, None])
def test_a_fetch_that_is_too_large(start_service: StartService, source: Source, announce: int | None) -> None:
    """More than maxImageSize is an error, announced or not; the source is not read to its end."""
    service = start_service(max_image_size=BLOCK)
    resource = Resource(bytes(40 * BLOCK), announce=announce)
    assert_fails(service, source.serve("/guest", resource), str(BLOCK))
    assert source.asked("/guest")[0].closed.wait(2)
    assert source.asked("/guest")[0].sent < 20 * BLOCK
    assert_fetches(service, source.serve("/fits", Resource(bytes(BLOCK), announce=announce)), bytes(BLOCK))


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "http://2852039166/x", "http://[fe80::1]/x"])
def test_a_denied_network_is_not_asked(service: Service, url: str) -> None:
    """Link-local addresses are refused at once, however they are written."""
    began = time.monotonic()
    assert_fails(service, url)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "127.1"])
def test_denied_networks_are_those_of_the_settings(start_service: StartService, source: Source, host: str) -> None:
    """The address that a connection would go to counts: not how it is written, nor that a redirect leads there."""
    service = start_service(fetch_deny_networks="127.0.0.0/8,::1/128")
    source.serve("/guest", CONTENT)
    assert_fails(service, f"http://{host}:{source.port}/guest")
    assert source.exchanges == []


def test_a_redirect_to_a_denied_network_is_not_followed(service: Service, source: Source) -> None:
    """Each hop of a fetch is checked."""
    assert_fails(service, source.serve("/guest", Resource.redirect("http://169.254.169.254/latest")))


def test_a_proxy_in_the_environment_is_not_used(
    start_service: StartService, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go round the check of addresses."""
    with Source() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert_fetches(start_service(), source.serve("/guest", CONTENT), CONTENT)
        assert proxy.exchanges == []


def test_no_partial_bytes_under_the_final_name(service: Service, source: Source) -> None:
    """While an image comes in, by upload or fetch, its final name does not exist and its download is 404."""
    image = service.fetch(source.serve("/guest", Resource(bytes(3 * BLOCK), stall_after=2 * BLOCK)))
    known = {other["id"] for other in service.images()}
    with Connection(service.port) as connection:
        connection.begin_upload(3 * BLOCK)
        connection.send(bytes(2 * BLOCK))
        wait_for(lambda: {other["id"] for other in service.images()} - known, 5, "the upload has its record")
        (upload,) = {other["id"] for other in service.images()} - known
        for image_id in (upload, image["id"]):
            service.wait_status(image_id, "downloading")
            assert service.download(image_id).message == "incomplete image"
            assert image_id in service.incoming()
            assert image_id not in service.stored()
        connection.send(bytes(BLOCK))
        assert connection.answer().status == 200
    assert upload in service.stored()
