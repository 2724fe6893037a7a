"""Two clients for tests: one that speaks HTTP properly, and one that sends whatever bytes a test likes."""

from __future__ import annotations

import http.client
import json
import select
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from email.message import Message
from io import BufferedReader
from typing import Any, BinaryIO, Self, cast

from tests.namespaces import HERE, Place

_TIMEOUT = 30.0

Body = bytes | BinaryIO | Iterable[bytes]
Headers = Mapping[str, str | bytes]


@dataclass(frozen=True)
class Answer:
    """One final answer, read to its end."""

    status: int
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The sentence of an error."""
        return str(self.json()["message"])


class _Connection(http.client.HTTPConnection):
    """From a place."""

    def __init__(self, place: Place, address: str, port: int, timeout: float) -> None:
        super().__init__(address, port, timeout=timeout)
        self._place = place

    def connect(self) -> None:
        with self._place.entered():
            super().connect()


class Client:
    """Asks the service at a port of an address; each request has its own connection, made in the place `seen_from`.
    `timeout` is how many seconds it waits for the service to take or to send anything."""

    def __init__(self, port: int, address: str = "127.0.0.1", seen_from: Place = HERE) -> None:
        self.port = port
        self.address = address
        self.seen_from = seen_from
        self.timeout = _TIMEOUT

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    def request(self, method: str, path: str, body: Body | None = None, headers: Headers | None = None) -> Answer:
        """A body that is an iterable is sent chunked unless the headers have its length, any other with its length."""
        pieces = body is not None and not isinstance(body, bytes) and not hasattr(body, "read")
        chunked = pieces and "Content-Length" not in (headers or {})
        with closing(_Connection(self.seen_from, self.address, self.port, self.timeout)) as connection:
            sent = dict(headers or {})
            if chunked:
                sent["Transfer-Encoding"] = "chunked"
            # The header values may be bytes, which http.client takes and its type stubs do not know.
            connection.request(method, path, body, cast("dict[str, str]", sent), encode_chunked=chunked)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def put(self, body: Body, image_type: str = "kvm", comment: str | bytes | None = None) -> Answer:
        headers: dict[str, str | bytes] = {"X-Image-Type": image_type}
        if comment is not None:
            headers["X-Image-Comment"] = comment
        return self.request("PUT", "/images", body, headers)

    def post(self, document: object) -> Answer:
        """The document as JSON, or bytes as they are."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        return self.request("POST", "/images", body, {"Content-Type": "application/json"})

    def delete(self, image_id: str) -> Answer:
        return self.request("DELETE", f"/images/{image_id}")

    def download(self, image_id: str) -> Answer:
        return self.get(f"/images/{image_id}/download")

    def image(self, image_id: str) -> dict[str, Any]:
        """The record, which must exist."""
        answer = self.get(f"/images/{image_id}")
        assert answer.status == 200, answer
        return dict(answer.json())

    def images(self, query: str = "") -> list[dict[str, Any]]:
        answer = self.get(f"/images{query}")
        assert answer.status == 200, answer
        return list(answer.json())

    def upload(self, body: Body, image_type: str = "kvm", comment: str | bytes | None = None) -> dict[str, Any]:
        """The record of an upload, which must succeed."""
        answer = self.put(body, image_type, comment)
        assert answer.status == 200, answer
        return dict(answer.json())

    def fetch(self, source: str, image_type: str = "kvm", comment: str = "") -> dict[str, Any]:
        """The record of a fetch, which must be accepted."""
        answer = self.post({"source": source, "type": image_type, "comment": comment})
        assert answer.status == 202, answer
        return dict(answer.json())

    def wait_status(self, image_id: str, *wanted: str, timeout: float = 15.0) -> dict[str, Any]:
        """The record once it has one of the wanted states."""
        deadline = time.monotonic() + timeout
        while (image := self.image(image_id))["status"] not in wanted:
            assert time.monotonic() < deadline, f"not {wanted} after {timeout} s: {image}"
            time.sleep(0.03)
        return image


class Connection:
    """A raw TCP connection to the service: sends any bytes, and reads answers one by one."""

    def __init__(
        self,
        port: int,
        *,
        address: str = "127.0.0.1",
        seen_from: Place = HERE,
        receive_buffer: int | None = None,
        timeout: float = 10.0,
    ) -> None:
        with seen_from.entered():
            self._socket = socket.socket()
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect((address, port))
        except OSError:
            self._socket.close()
            raise
        self._file: BufferedReader = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def send(self, data: bytes | str) -> None:
        self._socket.sendall(data.encode("latin-1") if isinstance(data, str) else data)

    def send_until_refused(self, piece: bytes, limit: int) -> int:
        """Sends the piece again and again, as a client does that stops for an answer as soon as there is one;
        returns the bytes sent, of which no more than `limit` and a piece."""
        sent = 0
        try:
            while sent < limit:
                rest = memoryview(piece)
                while rest:
                    readable, writable, _ = select.select([self._socket], [self._socket], [], _TIMEOUT)
                    assert readable or writable, "the service neither reads nor answers"
                    if readable:
                        return sent
                    count = self._socket.send(rest)
                    rest = rest[count:]
                    sent += count
        except (BrokenPipeError, ConnectionResetError):
            pass
        return sent

    def recv(self, length: int) -> bytes:
        """Up to `length` bytes, b"" at the end."""
        return self._file.read1(length)

    def read_exactly(self, length: int) -> bytes:
        """So many bytes, or fewer when the other side closes."""
        return self._file.read(length)

    def read_to_the_end(self) -> bytes:
        """All that comes until the other side closes."""
        return b"".join(iter(lambda: self.recv(1 << 16), b""))

    def readable(self, timeout: float) -> bool:
        """Whether something has arrived, the end included."""
        return bool(select.select([self._socket], [], [], timeout)[0])

    def head(self) -> tuple[int, Message]:
        """Status and headers of the next answer, a 100 included."""
        line = self._file.readline()
        assert line.startswith(b"HTTP/1."), f"no status line: {line!r}"
        return int(line.split()[1]), http.client.parse_headers(self._file)

    def answer(self, method: str = "GET") -> Answer:
        """The next answer, with its body."""
        status, headers = self.head()
        return Answer(status, headers, b"" if method == "HEAD" else self.rest(headers))

    def refused(self, timeout: float = 4.0) -> int:
        """The status with which the service refuses what was sent, 0 when it just ends the connection; fails when
        it does neither in time, or answers with anything but a client's error."""
        assert self.readable(timeout), f"neither an answer nor an end in {timeout} s"
        try:
            if not self._file.peek(1):
                return 0
            answer = self.answer()
        except ConnectionResetError:
            return 0
        assert 400 <= answer.status < 500, answer
        return answer.status

    def closed(self, timeout: float) -> bool:
        """Whether the service ends the connection, orderly or with a reset, within the time; drops what it sends."""
        deadline = time.monotonic() + timeout
        try:
            while self.readable(max(0.0, deadline - time.monotonic())):
                if not self._file.read1(65536):
                    return True
        except ConnectionResetError:
            return True
        return False

    def finish(self) -> None:
        """Ends this side; the other may still send."""
        self._socket.shutdown(socket.SHUT_WR)

    def begin_upload(self, length: int | None, *headers: str, image_type: str = "kvm") -> None:
        """The head of a PUT of an image, chunked when no length is announced."""
        announced = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        lines = ["PUT /images HTTP/1.1", "Host: test", f"X-Image-Type: {image_type}", announced, *headers]
        self.send("\r\n".join([*lines, "", ""]))

    def send_chunk(self, data: bytes) -> None:
        """One chunk; an empty one ends the body."""
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def reset(self) -> None:
        """Ends the connection with an RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def rest(self, headers: Message) -> bytes:
        """The body of the answer whose head has been read."""
        if headers.get("Transfer-Encoding") == "chunked":
            return b"".join(iter(self._chunk, b""))
        if "Content-Length" in headers:
            return self._file.read(int(headers["Content-Length"]))
        return self._file.read()

    def _chunk(self) -> bytes:
        size = int(self._file.readline(), 16)
        data = self._file.read(size)
        assert self._file.readline() == b"\r\n"
        return data
