"""The eight faults of the Go program, each seen live, none of which may come back. Disk full: test_disk_full.py."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imgsvc.metadata.image import Image, ImageType
from imgsvc.metadata.sqlite import SqliteMetadataStore, insert_record
from imgsvc.metadata.store import Member
from tests.client import Connection
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service, wait_for
from tests.service.conftest import Settings, StartService
from tests.source import Resource, Source

MIB = 1 << 20


def begin_upload(service: Service, connection: Connection, length: int | None, sent: bytes) -> str:
    """Begins an upload on the connection, sends some of it, and returns the id once it has its record.

    It is a container, for the hundreds of other images here are not, and the list is asked for again and again.
    """
    mark = str(uuid.uuid4())
    connection.begin_upload(length, f"X-Image-Comment: {mark}", image_type="container")
    connection.send(sent)

    def found() -> list[str]:
        return [image["id"] for image in service.images("?type=container") if image["comment"] == mark]

    wait_for(found, 5, "the upload has its record")
    return found()[0]


def assert_gone(service: Service, image_id: str) -> None:
    """No record, no bytes."""
    for answer in (service.get(f"/images/{image_id}"), service.download(image_id), service.delete(image_id)):
        assert (answer.status, answer.message) == (404, "image not found")
    assert image_id not in {image["id"] for image in service.images()}
    assert image_id not in service.stored()
    wait_for(lambda: image_id not in service.incoming(), 2, "nothing of it in .incoming")


# 1. A PUT answered 200 `complete` while the stored record stayed `downloading`.


def test_a_finished_upload_is_complete_for_everybody(service: Service) -> None:
    """Of 300 small uploads, 16 at a time, each that was answered reads as complete at once, and stays so."""

    def upload(n: int) -> dict[str, Any]:
        image = service.upload(b"small\n" * (n + 1))
        assert service.image(image["id"]) == image
        return image

    with ThreadPoolExecutor(16) as pool:
        images = list(pool.map(upload, range(300)))
    time.sleep(1.2)  # one interval of progress reports
    stored = {image["id"]: image for image in service.images()}
    for image in images:
        assert image["status"] == "complete"
        assert stored[image["id"]] == image


# 2. DELETE during a download: the transfer went on, and re-created the record with no bytes behind it.


@pytest.mark.parametrize("chunked", [True, False])
def test_delete_stops_an_upload(service: Service, chunked: bool) -> None:
    """DELETE in mid-upload is 200 with the image as it was; the upload ends within two seconds with an error, and
    the image is 404 for ever, its bytes gone."""
    half = bytes(2 * MIB)
    with Connection(service.port) as connection:
        sent = b"%x\r\n%b\r\n" % (len(half), half) if chunked else half
        image_id = begin_upload(service, connection, None if chunked else 4 * MIB, sent)
        answer = service.delete(image_id)
        assert (answer.status, answer.json()["status"]) == (200, "downloading")
        assert connection.readable(2), "the upload was not stopped"
        assert connection.answer().status >= 400
    assert_gone(service, image_id)
    time.sleep(1.2)
    assert_gone(service, image_id)
    assert service.image_files() == []


@pytest.mark.parametrize("resource", [Resource(hold=True), Resource(bytes(MIB), stall_after=500_000)])
def test_delete_stops_a_fetch(service: Service, source: Source, resource: Resource) -> None:
    """DELETE of an image being fetched closes the connection to its source within two seconds, answer or not."""
    image = service.fetch(source.serve("/guest", resource))
    exchange = source.wait_asked("/guest")
    if not resource.hold:
        service.wait_status(image["id"], "downloading")
    assert service.delete(image["id"]).status == 200
    assert exchange.closed.wait(2), "the source was still being read"
    assert_gone(service, image["id"])
    time.sleep(1.2)
    assert_gone(service, image["id"])
    assert service.image_files() == []


def test_delete_stops_a_fast_fetch(service: Service, source: Source) -> None:
    """The same while bytes stream in."""
    image = service.fetch(source.serve("/guest", Resource(bytes(40 * MIB), rate=4 * MIB)))
    service.wait_status(image["id"], "downloading")
    exchange = source.wait_asked("/guest")
    assert service.delete(image["id"]).status == 200
    assert exchange.closed.wait(2)
    assert exchange.sent < 40 * MIB
    assert_gone(service, image["id"])


def test_a_deleted_image_that_waits_is_never_fetched(start_service: StartService, source: Source) -> None:
    """DELETE of a pending image takes it out of the queue."""
    service = start_service(fetch_concurrency=1)
    first = Resource(b"first", hold=True)
    running = service.fetch(source.serve("/first", first))
    waiting = service.fetch(source.serve("/waiting", b"waiting"))
    last = service.fetch(source.serve("/last", b"last"))
    assert service.delete(waiting["id"]).status == 200
    first.begin()
    for image in (running, last):
        service.wait_status(image["id"], "complete")
    assert source.asked("/waiting") == []
    assert_gone(service, waiting["id"])


def test_delete_and_the_last_byte_at_once(service: Service) -> None:
    """However close DELETE and the end of an upload are: afterwards there is neither record nor bytes."""
    for n in range(20):
        with Connection(service.port) as connection:
            image_id = begin_upload(service, connection, 1000, bytes(999))
            deletion = threading.Thread(target=service.delete, args=(image_id,))
            if n % 2:
                deletion.start()
                connection.send(b"\n")
            else:
                connection.send(b"\n")
                deletion.start()
            assert connection.answer().status in (200, 404, 409)
            deletion.join()
        assert_gone(service, image_id)


def test_deleted_stays_deleted_after_a_restart(start_service: StartService, records: Settings, source: Source) -> None:
    """What was deleted in mid-transfer is not found again by the next start."""
    service = start_service(**records)
    fetched = service.fetch(source.serve("/guest", Resource(bytes(MIB), stall_after=500_000)))["id"]
    service.wait_status(fetched, "downloading")
    with Connection(service.port) as connection:
        uploaded = begin_upload(service, connection, MIB, bytes(500_000))
        service.delete(fetched)
        service.delete(uploaded)
        service.kill()
    service.start()
    for image_id in (fetched, uploaded):
        assert_gone(service, image_id)


# 3. Killed or restarted in mid-transfer: `downloading` for ever, and a new POST returned the stuck image.


def test_a_kill_in_mid_transfer(start_service: StartService, records: Settings, source: Source) -> None:
    """After SIGKILL and a new start an interrupted upload is in `error` with the reason, interrupted and waiting
    fetches are begun again and end, and what was complete still is."""
    service = start_service(**records, fetch_concurrency=1)
    content = os.urandom(3 * MIB)
    complete = service.upload(content)
    resource = Resource(content, stall_after=2 * MIB)
    running = service.fetch(source.serve("/running", resource))
    waiting = service.fetch(source.serve("/waiting", content))
    service.wait_status(running["id"], "downloading")
    with Connection(service.port) as connection:
        uploading = begin_upload(service, connection, 3 * MIB, content[: 2 * MIB])
        service.kill()
    source.serve("/running", content)
    service.start()

    failed = service.wait_status(uploading, "error", "complete")
    assert (failed["status"], failed["size"], failed["sha256"]) == ("error", 0, "")
    assert failed["error"]
    assert service.download(uploading).message == "incomplete image"
    for image in (running, waiting):
        service.wait_status(image["id"], "complete")
        assert service.download(image["id"]).body == content
        assert service.fetch(image["source"])["id"] == image["id"]
    assert len(source.asked("/waiting")) == 1
    assert service.image(complete["id"]) == complete
    assert service.stored() == {complete["id"], running["id"], waiting["id"]}
    assert service.incoming() == set()


# 4. A failed upload left its partial file; an open descriptor per upload was leaked, so deleted images kept their space.


@pytest.mark.parametrize("end", [Connection.close, Connection.reset])
def test_a_failed_upload_leaves_nothing(service: Service, end: Callable[[Connection], None]) -> None:
    """Twenty uploads whose client goes away leave a record in `error` each, and no file, descriptor or socket."""
    service.upload(bytes(MIB))
    before = service.census()
    failed = []
    for n in range(20):
        connection = Connection(service.port)
        failed.append(begin_upload(service, connection, 4 * MIB, bytes(n * 100_000)))
        end(connection)
    for image_id in failed:
        image = service.wait_status(image_id, "error")
        assert image["error"]
        assert image["size"] == 0
    wait_for(lambda: service.incoming() == set(), 5, ".incoming is empty")
    wait_for(lambda: service.census().sockets <= before.sockets, 5, "no socket is left")
    assert service.image_files() == []
    assert len(service.census().files) <= len(before.files)
    assert not set(failed) & service.stored()


def test_a_failed_fetch_leaves_nothing(service: Service, source: Source) -> None:
    """The same for fetches."""
    service.wait_status(service.fetch(source.serve("/good", bytes(MIB)))["id"], "complete")
    before = service.census()
    for n in range(12):
        url = source.serve(f"/{n}", Resource(bytes(MIB), cut_after=n * 70_000, chunked=n % 2 == 0))
        service.wait_status(service.fetch(url)["id"], "error")
    wait_for(lambda: service.incoming() == set(), 5, ".incoming is empty")
    wait_for(lambda: service.census().sockets <= before.sockets, 5, "no socket is left")
    assert service.image_files() == []


def test_a_good_upload_leaves_no_descriptor(service: Service) -> None:
    """Fifty uploads, downloads and deletions leave the process as it was."""

    def once(_: int) -> None:
        image = service.upload(bytes(100_000))
        assert len(service.download(image["id"]).body) == 100_000
        assert service.delete(image["id"]).status == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(once, range(20)))  # whatever is opened once and kept
    wait_for(lambda: service.image_files() == [], 5, "no image is open")
    before = service.census()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(once, range(50)))
    wait_for(lambda: service.image_files() == [], 5, "no image is open")
    wait_for(lambda: service.census().sockets <= before.sockets, 5, "no socket is left")
    assert len(service.census().files) <= len(before.files)
    assert service.census().threads <= before.threads + 8


def test_a_deleted_image_gives_its_space_back(service: Service) -> None:
    """A download under way when its image is deleted still gets all of it; then the file is let go."""
    content = os.urandom(16 * MIB)
    image = service.upload(content)
    with Connection(service.port, receive_buffer=4096) as connection:
        connection.send(f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.head()[0] == 200
        assert service.delete(image["id"]).status == 200
        received = bytearray()
        while len(received) < len(content):
            received += connection.recv(MIB)
    assert received == content
    wait_for(lambda: service.image_files() == [], 5, "the deleted file is closed")


# 5. Parallel POSTs of one source made two images.


def post_at_once(services: list[Service], url: str) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(lambda n: services[n % len(services)].fetch(url), range(32)))


def test_parallel_posts_of_one_source_make_one_image(service: Service, source: Source) -> None:
    """Of 32 POSTs at once all get the same image, and the source is asked once."""
    resource = Resource(b"content", hold=True)
    images = post_at_once([service], source.serve("/guest", resource))
    resource.begin()
    assert len({image["id"] for image in images}) == 1
    service.wait_status(images[0]["id"], "complete")
    assert len(source.asked("/guest")) == 1
    assert service.incoming() == set()


def test_parallel_posts_at_two_services_make_one_image(
    start_service: StartService, etcd: EtcdCluster, etcd_prefix: str, source: Source
) -> None:
    """The same when the POSTs go to two hosts that share their records."""
    settings = {
        "metadata_store_type": "etcd",
        "metadata_store_config_machines": etcd.endpoints,
        "metadata_store_config_prefix": etcd_prefix,
    }
    services = [start_service(**settings), start_service(**settings)]
    resource = Resource(b"content", hold=True)
    images = post_at_once(services, source.serve("/guest", resource))
    resource.begin()
    assert len({image["id"] for image in images}) == 1
    for service in services:
        assert service.wait_status(images[0]["id"], "complete")["size"] == 7
    assert len(source.asked("/guest")) == 1
    assert sorted(len(service.stored()) for service in services) == [0, 1]


# 6. Disk full: test_disk_full.py.
# 7. A client that reset in the middle of a large list pinned a core for ever.


@pytest.fixture
def many_images(tmp_path: Path) -> Path:
    """A data directory with 20,000 records, none of which has bytes."""
    directory = tmp_path / "many"
    directory.mkdir()
    filename = directory / "imgsvc.db"
    with contextlib.closing(SqliteMetadataStore(filename, Member(str(uuid.uuid4()), "here", "http://127.0.0.1"))):
        pass  # it has made its tables
    with contextlib.closing(sqlite3.connect(filename)) as connection, connection:
        for n in range(20_000):
            image = Image(id=str(uuid.uuid4()), type=ImageType.KVM, comment=f"{n} " + "x" * 500, revision=1)
            insert_record(connection, image.started(5).failed("never meant"), claimed_source=None)
    return directory


def test_a_reset_in_a_large_list(start_service: StartService, many_images: Path) -> None:
    """Clients that reset, close or stop reading in the middle of 20,000 images leave a service that is idle, and
    answers."""
    service = start_service(many_images, idle_timeout=1)
    assert len(service.images()) == 20_000
    before = service.census()
    for end in [Connection.reset, Connection.close] * 5:
        connection = Connection(service.port, receive_buffer=4096)
        connection.send("GET /images HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.head()[0] == 200
        connection.recv(1000)
        end(connection)
    silent = Connection(service.port, receive_buffer=4096)
    silent.send("GET /images HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_for(lambda: service.census().sockets <= before.sockets, 10, "every connection is ended")
    silent.close()
    busy = service.cpu_seconds()
    time.sleep(1)
    assert service.cpu_seconds() - busy < 0.2
    assert service.get("/healthz").status == 200
    assert len(service.images("?type=container")) == 0


def test_a_large_list_that_nobody_reads_is_over(start_service: StartService, many_images: Path) -> None:
    """It is cut, has its line in the log, and the end of the service does not wait for it."""
    service = start_service(many_images, idle_timeout=1, shutdown_timeout=20)
    with Connection(service.port, receive_buffer=4096) as silent:
        silent.send("GET /images HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: service.events("request", path="/images"), 10, "the request is over")
    (line,) = service.events("request", path="/images")
    assert line["status"] == 599
    began = time.monotonic()
    assert service.terminate() == 0
    assert time.monotonic() - began < 5


def test_a_large_list_in_http_1_0(start_service: StartService, many_images: Path) -> None:
    """It has no length and no chunks, so the connection ends with it, whatever the client asked for."""
    service = start_service(many_images)
    with Connection(service.port) as connection:
        connection.send("GET /images HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        _, body = connection.read_to_the_end().split(b"\r\n\r\n", 1)
    assert len(json.loads(body)) == 20_000


def test_the_head_of_a_large_list(start_service: StartService, many_images: Path) -> None:
    """HEAD of 20,000 images costs no more than a page of them, and the connection goes on."""
    service = start_service(many_images, scrub_interval=0)  # its first pass looks at all records, too
    busy = service.cpu_seconds()
    with Connection(service.port) as connection:
        connection.send("HEAD /images HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.answer("HEAD").status == 200
        assert connection.answer().json() == {"status": "ok"}
    time.sleep(0.5)
    assert service.cpu_seconds() - busy < 0.2


def test_a_large_list_does_not_block_the_others(start_service: StartService, many_images: Path) -> None:
    """While 20,000 images are listed again and again, another request waits for a fraction of a second, and memory
    stays bounded."""
    service = start_service(many_images)
    service.images()
    with ThreadPoolExecutor(2) as pool:
        lists = [pool.submit(service.get, "/images") for _ in range(4)]
        slowest = 0.0
        while not all(one.done() for one in lists):
            began = time.monotonic()
            assert service.get("/healthz").status == 200
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.01)
    assert slowest < 0.5
    assert service.memory("VmHWM") < 200 * MIB


# 8. `size` jumped only every 5 s, and the first value was often 0.


class Progress:
    """Looks at an image's size again and again, from when its transfer begins."""

    def __init__(self, service: Service, image_id: str) -> None:
        self.changes: list[tuple[float, int]] = []
        self._service = service
        self._image_id = image_id
        self._began = time.monotonic()

    def look(self) -> None:
        image = self._service.image(self._image_id)
        if image["status"] == "downloading" and (not self.changes or image["size"] != self.changes[-1][1]):
            self.changes.append((time.monotonic() - self._began, image["size"]))

    def check(self, seconds: float) -> None:
        """The first value above zero came within a second, the others at most a second apart (and what a busy
        machine adds), and not many more than that."""
        times = [moment for moment, size in self.changes if size > 0]
        assert times[0] < 1.3, self.changes
        gaps = [later - earlier for earlier, later in zip(times, [*times[1:], seconds], strict=True)]
        assert max(gaps) < 1.5, self.changes
        assert len(times) <= seconds + 2, self.changes
        sizes = [size for _, size in self.changes]
        assert sizes == sorted(sizes)


def test_size_grows_steadily(service: Service, source: Source) -> None:
    """During a slow upload and a slow fetch `size` is above zero within a second, and then moves every second."""
    image = service.fetch(source.serve("/guest", Resource(bytes(700_000), rate=100_000)))
    source.wait_asked("/guest")
    fetch = Progress(service, image["id"])
    with Connection(service.port) as connection:
        upload = Progress(service, begin_upload(service, connection, 700_000, b"x"))
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < 4.5:
            connection.send(bytes(5_000))
            fetch.look()
            upload.look()
            time.sleep(0.05)
        fetch.check(elapsed)
        upload.check(elapsed)
