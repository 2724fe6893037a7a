"""The tus protocol at /uploads, request by request, when all goes well."""

from __future__ import annotations

import hashlib
import os
from functools import partial

from tests.harness import wait_for
from tests.service.helpers import assert_gone
from tests.service.tus.helpers import CONTENT, MIB, UNKNOWN, assert_expires, assert_whole
from tests.tus import BYTES, SPOKEN, Tus, checksum, id_of, metadata, path_of


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
