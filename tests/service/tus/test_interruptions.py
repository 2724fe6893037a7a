"""Uploads whose client leaves, is silent, comes twice, deletes, or never comes back."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.client import Connection
from tests.harness import wait_for
from tests.service.conftest import LIMIT, StartService
from tests.service.helpers import assert_gone
from tests.service.tus.helpers import CONTENT, MIB, assert_expires, assert_whole
from tests.tus import Tus, id_of, path_of


@pytest.mark.parametrize("leave", [Connection.close, Connection.reset, Connection.finish])
def test_a_client_that_leaves(tus: Tus, leave: Callable[[Connection], None]) -> None:
    """What came is kept, to the byte; what was to be checked is not."""
    path = tus.create(len(CONTENT))
    for sent, headers in ((MIB + 5, ()), (MIB + 9, ("Upload-Checksum: sha1 " + "A" * 27 + "=",))):
        with Connection(tus.service.port) as connection:
            tus.begin(connection, path, tus.offset(path), 2 * MIB, *headers)
            at = tus.offset(path)
            connection.send(CONTENT[at : at + sent])
            if headers:
                time.sleep(0.1)  # until some of it is there, which no offset says
            else:
                wait_for(lambda: tus.offset(path) == MIB + 5, 10, "the bytes are there")
            leave(connection)
            wait_for(lambda: tus.service.image_files() == [], 5, "the file is closed")
        assert tus.offset(path) == (MIB + 5)
    tus.bring(path, MIB + 5, CONTENT[MIB + 5 :])
    assert_whole(tus, path)


class TestAllBytes:
    """All of them have come, and the chunk that ends the body has not: the client is told that all are there, takes
    that for success, and never comes again."""

    @pytest.mark.parametrize("wanted", ["", "wrong"])
    def test_the_connection_breaks(self, anywhere: Tus, wanted: str) -> None:
        """The image is complete, or in error when it has not the announced digest, although nobody asks."""
        path = anywhere.create(len(CONTENT), **({"sha256": "ab" * 32} if wanted else {}))
        with Connection(anywhere.service.port) as connection:
            send_all_but_the_end(anywhere, connection, path)
            connection.reset()
        image = anywhere.service.wait_status(id_of(path), "complete", "error")
        if wanted:
            assert (image["status"], anywhere.head(path).status) == ("error", 410)
            assert "ab" * 32 in image["error"]
        else:
            assert_whole(anywhere, path)

    def test_its_client_asks_at_once(self, anywhere: Tus) -> None:
        """It is not told so before it is so: 503 while the request that brought the bytes goes on."""
        path = anywhere.create(len(CONTENT))
        with Connection(anywhere.service.port) as connection:
            send_all_but_the_end(anywhere, connection, path)
            time.sleep(1)  # the service looks after its uploads twice
            assert anywhere.head(path).status == 503
            connection.reset()
        assert anywhere.offset(path) == len(CONTENT)
        assert_whole(anywhere, path)

    @pytest.mark.parametrize("end", ["kill", "terminate"])
    def test_the_service_ends(self, start_service: StartService, end: str) -> None:
        """The next start completes it, although it would have expired meanwhile."""
        tus = Tus(start_service(uploads_expire=1, shutdown_timeout=1))
        path = tus.create(len(CONTENT))
        with Connection(tus.service.port) as connection:
            send_all_but_the_end(tus, connection, path)
            getattr(tus.service, end)()
        time.sleep(1.1)
        tus.service.start()
        tus.service.wait_status(id_of(path), "complete", "error")
        assert_whole(tus, path)


def send_all_but_the_end(tus: Tus, connection: Connection, path: str) -> None:
    """Returns when they are noted."""

    def noted() -> bool:
        answer = tus.head(path)
        return answer.status == 503 or answer.headers["Upload-Offset"] == str(len(CONTENT))

    tus.begin(connection, path, 0, None)
    connection.send(f"{len(CONTENT):x}\r\n".encode() + CONTENT + b"\r\n")
    wait_for(noted, 5, "the bytes are there")


def test_a_silent_client(guarded: Tus) -> None:
    """408 after idleTimeout, and what came is kept."""
    path = guarded.create(len(CONTENT))
    with Connection(guarded.service.port) as connection:
        guarded.begin(connection, path, 0, len(CONTENT))
        connection.send(CONTENT[:1000])
        answer = connection.answer()
        assert (answer.status, answer.headers["Tus-Resumable"]) == (408, "1.0.0")
        assert connection.closed(1)
    assert guarded.offset(path) == 1000
    guarded.bring(path, 1000, CONTENT[1000:])
    assert_whole(guarded, path)


def test_the_connection_is_dead_and_nobody_knows(tus: Tus) -> None:
    """Its client asks how far it is, and goes on by another connection; the first gets 423 if it lives."""
    path = tus.create(len(CONTENT))
    with Connection(tus.service.port) as dead:
        tus.begin(dead, path, 0, len(CONTENT))
        dead.send(CONTENT[:1000])
        wait_for(lambda: tus.offset(path) == 1000, 5, "the bytes are there")
        wrong = tus.patch(path, 999, b"wrong")
        assert (wrong.status, wrong.message) == (409, "the upload is at offset 1000")
        assert not dead.readable(0.1)
        tus.bring(path, 1000, CONTENT[1000:2000])
        answer = dead.answer()
        assert (answer.status, answer.json()["code"]) == (423, 423)
    tus.bring(path, 2000, CONTENT[2000:])
    assert_whole(tus, path)


def test_two_at_once(tus: Tus) -> None:
    """Of two that bring other bytes at the same time, the image has those of one, or of the other, at each offset."""
    size = 4 * MIB
    contents = [bytes([byte]) * size for byte in b"AB"]
    path = tus.create(size)

    def bring(content: bytes) -> list[int]:
        statuses: list[int] = []
        while (at := tus.offset(path)) < size:
            statuses.append(tus.patch(path, at, iter_slow(content[at : at + MIB])).status)
        return statuses

    with ThreadPoolExecutor(2) as pool:
        statuses = [status for each in pool.map(bring, contents) for status in each]
    assert set(statuses) <= {204, 409, 413, 423, 400, 503}, statuses
    assert 204 in statuses
    image = tus.service.image(id_of(path))
    body = tus.service.download(image["id"]).body
    assert (len(body), hashlib.sha256(body).hexdigest()) == (size, image["sha256"])
    assert set(body) <= set(b"AB")


def iter_slow(content: bytes) -> list[bytes]:
    return [content[start : start + 200_000] for start in range(0, len(content), 200_000)]


class TestDelete:
    @pytest.mark.parametrize("delete", ["/uploads", "/images"])
    def test_between_requests(self, anywhere: Tus, delete: str) -> None:
        """Record and bytes are gone."""
        path = anywhere.create(len(CONTENT))
        anywhere.bring(path, 0, CONTENT[:MIB])
        answer = anywhere.terminate(path) if delete == "/uploads" else anywhere.service.delete(id_of(path))
        assert answer.status in (200, 204)
        assert_gone(anywhere.service, id_of(path))
        assert anywhere.head(path).status == anywhere.patch(path, MIB, b"more").status == 404

    @pytest.mark.parametrize("delete", ["/uploads", "/images"])
    def test_during_a_request(self, anywhere: Tus, delete: str) -> None:
        """The request is answered with 409, and nothing is left."""
        path = anywhere.create(len(CONTENT))
        with Connection(anywhere.service.port) as connection:
            anywhere.begin(connection, path, 0, len(CONTENT))
            connection.send(CONTENT[:MIB])
            wait_for(lambda: anywhere.offset(path) == MIB, 5, "the bytes are there")
            answer = anywhere.terminate(path) if delete == "/uploads" else anywhere.service.delete(id_of(path))
            assert answer.status in (200, 204)
            assert connection.answer().status == 409
        assert_gone(anywhere.service, id_of(path))
        assert anywhere.head(path).status == 404

    def test_afterwards(self, anywhere: Tus) -> None:
        """It removes the image."""
        path = path_of(anywhere.post(5, b"12345"))
        assert anywhere.terminate(path).status == 204
        assert_gone(anywhere.service, id_of(path))


def test_nothing_is_kept_open(guarded: Tus) -> None:
    """Fifty uploads between two requests each hold no file, and no room for what may never come."""
    service = guarded.service
    paths = [guarded.create(LIMIT) for _ in range(50)]
    for path in paths:
        guarded.bring(path, 0, b"some")
    assert service.image_files() == []
    for path in paths:
        assert guarded.terminate(path).status == 204


def test_abandoned(start_service: StartService) -> None:
    """It is given up `uploads.expire` seconds after its last byte, whatever restarts meanwhile: its bytes go, and its
    record says so."""
    service = start_service(uploads_expire=6)
    tus = Tus(service)
    kept, abandoned = tus.create(6), tus.create(6)
    for path in (kept, abandoned):
        tus.bring(path, 0, b"1")
    assert_expires(tus.head(kept), 6)
    for at in range(1, 4):
        time.sleep(2.2)
        tus.bring(kept, at, b"1")
        if at == 1:
            service.kill()
            service.start()
            assert tus.offset(abandoned) == 1
            assert_expires(tus.head(abandoned), 6 - 2.2)  # counted on from before the restart
            assert tus.offset(kept) == 2
    wait_for(lambda: tus.head(abandoned).status == 410, 4, "the upload is given up")
    image = service.image(id_of(abandoned))
    assert (image["status"], image["size"]) == ("error", 0)
    assert image["error"] == "the upload was abandoned: no byte came for 6 seconds"
    assert service.incoming() == {id_of(kept), f"{id_of(kept)}.notes"}
    assert tus.patch(abandoned, 1, b"1").message == image["error"]
    tus.bring(kept, 4, b"11")
    assert_whole(tus, kept, b"111111")
