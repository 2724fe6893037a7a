"""A network that loses answers and delays requests: between a client and a real server."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.parse

# Of what is held back, that which the client said for so many seconds arrives in the end; then it has given up.
_KEPT_SECONDS = 0.25


class LossyProxy:
    """Carries bytes both ways. After `lose_answers` what the server says is thrown away, from the first request that
    contains `words` on. After `delay` what the client says is held back, from there on, until `deliver`."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._server = (parts.hostname or "", parts.port or 0)
        self._losing = threading.Event()
        self._last_words: bytes | None = None
        self._words: bytes | None = None
        self._held: list[tuple[float, socket.socket, bytes]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def lose_answers(self, words: bytes = b"") -> None:
        if words:
            self._last_words = words
        else:
            self._losing.set()

    def delay(self, words: bytes) -> None:
        self._words = words

    def deliver(self) -> None:
        """The beginning of what was held back; the rest is lost, so that nobody hears that the client gave up."""
        assert self._held, "nothing was held back"
        first = self._held[0][0]
        for moment, server, data in self._held:
            if moment < first + _KEPT_SECONDS:
                server.sendall(data)

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += [client, server]
                self._start(self._carry_requests, client, server)
                self._start(self._carry_answers, server, client)

    def _carry_requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if self._last_words is not None and self._last_words in data:
                    self._losing.set()
                if self._held or (self._words is not None and self._words in data):
                    self._held.append((time.monotonic(), server, data))
                else:
                    server.sendall(data)

    def _carry_answers(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if not self._losing.is_set():
                    client.sendall(data)

    def _start(self, run: object, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()
