"""Fault 2 of the Go program: a transfer went on after DELETE, and made the record again with no bytes behind it."""

from __future__ import annotations

import threading
import time

import pytest

from tests.client import Connection
from tests.harness import Service
from tests.service.conftest import Settings, StartService
from tests.service.helpers import assert_gone, begin_upload
from tests.source import Resource, Source

MIB = 1 << 20


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
