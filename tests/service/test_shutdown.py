"""How the service ends, and what it says of itself while it runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.client import Connection
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service, wait_for
from tests.service.conftest import Settings, StartService
from tests.source import Resource, Source

MIB = 1 << 20


def refuses_connections(service: Service) -> bool:
    try:
        with Connection(service.port) as connection:
            connection.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            return connection.answer().status == 503
    except (OSError, AssertionError):
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_service_ends_at_once(start_service: StartService, records: Settings, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end it within two seconds, with exit status 0, whoever keeps a connection open."""
    service = start_service(**records, shutdown_timeout=20)
    with Connection(service.port) as used, Connection(service.port):
        used.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert used.answer().status == 200
        began = time.monotonic()
        service.signal(number)
        assert service.wait_exit() == 0
    assert time.monotonic() - began < 2


def test_transfers_of_clients_may_end(start_service: StartService, records: Settings) -> None:
    """An upload and a download under way get shutdownTimeout to end, while nothing new is taken; the service ends as
    soon as they have."""
    service = start_service(**records, shutdown_timeout=20)
    content = os.urandom(16 * MIB)
    image = service.upload(content)
    with Connection(service.port, receive_buffer=4096) as download, Connection(service.port) as upload:
        download.send(f"GET /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\n\r\n")
        assert download.head()[0] == 200
        upload.begin_upload(2 * MIB)
        upload.send(bytes(MIB))
        wait_for(lambda: len(service.images()) == 2, 5, "the upload has its record")
        service.signal(signal.SIGTERM)
        wait_for(lambda: refuses_connections(service), 2, "new connections are refused")
        upload.send(bytes(MIB))
        answer = upload.answer()
        assert (answer.status, answer.json()["status"]) == (200, "complete")
        received = bytearray()
        while len(received) < len(content):
            piece = download.recv(MIB)
            assert piece, f"cut after {len(received)} bytes"
            received += piece
        assert received == content
        began = time.monotonic()
        assert service.wait_exit() == 0
        assert time.monotonic() - began < 3
    service.start()
    assert {image["status"] for image in service.images()} == {"complete"}


def test_a_client_that_takes_too_long(start_service: StartService, records: Settings) -> None:
    """After shutdownTimeout an upload is ended all the same, with 503; its image is in `error`, and says so."""
    service = start_service(**records, shutdown_timeout=1)
    with Connection(service.port) as upload:
        upload.begin_upload(2 * MIB)
        upload.send(bytes(MIB))
        wait_for(service.images, 5, "the upload has its record")
        began = time.monotonic()
        assert service.terminate() == 0
        assert 0.9 < time.monotonic() - began < 4
        assert upload.answer().status == 503
        assert upload.closed(1)
    service.start()
    (image,) = service.images()
    assert (image["status"], image["size"]) == ("error", 0)
    assert image["error"]
    assert (service.stored(), service.incoming()) == (set(), set())


def test_fetches_stop_at_once_and_start_again(start_service: StartService, records: Settings, source: Source) -> None:
    """A fetch does not hold up the end, whether it is silent or streams; the next start begins it anew."""
    service = start_service(**records, shutdown_timeout=20, fetch_concurrency=2)
    content = os.urandom(2 * MIB)
    silent = service.fetch(source.serve("/silent", Resource(content, stall_after=MIB)))
    streaming = service.fetch(source.serve("/streaming", Resource(content, rate=100_000)))
    waiting = service.fetch(source.serve("/waiting", content))
    for image in (silent, streaming):
        service.wait_status(image["id"], "downloading")
    began = time.monotonic()
    assert service.terminate() == 0
    assert time.monotonic() - began < 3
    for path in ("/silent", "/streaming"):
        assert source.asked(path)[0].closed.wait(1)
        source.serve(path, content)
    service.start()
    for image in (silent, streaming, waiting):
        service.wait_status(image["id"], "complete")
        assert service.download(image["id"]).body == content
    assert len(source.asked("/silent")) == 2
    assert service.incoming() == set()


def test_the_second_signal_ends_everything(start_service: StartService) -> None:
    """With an upload that would have 30 seconds more, a second SIGTERM ends the service at once."""
    service = start_service(shutdown_timeout=30)
    with Connection(service.port) as upload:
        upload.begin_upload(2 * MIB)
        upload.send(bytes(MIB))
        wait_for(service.images, 5, "the upload has its record")
        service.signal(signal.SIGTERM)
        wait_for(lambda: refuses_connections(service), 2, "the first signal has been seen")
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        service.wait_exit()
        assert time.monotonic() - began < 2
    service.start()
    (image,) = service.images()
    assert image["status"] == "error"


def test_a_signal_during_the_start(start_service: StartService) -> None:
    """SIGTERM at any moment of the start ends it, without a traceback once the service has said anything."""
    service = start_service()
    assert service.terminate() == 0
    service.start(wait=False)
    service.wait_listening()
    assert service.terminate() == 0


def test_it_lives_and_is_ready(start_service: StartService, records: Settings) -> None:
    """/healthz and /readyz are 200 while all is well."""
    service = start_service(**records)
    for path in ("/healthz", "/readyz"):
        assert service.get(path).status == 200


def test_not_ready_without_its_images(start_service: StartService) -> None:
    """When the image directory is taken away /readyz is 503 and names the image store; /healthz stays 200, and all is
    well again when the directory is back."""
    service = start_service()
    away = service.images_dir.with_name("away")
    service.images_dir.rename(away)
    answer = service.get("/readyz")
    assert answer.status == 503
    assert "image" in answer.message
    assert service.get("/healthz").status == 200
    away.rename(service.images_dir)
    assert service.get("/readyz").status == 200


def test_not_ready_without_its_records(start_service: StartService) -> None:
    """While the SQLite file cannot be written /readyz is 503 and names the metadata store; then all is well again."""
    service = start_service()
    with contextlib.closing(sqlite3.connect(service.data_dir / "imgsvc.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer = service.get("/readyz")
        assert answer.status == 503
        assert "metadata" in answer.message
        assert service.get("/healthz").status == 200
        other.execute("ROLLBACK")
    assert service.get("/readyz").status == 200
    assert service.put(b"content").status == 200


def test_not_ready_without_etcd(start_service: StartService, own_etcd: EtcdCluster) -> None:
    """With etcd gone each request that writes is 503 within ten seconds, those that read are answered from memory,
    /readyz names the metadata store, and everything works again by itself when etcd is back."""
    service = start_service(metadata_store_type="etcd", metadata_store_config_machines=own_etcd.endpoints)
    image = service.upload(b"content")
    own_etcd.kill(0)
    requests = [("GET", "/readyz"), ("PUT", "/images"), ("GET", "/images"), ("GET", f"/images/{image['id']}")]
    began = time.monotonic()
    with ThreadPoolExecutor(len(requests)) as pool:
        asked = [pool.submit(service.request, *request, None, {"X-Image-Type": "kvm"}) for request in requests]
        answers = [answer.result() for answer in asked]
    assert time.monotonic() - began < 10
    assert [(answer.status, answer.json()["code"]) for answer in answers[:2]] == [(503, 503)] * 2
    assert "metadata" in answers[0].message
    assert [answer.status for answer in answers[2:]] == [200, 200]
    assert (answers[2].json(), answers[3].json()) == ([image], image)
    assert service.get("/healthz").status == 200
    own_etcd.start(0)
    own_etcd.wait_healthy()
    wait_for(lambda: service.get("/readyz").status == 200, 10, "ready again")
    assert service.image(image["id"]) == image
    assert service.put(b"content").status == 200
    wait_for(lambda: service.incoming() == set(), 5, "nothing is left of the upload that was refused")
