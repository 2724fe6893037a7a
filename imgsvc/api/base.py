"""What all handlers share: one way to answer, also ahead of a body that is still coming, and one log line a request."""

from __future__ import annotations

import asyncio
import functools
import re
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from types import TracebackType
from typing import Any, cast

import structlog
from tornado.http1connection import HTTP1Connection
from tornado.iostream import StreamClosedError
from tornado.web import HTTPError, RequestHandler, stream_request_body

from imgsvc import __version__
from imgsvc.api.errors import error_document, status_of
from imgsvc.api.in_flight import InFlight
from imgsvc.api.progress import acknowledged
from imgsvc.context import Context
from imgsvc.errors import IdleTimeout, ImgsvcError, Invalid, TooLarge, Unavailable
from imgsvc.metadata.image import UNKNOWN_SIZE

# Bytes of a body that is a document, or that nobody asked for.
MAX_DOCUMENT = 64 * 1024
# Seconds that a client which still sends has to read its answer: closing at once would reset the connection, and the
# answer would be lost with it.
LINGER = 5.0
# What the log says of a request whose client left before the answer.
CLIENT_LEFT = 499

_LENGTH = re.compile(r"[0-9]{1,18}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

Method = Callable[..., Awaitable[None] | None]

log = structlog.get_logger()


@stream_request_body
class BaseHandler(RequestHandler):
    """Bodies are streamed to every handler, so that a refusal need not wait for a body that nobody wants.

    A subclass names the methods that it has in `allowed`, and overrides `accept_body` and `body_received` where a
    body is more than a document. A method that may have a body begins with `if self.refused: return`.
    """

    allowed: tuple[str, ...] = ()
    # What another method is answered with.
    otherwise = HTTPStatus.METHOD_NOT_ALLOWED
    needs_stores = True

    def initialize(self, context: Context, in_flight: InFlight) -> None:
        self.context = context
        self.in_flight = in_flight
        self.body = bytearray()
        self._bytes_in = 0
        self._bytes_out = 0
        self._began = time.monotonic()
        self._linger: asyncio.TimerHandle | None = None

    @functools.cached_property
    def request_id(self) -> str:
        """The client's own where it makes a sane one, so that logs of several services can be joined."""
        given = self.request.headers.get("X-Request-Id", "")
        return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    @property
    def refused(self) -> bool:
        """Whether the request was answered ahead of its body."""
        return self._linger is not None

    def set_default_headers(self) -> None:
        self.set_header("Server", f"imgsvc/{__version__}")
        self.set_header("X-Request-Id", self.request_id)
        self.set_header("Content-Type", "application/json")

    def compute_etag(self) -> str | None:
        """None: Tornado would hash every answer on the event loop."""
        return None

    async def prepare(self) -> None:
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request=self.request_id)
        self.in_flight.add(self)
        # What is too much is for `accept_body` and `body_received` to say, for Tornado's own limit says it by a reset.
        cast("HTTP1Connection", self.request.connection).set_max_body_size(sys.maxsize)
        try:
            self._check_ready()
            if self._has_body():
                self._check_method()
                await self.accept_body()
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer and not a reset
            await self.refuse(error)

    async def accept_body(self) -> None:
        """Raises what a request is to be refused with before any of its body is read."""
        if self.announced_length() > MAX_DOCUMENT:
            raise TooLarge(f"the body may have at most {MAX_DOCUMENT} bytes")

    def announced_length(self) -> int:
        """Bytes of the body that is to come, or UNKNOWN_SIZE. Raises Invalid."""
        headers = self.request.headers
        if "Transfer-Encoding" in headers:
            return UNKNOWN_SIZE
        length = headers.get("Content-Length", "0")
        if not _LENGTH.fullmatch(length):
            raise Invalid("invalid Content-Length header")
        return int(length)

    async def body_received(self, chunk: bytes) -> None:
        """Takes the next piece of a body that was accepted. What it raises is answered at once."""
        self.body += chunk
        if len(self.body) > MAX_DOCUMENT:
            raise TooLarge(f"the body may have at most {MAX_DOCUMENT} bytes")

    async def data_received(self, chunk: bytes) -> None:
        self._bytes_in += len(chunk)
        if self.refused:
            return
        try:
            await self.body_received(chunk)
        except Exception as error:  # noqa: BLE001 - Tornado would reset the connection
            await self.refuse(error)

    async def refuse(self, error: Exception) -> None:
        """Answers with an error although a body may still be coming; the connection closes.

        A client that waits for 100 (Continue) gets the answer instead (RFC 9110, section 10.1.1). One that sends is
        read from, and its bytes dropped, until it has had LINGER seconds to see the answer.
        """
        if self._finished or self.refused:
            return
        self.log_exception(type(error), error, error.__traceback__)
        self._write_error_document(error)
        self.set_header("Connection", "close")
        if not self._has_body() or (self._bytes_in == 0 and "Expect" in self.request.headers):
            self.finish()
            return
        self._linger = asyncio.get_running_loop().call_later(LINGER, self._stop_lingering)
        try:
            await self.flush()
        except StreamClosedError:
            self._stop_lingering()

    async def drain(self) -> None:
        """Waits until what was written is on its way. Raises IdleTimeout when the client takes nothing for
        `idleTimeout`, StreamClosedError when it has left."""
        flushed = asyncio.ensure_future(self.flush())
        idle_timeout = self.context.settings.idle_timeout
        connection = cast("HTTP1Connection", self.request.connection)
        while True:
            taken = acknowledged(connection.stream)
            done, _ = await asyncio.wait({flushed}, timeout=idle_timeout)
            if done:
                return flushed.result()
            if acknowledged(connection.stream) == taken:
                flushed.cancel()
                raise IdleTimeout(f"the client took nothing for {idle_timeout:g} seconds")

    def _no_such_method(self, *_: str) -> None:
        if not self.refused:
            raise HTTPError(self.otherwise)

    get: Method = _no_such_method
    head: Method = _no_such_method
    post: Method = _no_such_method
    put: Method = _no_such_method
    delete: Method = _no_such_method
    patch: Method = _no_such_method
    options: Method = _no_such_method

    async def stop(self) -> None:
        """Ends the request before its time."""
        self.cut()

    def cut(self) -> None:
        """Ends the connection so that nobody takes what was sent for a whole answer."""
        cast("HTTP1Connection", self.request.connection).close()

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        if self._headers_written:
            self.cut()
        else:
            super().send_error(status_code, **kwargs)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        _, error, _ = kwargs.get("exc_info") or (None, HTTPError(status_code), None)
        self._write_error_document(error)
        self.finish()

    def log_exception(
        self, _kind: type[BaseException] | None, value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Only our own mistakes leave a traceback; a client's are in its request's line."""
        if not isinstance(value, ImgsvcError | HTTPError | StreamClosedError):
            log.error("request failed", exc_info=value, path=self.request.path)

    def write(self, chunk: str | bytes | dict[str, Any]) -> None:
        data = chunk.encode() if isinstance(chunk, str) else chunk
        self._bytes_out += len(data)
        super().write(data)

    def on_finish(self) -> None:
        self._leave(self.get_status())

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self._leave(CLIENT_LEFT)

    def _leave(self, status: int) -> None:
        """The request is over: one line in the log."""
        if self._linger is not None:
            self._linger.cancel()
        if self not in self.in_flight:
            return
        self.in_flight.discard(self)
        log.info(
            "request",
            request=self.request_id,
            method=self.request.method,
            path=self.request.path,
            status=status,
            bytes=self._bytes_out,
            bytes_in=self._bytes_in,
            duration=round(time.monotonic() - self._began, 6),
            remote=self.request.remote_ip,
        )

    def _write_error_document(self, error: BaseException) -> None:
        status = status_of(error)
        self.clear()
        self.set_status(status)
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.set_header("Allow", ", ".join(self.allowed))
        self.write(error_document(error, expose_stack=self.context.settings.expose_stack))

    def _check_ready(self) -> None:
        if self.needs_stores and self.context.not_ready is not None:
            raise Unavailable(self.context.not_ready)

    def _check_method(self) -> None:
        if self.request.method not in self.allowed:
            raise HTTPError(self.otherwise)

    def _has_body(self) -> bool:
        headers = self.request.headers
        return headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers

    def _stop_lingering(self) -> None:
        if not self._finished:
            self.finish()


class UnknownPathHandler(BaseHandler):
    """Every path that is none of ours, whatever the method."""

    needs_stores = False
    otherwise = HTTPStatus.NOT_FOUND
