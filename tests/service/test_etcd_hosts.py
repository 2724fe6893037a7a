"""Two hosts that share their records in etcd: what one does, the other knows."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.client import Connection
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service, wait_for
from tests.service.conftest import StartService, on_etcd, two_hosts
from tests.service.crash import end_lease
from tests.service.helpers import assert_gone, begin_upload, post_at_once
from tests.source import Resource, Source

MIB = 1 << 20
# For a deletion to reach another host, and for what it then stops to stop.
STOPS = 3.0
# For bytes that another host holds to go.
GOES = 10.0


@pytest.fixture(scope="module")
def _two_hosts(etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Service]]:
    with two_hosts(etcd, "/test-two-hosts", tmp_path_factory) as hosts:
        yield hosts


@pytest.fixture
def one(_two_hosts: tuple[Service, Service]) -> Iterator[Service]:
    """A host that other tests of this module use too; its log must stay clean, and nothing may be left in transfer."""
    yield _two_hosts[0]
    _two_hosts[0].check_log()


@pytest.fixture
def other(_two_hosts: tuple[Service, Service]) -> Iterator[Service]:
    """The second, with the same records."""
    yield _two_hosts[1]
    _two_hosts[1].check_log()


def assert_gone_everywhere(one: Service, other: Service, image_id: str) -> None:
    """Neither host has anything of it, and after an interval of progress reports that is still so."""
    for wait in (0, 1.2):
        time.sleep(wait)
        for service in (one, other):
            assert_gone(service, image_id)


def test_parallel_posts_of_a_failed_source_fetch_it_once(one: Service, other: Service, source: Source) -> None:
    """Of 32 POSTs at once, at two hosts, of a source whose image is in `error`, all get that image, and the source is
    asked once more."""
    url = source.serve("/failed", Resource(status=500))
    failed = one.wait_status(one.fetch(url)["id"], "error")
    resource = Resource(b"content", hold=True)
    source.serve("/failed", resource)
    images = post_at_once([one, other], url)
    assert {image["id"] for image in images} == {failed["id"]}
    source.wait_asked("/failed", count=2)
    resource.begin()
    for service in (one, other):
        assert service.wait_status(failed["id"], "complete")["size"] == 7
    assert len(source.asked("/failed")) == 2
    assert (failed["id"] in one.stored()) != (failed["id"] in other.stored())
    assert one.incoming() | other.incoming() == set()


def test_an_image_that_failed_here_is_fetched_again_there(one: Service, other: Service, source: Source) -> None:
    """A source that failed at one host may be fetched by another, which then has it."""
    url = source.serve("/again", Resource(status=500))
    image_id = one.fetch(url)["id"]
    one.wait_status(image_id, "error")
    source.serve("/again", b"content")
    assert other.fetch(url)["id"] == image_id
    other.wait_status(image_id, "complete")
    assert other.download(image_id).body == b"content"
    assert image_id not in one.stored()


@pytest.mark.parametrize("length", [4 * MIB, None])
def test_delete_at_another_host_stops_an_upload(one: Service, other: Service, length: int | None) -> None:
    """The uploader is told at once, and nothing of the image stays or comes back, on either host."""
    half = bytes(2 * MIB)
    with Connection(one.port) as connection:
        sent = half if length else b"%x\r\n%b\r\n" % (len(half), half)
        image_id = begin_upload(one, connection, length, sent)
        assert other.delete(image_id).json()["status"] == "downloading"
        assert connection.readable(STOPS), "the upload was not stopped"
        assert connection.answer().status == 409
    assert_gone_everywhere(one, other, image_id)


@pytest.mark.parametrize(
    "resource", [Resource(hold=True), Resource(bytes(MIB), stall_after=500_000), Resource(bytes(9 * MIB), rate=MIB)]
)
def test_delete_at_another_host_stops_a_fetch(one: Service, other: Service, source: Source, resource: Resource) -> None:
    """The source's connection ends, whether it is silent or streams, and nothing of the image stays or comes back."""
    image_id = one.fetch(source.serve("/guest", resource))["id"]
    exchange = source.wait_asked("/guest")
    if not resource.hold:
        other.wait_status(image_id, "downloading")
    assert other.delete(image_id).status == 200
    assert exchange.closed.wait(STOPS), "the source was still being read"
    assert_gone_everywhere(one, other, image_id)


def test_delete_at_another_host_takes_a_fetch_out_of_the_queue(new_host: StartService, source: Source) -> None:
    """What waits for its turn when it is deleted elsewhere is never fetched."""
    one, other = new_host(fetch_concurrency=1), new_host()
    first = Resource(b"first", hold=True)
    running = one.fetch(source.serve("/first", first))["id"]
    waiting = one.fetch(source.serve("/waiting", b"waiting"))["id"]
    assert other.delete(waiting).status == 200
    wait_for(lambda: one.incoming() == {running}, STOPS, "its claim is gone")
    first.begin()
    one.wait_status(running, "complete")
    assert source.asked("/waiting") == []
    assert_gone_everywhere(one, other, waiting)


def test_delete_at_another_host_and_the_last_byte_at_once(one: Service, other: Service) -> None:
    """However close they are: afterwards there is neither record nor bytes."""
    for n in range(10):
        with Connection(one.port) as connection:
            image_id = begin_upload(one, connection, 1000, bytes(999))
            connection.send(b"\n")
            time.sleep(n / 1000)
            assert other.delete(image_id).status == 200
            assert connection.answer().status in (200, 404, 409)
        wait_for(lambda image_id=image_id: image_id not in one.stored(), GOES, "its bytes are gone")  # type: ignore[misc]
        assert_gone(one, image_id)


@contextmanager
def frozen(service: Service, etcd: EtcdCluster) -> Iterator[None]:
    """Paused for longer than its lease, as a virtual machine may be."""
    service.freeze()
    end_lease(etcd, service)
    yield
    service.signal(signal.SIGCONT)


@contextmanager
def killed(service: Service, _: EtcdCluster) -> Iterator[None]:
    service.kill()
    yield
    service.start()


@contextmanager
def running(_: Service, __: EtcdCluster) -> Iterator[None]:
    yield


@pytest.mark.parametrize("state", [running, frozen, killed])
def test_delete_at_another_host_of_a_complete_image(
    new_host: StartService,
    etcd: EtcdCluster,
    state: Callable[[Service, EtcdCluster], AbstractContextManager[None]],
) -> None:
    """The bytes go within ten seconds from the host that holds them: also when that host could not hear of it, as
    soon as it can."""
    one, other = new_host(), new_host()
    image_id, kept = one.upload(b"deleted")["id"], one.upload(b"kept")["id"]
    with state(one, etcd):
        assert other.delete(image_id).status == 200
    wait_for(lambda: one.stored() == {kept}, GOES, "the bytes are gone")
    assert_gone(one, image_id)
    assert one.download(kept).body == b"kept"


def test_a_pause_for_longer_than_the_lease(new_host: StartService, etcd: EtcdCluster, source: Source) -> None:
    """What the paused host was transferring goes on and ends well, though another host was started meanwhile."""
    one = new_host()
    resource = Resource(b"content", stall_after=3)
    fetched = one.fetch(source.serve("/guest", resource))["id"]
    one.wait_status(fetched, "downloading")
    with Connection(one.port) as connection:
        uploaded = begin_upload(one, connection, 2 * MIB, bytes(MIB))
        with frozen(one, etcd):
            other = new_host()
        assert other.image(uploaded)["status"] == "downloading"
        connection.send(bytes(MIB))
        assert connection.answer().status == 200
    resource.resume()
    one.wait_status(fetched, "complete")
    assert one.stored() == {fetched, uploaded}
    assert len(source.asked("/guest")) == 1


@pytest.mark.parametrize("compacted", [False, True])
def test_delete_at_another_host_after_a_restart_of_etcd(
    own_etcd: EtcdCluster, start_service: StartService, compacted: bool
) -> None:
    """The same when etcd has been away in between, and has forgotten what was deleted, or not."""
    settings = on_etcd(own_etcd, "/test")
    one, other = start_service(**settings), start_service(**settings)
    images = [one.upload(b"image")["id"] for _ in range(2)]
    one.freeze()
    own_etcd.kill(0)  # and with it the connection by which the host would still hear
    own_etcd.start(0)
    own_etcd.wait_healthy()
    wait_for(lambda: other.delete(images[0]).status == 200, GOES, "the other host can delete again")
    if compacted:
        revision = own_etcd.call("/v3/kv/put", {"key": "AA=="})["header"]["revision"]
        own_etcd.call("/v3/kv/compaction", {"revision": revision, "physical": True})
    one.signal(signal.SIGCONT)
    wait_for(lambda: one.stored() == {images[1]}, GOES, "the bytes of what was deleted meanwhile are gone")
    assert other.delete(images[1]).status == 200
    wait_for(lambda: one.stored() == set(), GOES, "the bytes are gone")


def test_both_hosts_know_all_images(one: Service, other: Service) -> None:
    """What either has, both list, at once or a moment later, and tell about in the same way."""
    images = [service.upload(os.urandom(1000)) for service in (one, other)]
    for service in (one, other):
        for image in images:
            wait_for(lambda: image in service.images(), 1, "it is listed")  # noqa: B023 - called at once
            assert service.image(image["id"]) == image


def test_download_at_a_host_without_the_bytes(new_host: StartService) -> None:
    """While no host that has them is there it is 503, and says which one had them; then it comes from there, be it at
    another address, and is here from then on."""
    one, other = new_host(), new_host()
    image_id = one.upload(b"content")["id"]
    path = f"/images/{image_id}/download"
    assert other.request("HEAD", path).status == 200
    one.terminate()
    for method in ("GET", "HEAD"):
        assert other.request(method, path).status == 503
    assert one.url in other.get(path).message
    assert other.url not in other.get(path).message
    one.start()  # on another port
    wait_for(lambda: other.get(path).status == 200, GOES, "it is known to be back")
    wait_for(lambda: other.stored() == {image_id}, GOES, "it is kept")
    one.terminate()
    assert other.get(path).body == b"content"


def test_an_incomplete_image_of_another_host(one: Service, other: Service, source: Source) -> None:
    """It is 404, as at the host that is fetching it."""
    resource = Resource(bytes(1000), stall_after=500)
    image_id = one.fetch(source.serve("/slow", resource))["id"]
    other.wait_status(image_id, "downloading")
    assert (other.download(image_id).status, other.download(image_id).message) == (404, "incomplete image")
    resource.resume()
    one.wait_status(image_id, "complete")
