"""A client of the tus protocol that does one step at a time, and says each as a test likes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from urllib.parse import urljoin

from tests.client import Answer, Body, Connection
from tests.harness import Service, wait_for

SPOKEN = {"Tus-Resumable": "1.0.0"}
BYTES = {**SPOKEN, "Content-Type": "application/offset+octet-stream"}


def metadata(**values: str | bytes) -> str:
    """Upload-Metadata with these keys."""
    pairs = ((key, value.encode() if isinstance(value, str) else value) for key, value in values.items())
    return ",".join(f"{key} {base64.b64encode(value).decode()}" for key, value in pairs)


def checksum(algorithm: str, content: bytes) -> dict[str, str]:
    """The header that says this of a request with this content."""
    digest = hashlib.new(algorithm, content).digest()
    return {"Upload-Checksum": f"{algorithm} {base64.b64encode(digest).decode()}"}


class Tus:
    """A client of `service`, whose uploads are named by their path."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def post(self, length: int | str, body: Body | None = None, **headers: str) -> Answer:
        """A creation, of a kvm image unless `Upload_Metadata` says otherwise."""
        sent = {"Upload-Length": str(length), "Upload-Metadata": metadata(type="kvm"), **_named(headers)}
        return self.service.request("POST", "/uploads", body, {**(SPOKEN if body is None else BYTES), **sent})

    def create(self, length: int, **values: str) -> str:
        """The path of a new upload; the values are its metadata beside the type."""
        answer = self.post(length, Upload_Metadata=metadata(**{"type": "kvm", **values}))
        assert answer.status == 201, answer
        return path_of(answer)

    def head(self, path: str) -> Answer:
        return self.service.request("HEAD", path, None, SPOKEN)

    def offset(self, path: str) -> int:
        """As soon as the service says one."""
        answers: list[Answer] = []

        def said() -> bool:
            answers.append(self.head(path))
            assert answers[-1].status in (200, 503), answers[-1]
            return answers[-1].status == 200

        wait_for(said, 10, "the service says the offset")
        return int(answers[-1].headers["Upload-Offset"])

    def patch(self, path: str, offset: int | str, body: Body = b"", headers: Mapping[str, str] | None = None) -> Answer:
        return self.service.request("PATCH", path, body, {**BYTES, "Upload-Offset": str(offset), **(headers or {})})

    def bring(self, path: str, offset: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A PATCH that must succeed with all its bytes."""
        answer = self.patch(path, offset, body, headers)
        assert answer.status == 204, answer
        assert int(answer.headers["Upload-Offset"]) == offset + len(body)

    def terminate(self, path: str) -> Answer:
        return self.service.request("DELETE", path, None, SPOKEN)

    def begin(self, connection: Connection, path: str, offset: int, length: int | None, *headers: str) -> None:
        """The head of a PATCH on a connection of the test's own; in chunks when it has no length."""
        said = [f"{name}: {value}" for name, value in BYTES.items()]
        size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        lines = [f"PATCH {path} HTTP/1.1", "Host: test", f"Upload-Offset: {offset}", size]
        connection.send("\r\n".join([*lines, *said, *headers, "", ""]))


def path_of(created: Answer) -> str:
    """Of the upload that was made by a POST to /uploads."""
    return str(urljoin("/uploads", created.headers["Location"]))


def id_of(path: str) -> str:
    return path.rsplit("/", 1)[1]


def _named(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}
