"""A real HTTP server to fetch from, which can do everything wrong that servers do."""

from __future__ import annotations

import gzip
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Self

from tests.namespaces import HERE, Place

_PIECE = 16384
_RANGE = re.compile(r"bytes=([0-9]+)-([0-9]*)")
_REASONS = {200: "OK", 301: "Moved Permanently", 302: "Found", 404: "Not Found", 500: "Internal Server Error"}


@dataclass
class Resource:
    """What a path answers with.

    The announced length is that of the body, unless `announce` says another; a body that is `chunked` or for which
    `announce` is None goes without. The connection ends after `cut_after` bytes of the body (with an RST when
    `reset`). A source on `hold` keeps even the first byte of its answer back until `begin`; after `stall_after` bytes
    of the body nothing more comes until `resume`. `rate` is bytes a second. `garbage` is sent instead of an answer.

    With an `etag` it serves ranges, and keeps to If-Range; what is said of the body above then goes for the part. One
    with `keep` keeps its connection for a further request, if asked to.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    announce: int | None = -1
    chunked: bool = False
    cut_after: int | None = None
    reset: bool = False
    stall_after: int | None = None
    rate: float | None = None
    hold: bool = False
    garbage: bytes | None = None
    etag: str = ""
    keep: bool = False
    _begun: threading.Event = field(default_factory=threading.Event)
    _resumed: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def redirect(cls, location: str, status: int = 302) -> Self:
        return cls(status=status, headers={"Location": location})

    @classmethod
    def gzipped(cls, content: bytes) -> Self:
        """Content-Encoding gzip, as a server sends it that compresses on the way."""
        return cls(gzip.compress(content), headers={"Content-Encoding": "gzip"})

    def answer_to(self, exchange: Exchange) -> Resource:
        """What it says to this request: itself, or a part of itself, or that there is no such part."""
        wanted = exchange.range
        if not self.etag or wanted is None or exchange.headers.get("if-range", self.etag) != self.etag:
            return self
        first, last = wanted
        size = len(self.body)
        if first >= size:
            return replace(self, status=416, body=b"", headers={**self.headers, "Content-Range": f"bytes */{size}"})
        last = size - 1 if last is None else min(last, size - 1)
        headers = {**self.headers, "Content-Range": f"bytes {first}-{last}/{size}"}
        return replace(self, status=206, body=self.body[first : last + 1], headers=headers)

    def begin(self) -> None:
        self._begun.set()

    def resume(self) -> None:
        self._resumed.set()

    def head(self, *, keep: bool = False) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {_REASONS.get(self.status, 'Whatever')}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.chunked:
            lines.append("Transfer-Encoding: chunked")
        elif self.announce is not None:
            lines.append(f"Content-Length: {len(self.body) if self.announce == -1 else self.announce}")
        if self.etag:
            lines += [f"ETag: {self.etag}"] + ["Accept-Ranges: bytes"] * ("Accept-Ranges" not in self.headers)
        lines.append(f"Connection: {'keep-alive' if keep else 'close'}")
        return "\r\n".join([*lines, "", ""]).encode()


@dataclass
class Exchange:
    """One request that the source got, the path's first when its `number` is 0. `closed` is set when the other side
    went away before the body's end."""

    method: str
    path: str
    headers: dict[str, str]
    began: float
    sent: int = 0
    closed: threading.Event = field(default_factory=threading.Event)
    number: int = 0

    @property
    def range(self) -> tuple[int, int | None] | None:
        """The first and the last byte that were asked for; None for the whole, or to the end."""
        found = _RANGE.fullmatch(self.headers.get("range", ""))
        return None if found is None else (int(found[1]), int(found[2]) if found[2] else None)

    @property
    def first(self) -> int:
        """The first byte that was asked for."""
        return 0 if self.range is None else self.range[0]

    @property
    def may_keep(self) -> bool:
        return self.headers.get("connection", "").lower() != "close"


Answers = Callable[[Exchange], Resource]


class Source:
    """Serves resources by path from threads of its own, and keeps what was asked; a path without one is a 404."""

    def __init__(self, port: int = 0, place: Place = HERE) -> None:
        self.exchanges: list[Exchange] = []
        self.most_connections = 0
        self._connections = 0
        self._lock = threading.Lock()
        self._answers: dict[str, Answers] = {}
        self._address = place.address
        with place.entered():
            self._listener = socket.create_server((place.address, port), backlog=128)
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://{self._address}:{self.port}"

    def serve(self, path: str, answer: Resource | bytes | Answers) -> str:
        """From now on the path answers with this, or with what this makes of a request; returns its URL."""
        if isinstance(answer, bytes):
            answer = Resource(answer)
        self._answers[path] = answer.answer_to if isinstance(answer, Resource) else answer
        return self.url + path

    def asked(self, path: str) -> list[Exchange]:
        """The requests for this path so far."""
        return [exchange for exchange in self.exchanges if exchange.path == path]

    def wait_asked(self, path: str, timeout: float = 10.0, count: int = 1) -> Exchange:
        """The last request for the path, once there were `count`."""
        deadline = time.monotonic() + timeout
        while len(self.asked(path)) < count:
            assert time.monotonic() < deadline, f"{path} was asked for {len(self.asked(path))} times in {timeout} s"
            time.sleep(0.01)
        return self.asked(path)[-1]

    def close(self) -> None:
        self._ending.set()
        self._acceptor.join()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._ending.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve_one, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve_one(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections += 1
            self.most_connections = max(self.most_connections, self._connections)
        try:
            with connection:
                connection.settimeout(0.1)
                while (exchange := self._request(connection)) is not None and self._serve_request(connection, exchange):
                    pass
        finally:
            with self._lock:
                self._connections -= 1

    def _serve_request(self, connection: socket.socket, exchange: Exchange) -> bool:
        """Whether the connection is kept for another."""
        with self._lock:
            exchange.number = len(self.asked(exchange.path))
            self.exchanges.append(exchange)
        answer = self._answers.get(exchange.path)
        resource = Resource(b"not here\n", status=404) if answer is None else answer(exchange)
        try:
            self._answer(connection, exchange, resource)
        except OSError:
            exchange.closed.set()
        whole = resource.cut_after is None and not exchange.closed.is_set()
        return resource.keep and exchange.may_keep and whole

    def _request(self, connection: socket.socket) -> Exchange | None:
        data = b""
        while b"\r\n\r\n" not in data:
            try:
                more = connection.recv(65536)
            except TimeoutError:
                if self._ending.is_set():
                    return None
                continue
            except OSError:
                return None
            if not more:
                return None
            data += more
        first, *lines = data.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
        return Exchange(method, path, headers, time.monotonic())

    def _answer(self, connection: socket.socket, exchange: Exchange, resource: Resource) -> None:
        if resource.hold and not self._wait(connection, exchange, resource._begun):
            return
        if resource.garbage is not None:
            self._send(connection, resource.garbage)
            return
        self._send(connection, resource.head(keep=resource.keep and exchange.may_keep))
        if exchange.method != "HEAD":
            self._body(connection, exchange, resource)

    def _body(self, connection: socket.socket, exchange: Exchange, resource: Resource) -> None:
        end = len(resource.body) if resource.cut_after is None else min(resource.cut_after, len(resource.body))
        pauses = sorted({n for n in (resource.stall_after, end) if n is not None and n <= end})
        began = time.monotonic()
        for pause in pauses:
            while exchange.sent < pause:
                size = _PIECE if resource.rate is None else max(1, min(_PIECE, int(resource.rate / 20)))
                piece = resource.body[exchange.sent : min(exchange.sent + size, pause)]
                if resource.rate is not None:
                    self._sleep(began + exchange.sent / resource.rate - time.monotonic())
                self._send(connection, b"%x\r\n%b\r\n" % (len(piece), piece) if resource.chunked else piece)
                exchange.sent += len(piece)
            if pause == resource.stall_after and not self._wait(connection, exchange, resource._resumed):
                return
        if resource.reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif resource.cut_after is None and resource.chunked:
            self._send(connection, b"0\r\n\r\n")

    def _wait(self, connection: socket.socket, exchange: Exchange, event: threading.Event) -> bool:
        """Until the event (true), or the other side or this server ends."""
        while not event.wait(0.02):
            if self._ending.is_set() or _gone(connection):
                exchange.closed.set()
                return False
        return True

    def _send(self, connection: socket.socket, data: bytes) -> None:
        """As sendall, but ends soon with this server, and notices when the other side goes away."""
        view = memoryview(data)
        while view:
            if self._ending.is_set() or _gone(connection):
                raise ConnectionAbortedError
            with suppress(TimeoutError):
                view = view[connection.send(view) :]

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self._ending.wait(seconds)


def _gone(connection: socket.socket) -> bool:
    """Whether the other side has ended the connection: it has nothing more to ask, so anything readable is the end."""
    return bool(select.select([connection], [], [], 0)[0])
