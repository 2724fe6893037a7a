"""A peer that sends whatever bytes a test likes, and a sink that keeps what it gets."""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import pytest

from imgsvc.settings import FetchSettings
from imgsvc.source import Source
from imgsvc.source_answer import Version
from tests import source as http


@dataclass
class Collected:
    """A `Sink`. `raises` are errors by method; each piece takes `pause` seconds, each tick `pause_tick`."""

    raises: Mapping[str, Exception] = field(default_factory=dict)
    pause: float = 0.0
    pause_tick: float = 0.0
    begun: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    versions: list[Version] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    ticks: list[float] = field(default_factory=list)
    calls_after_error: int = -1

    def begin(self, version: Version, offset: int) -> None:
        self.begun.append(version.length)
        self.offsets.append(offset)
        self.versions.append(version)
        del self.body[offset:]
        self._called("begin")

    def pace(self, size: int) -> None:
        pass

    def piece(self, data: bytes) -> None:
        time.sleep(self.pause)
        self.body += data
        self._called("piece")

    def tick(self) -> None:
        time.sleep(self.pause_tick)
        self.ticks.append(time.monotonic())
        self._called("tick")

    def _called(self, method: str) -> None:
        if self.calls_after_error >= 0 or method in self.raises:
            self.calls_after_error += 1
        if method in self.raises:
            raise self.raises[method]


def read(url: str, sink: Collected | None = None, **settings: Any) -> Collected:
    """Reads the source, with these settings beside short ones that deny nothing; returns the sink."""
    sink = sink or Collected()
    reader(url, sink, None, **settings).read()
    return sink


def reader(url: str, sink: Collected, version: Version | None, **settings: Any) -> Source:
    """A source to be read with the settings that `read` has, of which this version was found before."""
    usual: dict[str, Any] = {"connect_timeout": 5.0, "stall_timeout": 5.0, "deny_networks": ()}
    return Source(url, FetchSettings(**usual | settings), sink, version)


@dataclass(frozen=True)
class Answer:
    """What a connection gets: each of `later` comes `pause` seconds after what is before it; then it is closed, or waits
    for the other side to close."""

    first: bytes
    later: tuple[bytes, ...] = ()
    pause: float = 0.0
    closes: bool = True


class RawPeer:
    """Listens, over TLS where there is a context, and gives each connection the answer of that moment."""

    def __init__(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.requests: list[bytes] = []
        self._tls = tls
        self._answer = Answer(b"")
        self._listener = socket.create_server((host, 0))
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def answer(self, answer: Answer) -> str:
        """From now on this is the answer; returns the URL."""
        self._answer = answer
        return self.url

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()
        return f"{'http' if self._tls is None else 'https'}://{host}:{port}/image"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self._ending.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                connection, _ = self._listener.accept()
                with connection, suppress(OSError):
                    self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        connection.settimeout(5.0)
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_side=True)
        with connection:
            request = connection.recv(65536)
            if not request:
                return
            self.requests.append(request)
            connection.sendall(self._answer.first)
            for piece in self._answer.later:
                self._ending.wait(self._answer.pause)
                connection.sendall(piece)
            while not self._answer.closes and not self._ending.is_set():
                if select.select([connection], [], [], 0.05)[0] and not connection.recv(65536):
                    break


@pytest.fixture(scope="module")
def shared_source() -> Iterator[http.Source]:
    with http.Source() as source:
        yield source


@pytest.fixture
def source(shared_source: http.Source) -> http.Source:
    """One that nobody has asked yet."""
    shared_source.exchanges.clear()
    return shared_source


@pytest.fixture(scope="module")
def peer() -> Iterator[RawPeer]:
    with RawPeer() as peer:
        yield peer
