"""A network that loses answers: between a client and a real server."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.parse


class LossyProxy:
    """Carries bytes both ways, until `lose_answers`: from then on what the server says is thrown away."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._server = (parts.hostname or "", parts.port or 0)
        self._losing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def lose_answers(self) -> None:
        self._losing.set()

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
                self._start(self._carry, client, server, threading.Event())
                self._start(self._carry, server, client, self._losing)

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket, losing: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not losing.is_set():
                    target.sendall(data)

    def _start(self, run: object, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()
