"""A source that gives each connection its bytes at a steady rate, over all its requests together. Run it as a program:
limited_source FILE BYTES_A_SECOND. Any path is the file."""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

_PIECE = 64 * 1024
# Seconds' worth that a connection may catch up on after it, or we, were late.
_CREDIT = 0.05
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Bucket:
    """Tokens for bytes, which come in at a rate; it is empty at first, and never holds more than a little."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._due = time.monotonic()

    def take(self, count: int) -> None:
        """Returns when so many tokens have come."""
        self._due = max(self._due, time.monotonic() - _CREDIT) + count / self._rate
        time.sleep(max(0.0, self._due - time.monotonic()))


class LimitedSource(ThreadingHTTPServer):
    """Strong ETag, one range a request, If-Range, HEAD, connections that are kept."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: Path, rate: float) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.rate = rate
        self.file = os.open(path, os.O_RDONLY)
        status = os.fstat(self.file)
        self.size = status.st_size
        self.etag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{self.size:x}"'

    def handle_error(self, request: object, client_address: object) -> None:
        """A client may leave at any time."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(cast("socket.socket", request), client_address)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LimitedSource
    bucket: Bucket

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.bucket = Bucket(self.server.rate)

    def do_HEAD(self) -> None:
        self._answer_head()

    def do_GET(self) -> None:
        start, end = self._answer_head()
        while start < end:
            count = min(_PIECE, end - start)
            self.bucket.take(count)
            self.wfile.flush()
            try:
                sent = os.sendfile(self.connection.fileno(), self.server.file, start, count)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
                return
            start += sent

    def log_message(self, *_: object) -> None:
        """Nothing: stderr is for the benchmark."""

    def _answer_head(self) -> tuple[int, int]:
        """Sends the headers; the bytes from the first number up to the second are to follow."""
        status, start, end = self._wanted()
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(end - start))
        if status is HTTPStatus.PARTIAL_CONTENT:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{self.server.size}")
        elif status is HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self.send_header("Content-Range", f"bytes */{self.server.size}")
        self.end_headers()
        return start, end

    def _wanted(self) -> tuple[HTTPStatus, int, int]:
        size = self.server.size
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if (
            match is None
            or not any(match.groups())
            or self.headers.get("If-Range", self.server.etag) != self.server.etag
        ):
            return HTTPStatus.OK, 0, size
        first, last = match.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if start >= end:
            return HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, 0
        return HTTPStatus.PARTIAL_CONTENT, start, end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("rate", type=float)
    options = parser.parse_args()
    with LimitedSource(options.file, options.rate) as server:
        sys.stdout.write(f"http://127.0.0.1:{server.server_port}/image\n")
        sys.stdout.flush()
        server.serve_forever()


if __name__ == "__main__":
    main()
