"""What the tus protocol at /uploads refuses, request by request."""

from __future__ import annotations

import base64

import pytest

from tests.client import Connection
from tests.harness import wait_for
from tests.service.conftest import LIMIT
from tests.service.tus.helpers import CONTENT, MIB, UNKNOWN, assert_whole
from tests.tus import BYTES, SPOKEN, Tus, id_of, metadata


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
