"""The tus protocol at /uploads, request by request."""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import partial

import pytest

from tests.client import Answer, Connection
from tests.harness import Service, wait_for
from tests.service.conftest import LIMIT, StartService
from tests.service.helpers import assert_gone
from tests.tus import BYTES, SPOKEN, Tus, checksum, id_of, metadata, path_of

MIB = 1 << 20
CONTENT = os.urandom(3 * MIB + 17)
UNKNOWN = "/uploads/0b53a0a6-6c41-4f43-9d2c-6c0d2b2f9a11"


@pytest.fixture(scope="module")
def _own_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("tus")) as service:
        yield service


@pytest.fixture
def tus(_own_service: Service) -> Iterator[Tus]:
    """With a service that all tests here share."""
    yield Tus(_own_service)
    _own_service.check_log()


@pytest.fixture
def anywhere(service: Service) -> Tus:
    """The same, once with each metadata store."""
    return Tus(service)


@pytest.fixture
def guarded(guarded_service: Service) -> Tus:
    """With a service that drops who is silent, has a limit, and must have nothing left at the end."""
    return Tus(guarded_service)


def assert_whole(tus: Tus, path: str, content: bytes = CONTENT) -> None:
    """The upload is at its end, and the image is there."""
    image = tus.service.image(id_of(path))
    assert (image["status"], image["size"], image["expected_size"]) == ("complete", len(content), len(content))
    assert image["sha256"] == hashlib.sha256(content).hexdigest()
    assert tus.service.download(image["id"]).body == content
    assert tus.offset(path) == len(content)


class TestErrors:
    def test_the_version(self, tus: Tus) -> None:
        """Who speaks another one, or does not say, gets 412 with ours, and nothing is done; OPTIONS is for everybody."""
        before = len(tus.service.images())
        path = tus.create(1)
        for spoken in ({}, {"Tus-Resumable": "0.2.2"}):
            for method, target in (("POST", "/uploads"), ("HEAD", path), ("PATCH", path), ("DELETE", path)):
                sent = {**BYTES, "Upload-Length": "1", "Upload-Metadata": metadata(type="kvm"), "Upload-Offset": "0"}
                del sent["Tus-Resumable"]
                answer = tus.service.request(method, target, None, {**sent, **spoken})
                assert answer.status == 412, (method, answer)
                assert (answer.headers["Tus-Version"], answer.headers["Tus-Resumable"]) == ("1.0.0", "1.0.0")
            assert tus.service.request("OPTIONS", "/uploads", None, spoken).status == 204
        assert (tus.offset(path), len(tus.service.images())) == (0, before + 1)
        tus.terminate(path)

    @pytest.mark.parametrize(
        ("headers", "status", "said"),
        [
            ({"Upload-Length": ""}, 400, "Upload-Length"),
            ({"Upload-Length": "-1"}, 400, "Upload-Length"),
            ({"Upload-Length": "1.5"}, 400, "Upload-Length"),
            ({"Upload-Length": "9" * 30}, 400, "Upload-Length"),
            ({"Upload-Defer-Length": "1"}, 400, "Upload-Defer-Length"),
            ({"Upload-Concat": "partial"}, 400, "Upload-Concat"),
            ({"Upload-Metadata": ""}, 400, "type"),
            ({"Upload-Metadata": "type"}, 400, "type"),
            ({"Upload-Metadata": metadata(type="KVM")}, 400, "type"),
            ({"Upload-Metadata": "type a3Zt,type a3Zt"}, 400, "Upload-Metadata"),
            ({"Upload-Metadata": "type a3Z"}, 400, "Upload-Metadata"),
            ({"Upload-Metadata": "type a3Zt,"}, 400, "Upload-Metadata"),
            ({"Upload-Metadata": "type  a3Zt"}, 400, "Upload-Metadata"),
            ({"Upload-Metadata": metadata(type="kvm", sha256="abc")}, 400, "sha256"),
            ({"Upload-Length": str(1 << 58)}, 507, "space"),
        ],
    )
    def test_a_creation(self, tus: Tus, headers: dict[str, str], status: int, said: str) -> None:
        """What is wrong with it is said, and nothing is made."""
        before = tus.service.images()
        sent = {**SPOKEN, "Upload-Length": "5", "Upload-Metadata": metadata(type="kvm"), **headers}
        answer = tus.service.request("POST", "/uploads", None, sent)
        assert (answer.status, answer.json()["code"]) == (status, status)
        assert said in answer.message
        assert "Location" not in answer.headers
        assert tus.service.images() == before

    def test_a_creation_without_a_length(self, tus: Tus) -> None:
        answer = tus.service.request("POST", "/uploads", None, {**SPOKEN, "Upload-Metadata": metadata(type="kvm")})
        assert (answer.status, answer.message) == (400, "missing or invalid Upload-Length header")

    def test_too_large(self, guarded: Tus) -> None:
        """Tus-Max-Size says how much, and 413 that it is more."""
        options = guarded.service.request("OPTIONS", "/uploads")
        assert options.headers["Tus-Max-Size"] == str(LIMIT)
        assert guarded.post(LIMIT + 1).status == 413

    @pytest.mark.parametrize(
        ("headers", "status", "said"),
        [
            ({"Content-Type": "application/octet-stream"}, 415, "Content-Type"),
            ({"Upload-Offset": ""}, 400, "Upload-Offset"),
            ({"Upload-Offset": "-1"}, 400, "Upload-Offset"),
            ({"Upload-Offset": "two"}, 400, "Upload-Offset"),
            ({"Upload-Offset": "1"}, 409, "offset 2"),
            ({"Upload-Offset": "3"}, 409, "offset 2"),
            ({"Upload-Checksum": "crc32 AAAA"}, 400, "Upload-Checksum"),
            ({"Upload-Checksum": "sha1"}, 400, "Upload-Checksum"),
            ({"Upload-Checksum": "sha1 AAAA"}, 400, "Upload-Checksum"),
            ({"Upload-Checksum": f"sha1 {base64.b64encode(bytes(20)).decode()}"}, 460, "checksum"),
            ({"Upload-Checksum": f"sha256 {base64.b64encode(bytes(32)).decode()}"}, 460, "checksum"),
            ({"Upload-Offset": str(MIB)}, 413, "bytes"),
        ],
    )
    def test_a_patch(self, tus: Tus, headers: dict[str, str], status: int, said: str) -> None:
        """What is wrong with it is said, and the upload is as it was."""
        path = tus.create(MIB)
        tus.bring(path, 0, CONTENT[:2])
        answer = tus.patch(path, 2, CONTENT[2:5], headers)
        assert (answer.status, answer.json()["code"]) == (status, status), answer
        assert said in answer.message
        assert tus.offset(path) == 2
        tus.bring(path, 2, CONTENT[2:MIB])
        assert_whole(tus, path, CONTENT[:MIB])

    @pytest.mark.parametrize("path", [UNKNOWN, "/uploads/none", "/uploads/..%2f..%2fetc"])
    def test_no_such_upload(self, tus: Tus, path: str) -> None:
        assert (tus.head(path).status, tus.head(path).headers["Cache-Control"]) == (404, "no-store")
        assert "Upload-Offset" not in tus.head(path).headers
        assert tus.patch(path, 0, b"bytes").status == 404
        assert tus.terminate(path).status == 404

    def test_more_than_was_announced(self, tus: Tus) -> None:
        """With a length 413 ahead of the body, without one 400 as soon as it is too much; the upload goes on."""
        path = tus.create(5)
        assert tus.patch(path, 0, b"123456").status == 413
        assert tus.patch(path, 0, iter([b"123", b"456"])).status == 400
        assert tus.post(5, b"123456").status == 413
        at = tus.offset(path)
        tus.bring(path, at, b"12345"[at:])
        assert_whole(tus, path, b"12345")
        assert tus.patch(path, 5, b"6").status == 413

    def test_a_method_that_is_none(self, tus: Tus) -> None:
        for method, target, allowed in (
            ("GET", "/uploads", "POST, OPTIONS"),
            ("GET", UNKNOWN, "HEAD, PATCH, DELETE, OPTIONS"),
        ):
            answer = tus.service.request(method, target)
            assert (answer.status, answer.headers["Allow"]) == (405, allowed)
        overridden = tus.service.request("POST", UNKNOWN, b"", {**SPOKEN, "X-HTTP-Method-Override": "initialize"})
        assert overridden.status == 405

    def test_a_plain_upload_is_none(self, tus: Tus) -> None:
        """Nor is an image that is fetched."""
        with Connection(tus.service.port) as connection:
            connection.begin_upload(2, "X-Image-Comment: plain")
            connection.send(b"1")

            def plain() -> list[str]:
                return [image["id"] for image in tus.service.images() if image["comment"] == "plain"]

            wait_for(plain, 5, "the upload has its record")
            assert tus.head(f"/uploads/{plain()[0]}").status == 404
            tus.service.delete(plain()[0])
        fetch = tus.service.fetch("http://127.0.0.1:1/")
        assert tus.head(f"/uploads/{fetch['id']}").status == 404
        assert tus.terminate(f"/uploads/{fetch['id']}").status == 404

    def test_not_the_announced_digest(self, anywhere: Tus) -> None:
        """422 at the end, no bytes are kept, and the upload is gone."""
        path = anywhere.create(len(CONTENT), sha256="ab" * 32)
        anywhere.bring(path, 0, CONTENT[:MIB])
        answer = anywhere.patch(path, MIB, CONTENT[MIB:])
        assert answer.status == 422
        assert "ab" * 32 in answer.message
        image = anywhere.service.image(id_of(path))
        assert (image["status"], image["size"], image["error"]) == ("error", 0, answer.message)
        assert id_of(path) not in anywhere.service.stored() | anywhere.service.incoming()
        assert anywhere.head(path).status == 410
        assert anywhere.patch(path, MIB, CONTENT[MIB:]).message == image["error"]
        assert anywhere.terminate(path).status == 204
        assert anywhere.head(path).status == 404


def test_options(tus: Tus) -> None:
    """They say all that there is, to anyone and at any path."""
    for path in ("/uploads", "/uploads/", UNKNOWN):
        answer = tus.service.request("OPTIONS", path)
        assert answer.status == 204
        assert answer.headers["Tus-Version"] == answer.headers["Tus-Resumable"] == "1.0.0"
        extensions = "creation,creation-with-upload,termination,expiration,checksum"
        assert answer.headers["Tus-Extension"] == extensions
        assert answer.headers["Tus-Checksum-Algorithm"] == "sha1,sha256"
        assert "Tus-Max-Size" not in answer.headers


def test_an_upload_in_pieces(anywhere: Tus) -> None:
    """Each request says how far it is; the image's record grows with it, and is complete before the last answer."""
    given = f"{metadata(type='container', comment='Bücher', sha256=hashlib.sha256(CONTENT).hexdigest())},filename Zg==,empty"
    created = anywhere.post(len(CONTENT), Upload_Metadata=given)
    path = path_of(created)
    assert (created.status, created.body, created.headers["Tus-Resumable"]) == (201, b"", "1.0.0")
    assert_expires(created, 86400)
    image = anywhere.service.image(id_of(path))
    assert (image["status"], image["size"], image["expected_size"]) == ("downloading", 0, len(CONTENT))
    assert (image["type"], image["comment"]) == ("container", "Bücher")
    at = 0
    for size in (1, 0, 1000, MIB, 2):
        answer = anywhere.patch(path, at, CONTENT[at : at + size])
        at += size
        assert (answer.status, answer.headers["Upload-Offset"]) == (204, str(at))
        assert_expires(answer, 86400)
        head = anywhere.head(path)
        assert (head.status, head.headers["Upload-Offset"]) == (200, str(at))
        assert (head.headers["Upload-Length"], head.headers["Cache-Control"]) == (str(len(CONTENT)), "no-store")
        assert head.headers["Upload-Metadata"] == given
        if size in (1, MIB):
            wait_for(partial(recorded, anywhere, path, at), 3, "the record follows")
        assert anywhere.service.download(image["id"]).message == "incomplete image"
    last = anywhere.patch(path, at, CONTENT[at:])
    assert (last.status, last.headers["Upload-Offset"]) == (204, str(len(CONTENT)))
    assert "Upload-Expires" not in last.headers
    assert_whole(anywhere, path)
    assert anywhere.head(path).headers["Upload-Metadata"] == given.rpartition(",filename")[0]
    repeated = anywhere.patch(path, len(CONTENT))
    assert (repeated.status, repeated.headers["Upload-Offset"]) == (204, str(len(CONTENT)))
    assert anywhere.service.image_files() == []


def recorded(tus: Tus, path: str, size: int) -> bool:
    return bool(tus.service.image(id_of(path))["size"] == size)


def assert_expires(answer: Answer, seconds: float) -> None:
    left = parsedate_to_datetime(answer.headers["Upload-Expires"]).timestamp() - time.time()
    assert seconds - 5 < left <= seconds + 1


def test_creation_with_the_first_bytes(tus: Tus) -> None:
    """Or with all of them, by a client that waits for 100 (Continue) or does not."""
    created = tus.post(len(CONTENT), CONTENT[:MIB])
    assert (created.status, created.headers["Upload-Offset"]) == (201, str(MIB))
    assert_expires(created, 86400)
    tus.bring(path_of(created), MIB, CONTENT[MIB:])
    assert_whole(tus, path_of(created))
    whole = tus.post(len(CONTENT), CONTENT, Expect="100-continue", **checksum("sha1", CONTENT))
    assert (whole.status, whole.headers["Upload-Offset"]) == (201, str(len(CONTENT)))
    assert_whole(tus, path_of(whole))


def test_creation_with_bytes_that_are_refused(tus: Tus) -> None:
    """The wrong type of body is 415 before anything is made; after it, the answer says where the upload is."""
    before = tus.service.images()
    assert tus.post(5, b"12345", Content_Type="text/plain").status == 415
    assert tus.service.images() == before
    wrong = tus.post(5, b"12345", **checksum("sha256", b"others"))
    assert wrong.status == 460
    assert tus.offset(path_of(wrong)) == 0
    tus.bring(path_of(wrong), 0, b"12345")
    assert_whole(tus, path_of(wrong), b"12345")


def test_an_upload_without_bytes(tus: Tus) -> None:
    """It is complete as soon as it is made."""
    created = tus.post(0)
    assert (created.status, created.headers["Upload-Offset"]) == (201, "0")
    assert_whole(tus, path_of(created), b"")


def test_the_location_at_a_trailing_slash(tus: Tus) -> None:
    """It is relative to the request's own URL."""
    headers = {**SPOKEN, "Upload-Length": "1", "Upload-Metadata": metadata(type="kvm")}
    location = tus.service.request("POST", "/uploads/", None, headers).headers["Location"]
    assert tus.offset(f"/uploads/{location}") == 0
    tus.terminate(f"/uploads/{location}")


def test_methods_by_another_name(tus: Tus) -> None:
    """A client that has only POST says what it means in a header."""
    path = tus.create(5)
    patch = {**BYTES, "Upload-Offset": "0", "X-HTTP-Method-Override": "PATCH"}
    assert tus.service.request("POST", path, b"123", patch).headers["Upload-Offset"] == "3"
    assert tus.service.request("POST", path, b"123", patch).status == 409
    head = tus.service.request("POST", path, b"", {**SPOKEN, "X-HTTP-Method-Override": "HEAD"})
    assert (head.status, head.headers["Upload-Offset"]) == (200, "3")
    delete = {**SPOKEN, "X-HTTP-Method-Override": "DELETE"}
    assert tus.service.request("POST", path, b"", delete).status == 204
    assert_gone(tus.service, id_of(path))


def test_checksums(tus: Tus) -> None:
    """Bytes that have theirs are taken; those that have not are dropped, and the right ones may follow."""
    path = tus.create(len(CONTENT))
    tus.bring(path, 0, CONTENT[:MIB], checksum("sha256", CONTENT[:MIB]))
    for algorithm in ("sha1", "sha256"):
        answer = tus.patch(path, MIB, os.urandom(2 * MIB), checksum(algorithm, CONTENT[MIB : 3 * MIB]))
        assert (answer.status, answer.json()["code"]) == (460, 460)
        assert tus.offset(path) == MIB
        assert (tus.service.images_dir / ".incoming" / id_of(path)).stat().st_size == MIB
    tus.bring(path, MIB, CONTENT[MIB : 3 * MIB], checksum("sha1", CONTENT[MIB : 3 * MIB]))
    assert tus.patch(path, 3 * MIB, bytes(17), checksum("sha256", CONTENT[3 * MIB :])).status == 460
    tus.bring(path, 3 * MIB, CONTENT[3 * MIB :], checksum("sha256", CONTENT[3 * MIB :]))
    assert_whole(tus, path)


@pytest.mark.parametrize("leave", [Connection.close, Connection.reset, Connection.finish])
def test_a_client_that_leaves(tus: Tus, leave: Callable[[Connection], None]) -> None:
    """What came is kept, to the byte; what was to be checked is not."""
    path = tus.create(len(CONTENT))
    for sent, headers in ((MIB + 5, ()), (MIB + 9, ("Upload-Checksum: sha1 " + "A" * 27 + "=",))):
        with Connection(tus.service.port) as connection:
            tus.begin(connection, path, tus.offset(path), 2 * MIB, *headers)
            at = tus.offset(path)
            connection.send(CONTENT[at : at + sent])
            time.sleep(0.1)
            leave(connection)
            wait_for(lambda: tus.service.image_files() == [], 5, "the file is closed")
        assert tus.offset(path) == (MIB + 5)
    tus.bring(path, MIB + 5, CONTENT[MIB + 5 :])
    assert_whole(tus, path)


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
    assert statuses.count(204) >= 4
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
    service = start_service(uploads_expire=2)
    tus = Tus(service)
    kept, abandoned = tus.create(6), tus.create(6)
    for path in (kept, abandoned):
        tus.bring(path, 0, b"1")
    assert_expires(tus.head(kept), 2)
    for at in range(1, 4):
        time.sleep(0.8)
        tus.bring(kept, at, b"1")
        if at == 1:
            service.kill()
            service.start()
            assert tus.offset(abandoned) == 1
            assert tus.offset(kept) == 2
    wait_for(lambda: tus.head(abandoned).status == 410, 1, "the upload is given up")
    image = service.image(id_of(abandoned))
    assert (image["status"], image["size"]) == ("error", 0)
    assert image["error"] == "the upload was abandoned: no byte came for 2 seconds"
    assert service.incoming() == {id_of(kept), f"{id_of(kept)}.notes"}
    assert tus.patch(abandoned, 1, b"1").message == image["error"]
    tus.bring(kept, 4, b"11")
    assert_whole(tus, kept, b"111111")
