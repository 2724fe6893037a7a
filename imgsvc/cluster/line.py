"""One connection to another member, for one GET after another.

No curl: it hands over 16 KiB at most, by a call of Python's each time, and a member that serves an image speaks
nothing but plain HTTP/1.1 with a Content-Length. So bytes go from the socket to where they are wanted.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from urllib.parse import urlsplit

import certifi

from imgsvc import __version__
from imgsvc.errors import PeerFailed

# Seconds after which a caller gets to do something else, when nothing comes.
TICK = 0.02

_HEAD_LIMIT = 64 * 1024
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: .*)?")
_LENGTH = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Head:
    """Of an answer whose body has `length` bytes."""

    status: int
    fields: Message
    length: int

    def get(self, name: str) -> str:
        """The field's value, "" when there is none."""
        return str(self.fields.get(name, "")).strip()


class Line:
    """For one thread at a time. Everything raises PeerFailed when the member does not do what it should, or is silent
    for `patience` seconds; then, as after an answer that was not read to its end, the connection is of no use.

    `look` is called several times a second while nothing comes, and may raise to end the waiting.
    """

    def __init__(self, url: str, patience: float, look: Callable[[], None]) -> None:
        """Connects."""
        self.look = look
        self._patience = patience
        self._rest = b""
        self._left = 0
        self._keeps = True
        try:
            parts = urlsplit(url)
            port = parts.port
            self._host = parts.netloc.rpartition("@")[2]
            self._host.encode("latin-1")  # as it will be sent
        except ValueError as error:
            raise PeerFailed(f"its URL {url!r} is none: {error}") from error
        self._socket = _connected(parts.hostname or "", port, parts.scheme == "https", patience)

    @property
    def reusable(self) -> bool:
        """Whether another GET may follow."""
        return self._keeps and not self._left

    def get(self, target: str, fields: Mapping[str, str]) -> Head:
        """Sends the request and returns the answer's head; the body is then to be received."""
        lines = [f"GET {target} HTTP/1.1", f"Host: {self._host}", f"User-Agent: imgsvc/{__version__}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        self._send("\r\n".join([*lines, "", ""]).encode("latin-1"))
        head = self._head()
        self._left = head.length
        self._keeps = head.get("Connection").lower() != "close"
        return head

    def receive(self, into: memoryview) -> int:
        """The next bytes of the body, of which there are some: how many, 0 when none came within TICK."""
        into = into[: self._left]
        if self._rest:
            count = min(len(into), len(self._rest))
            into[:count], self._rest = self._rest[:count], self._rest[count:]
        else:
            count = self._received(into)
        self._left -= count
        return count

    def fill(self, into: memoryview) -> None:
        """The next bytes of the body, as many as there is room for."""
        silent = time.monotonic()
        while into:
            count = self.receive(into)
            if count:
                silent = time.monotonic()
                into = into[count:]
            else:
                self.wait(silent)

    def wait(self, since: float) -> None:
        """To be called when nothing came since that moment. Raises PeerFailed when that is too long."""
        self.look()
        if time.monotonic() - since > self._patience:
            raise PeerFailed(f"no byte came for {self._patience:g} seconds")

    def close(self) -> None:
        self._socket.close()

    def _send(self, data: bytes) -> None:
        since = time.monotonic()
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except TimeoutError:
                self.wait(since)
            except OSError as error:
                raise PeerFailed(f"the connection broke: {error.strerror or error}") from error

    def _received(self, into: memoryview) -> int:
        try:
            count = self._socket.recv_into(into)
        except TimeoutError:
            return 0
        except OSError as error:
            raise PeerFailed(f"the connection broke: {error.strerror or error}") from error
        if not count:
            raise PeerFailed("the connection was closed too early")
        return count

    def _head(self) -> Head:
        """What comes behind it is kept in `_rest`."""
        data, since, buffer = bytearray(), time.monotonic(), memoryview(bytearray(_HEAD_LIMIT))
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) >= _HEAD_LIMIT:
                raise PeerFailed("what it answers is no HTTP")
            count = self._received(buffer)
            data += buffer[:count]
            if not count:
                self.wait(since)
        self._rest = bytes(data[end + 4 :])
        first, _, fields = bytes(data[: end + 4]).partition(b"\r\n")
        return _understood(first, fields)


def _understood(first: bytes, fields: bytes) -> Head:
    status = _STATUS.fullmatch(first)
    try:
        found = http.client.parse_headers(io.BytesIO(fields))
    except http.client.HTTPException as error:
        raise PeerFailed("what it answers is no HTTP") from error
    length = found.get("Content-Length", "")
    if status is None or not _LENGTH.fullmatch(length) or "Transfer-Encoding" in found:
        raise PeerFailed("what it answers is not what a member would")
    return Head(int(status[1]), found, int(length))


def _connected(host: str, port: int | None, tls: bool, patience: float) -> socket.socket:
    port = port or (443 if tls else 80)
    until = time.monotonic() + patience
    trouble: OSError | str = "it has no address"
    for family, address in _addresses(host, port, patience):
        line = socket.socket(family, socket.SOCK_STREAM)
        try:
            line.settimeout(max(until - time.monotonic(), TICK))
            line.connect(address)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls:
                line = ssl.create_default_context(cafile=certifi.where()).wrap_socket(line, server_hostname=host)
            line.settimeout(TICK)
        except OSError as error:
            line.close()
            trouble = error.strerror or error
        else:
            return line
    raise PeerFailed(f"cannot connect: {trouble}")


def _addresses(host: str, port: int, patience: float) -> list[tuple[int, tuple[str, int]]]:
    """A name service that is silent keeps nobody longer than `patience`."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return _looked_up(host, port, patience)
    return [(socket.AF_INET if version == 4 else socket.AF_INET6, (host, port))]  # noqa: PLR2004 - as the RFC calls it


def _looked_up(host: str, port: int, patience: float) -> list[tuple[int, tuple[str, int]]]:
    answers: queue.SimpleQueue[list[tuple[int, tuple[str, int]]] | str] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put([(family, (str(name[0]), port)) for family, _, _, _, name in found])
        except OSError as error:
            answers.put(error.strerror or str(error))
        except UnicodeError as error:
            answers.put(str(error))

    threading.Thread(target=look_up, name="peer-name", daemon=True).start()
    try:
        answer = answers.get(timeout=patience)
    except queue.Empty:
        raise PeerFailed(f"nobody said within {patience:g} seconds which address {host} has") from None
    if isinstance(answer, str):
        raise PeerFailed(f"cannot find the address of {host}: {answer}")
    return answer
