"""What all handlers share: one way to answer, also ahead of a body that is still coming, and one log line a request."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from types import TracebackType
from typing import Any, cast

import structlog
from tornado.http1connection import HTTP1Connection
from tornado.iostream import StreamClosedError
from tornado.web import HTTPError, RequestHandler, stream_request_body

from imgsvc import __version__
from imgsvc.api.errors import REASONS, error_document, fields_of, status_of
from imgsvc.api.in_flight import InFlight
from imgsvc.api.progress import acknowledged
from imgsvc.context import Context
from imgsvc.errors import IdleTimeout, ImgsvcError, Incomplete, Invalid, Stopping, TooLarge, Unavailable
from imgsvc.metadata.image import UNKNOWN_SIZE

# Bytes of a body that is a document, or that nobody asked for.
MAX_DOCUMENT = 64 * 1024
# Seconds that a client which still sends has to read its answer: closing at once would reset the connection, and the
# answer would be lost with it.
LINGER = 5.0
# Seconds without a byte after which such a client has stopped.
LULL = 1.0
# What the log says of a request whose client left before the answer.
CLIENT_LEFT = 499
# And of one whose connection we ended before its answer was whole.
CUT = 599

_LENGTH = re.compile(r"[0-9]{1,100}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

Method = Callable[..., Awaitable[None] | None]

log = structlog.get_logger()


@stream_request_body
class BaseHandler(RequestHandler):
    """Bodies are streamed to every handler, so that a refusal need not wait for a body that nobody wants.

    A subclass names the methods that it has in `allowed`, and overrides `accept_body` and `body_received` where a
    body is more than a document. A method is not called when its request was refused ahead of its body.
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
        self._heard: float | None = None
        self._answered = False
        self._left = False
        self._timer: asyncio.TimerHandle | None = None

    @functools.cached_property
    def request_id(self) -> str:
        """The client's own where it makes a sane one, so that logs of several services can be joined."""
        given = self.request.headers.get("X-Request-Id", "")
        return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)

    def set_default_headers(self) -> None:
        self.set_header("Server", f"imgsvc/{__version__}")
        self.set_header("X-Request-Id", self.request_id)
        self.set_header("Content-Type", "application/json")

    def compute_etag(self) -> str | None:
        """None: Tornado would hash every answer on the event loop."""
        return None

    async def prepare(self) -> None:
        structlog.contextvars.bind_contextvars(request=self.request_id)
        self.in_flight.add(self)
        if not self._has_body():
            self.check_request()
            return
        name = str(self.request.method).lower()
        setattr(self, name, self._after_body(getattr(self, name)))
        # What is too much is for `accept_body` and `body_received` to say, for Tornado's own limit says it by a reset.
        self._connection.set_max_body_size(sys.maxsize)
        try:
            self.check_request()
            self.check_method()
            await self.accept_body()
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer and not a reset
            await self.refuse(error)
        else:
            self._heard = time.monotonic()
            self._watch_silence()

    def check_request(self) -> None:
        """Raises what a request is to be refused with, whatever its method and body."""
        if self.needs_stores and self.context.not_ready is not None:
            raise Unavailable(self.context.not_ready)

    def check_method(self) -> None:
        """Raises unless the path has the method."""
        if self.request.method not in self.allowed:
            raise HTTPError(self.otherwise)

    async def accept_body(self) -> None:
        """Raises what a request is to be refused with before any of its body is read."""
        if self.announced_length() > MAX_DOCUMENT:
            raise TooLarge(f"the body may have at most {MAX_DOCUMENT} bytes")

    async def body_received(self, chunk: bytes) -> None:
        """Takes the next piece of a body that was accepted. What it raises is answered at once."""
        self.body += chunk
        if len(self.body) > MAX_DOCUMENT:
            raise TooLarge(f"the body may have at most {MAX_DOCUMENT} bytes")

    async def abandon_body(self, reason: ImgsvcError) -> None:
        """The body that was accepted will not come to its end; never raises, and may be called twice."""

    def announced_length(self) -> int:
        """Bytes of the body that is to come, or UNKNOWN_SIZE. Raises Invalid when the headers do not say it in one
        clear way (RFC 9112, section 6.3)."""
        lengths = self.request.headers.get_list("Content-Length")
        codings = self.request.headers.get_list("Transfer-Encoding")
        if codings:
            if lengths or [coding.lower() for coding in codings] != ["chunked"]:
                raise Invalid("invalid Transfer-Encoding header")
            return UNKNOWN_SIZE
        if not lengths:
            return 0
        if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
            raise Invalid("invalid Content-Length header")
        return int(lengths[0])

    async def data_received(self, chunk: bytes) -> None:
        self._bytes_in += len(chunk)
        if self._answered:
            return
        self._heard = None
        try:
            await self.body_received(chunk)
        except Exception as error:  # noqa: BLE001 - Tornado would reset the connection
            await self.give_up(error)
        self._heard = time.monotonic()

    async def give_up(self, error: Exception) -> None:
        """Ends a request whose body is still coming."""
        await self.abandon_body(own_error(error))
        await self.refuse(error)

    async def refuse(self, error: Exception) -> None:
        """Answers with an error ahead of the body's end.

        A client that waits for 100 (Continue) gets the answer instead (RFC 9110, section 10.1.1). From one that sends
        its body all the same, that is read and dropped, for LINGER seconds at most, so that the answer is not lost
        by a reset; after a small body the connection goes on.
        """
        if self._answered or self._finished:
            return
        self.log_exception(type(error), error, error.__traceback__)
        waits = "Expect" in self.request.headers and self._bytes_in == 0
        size = self._body_size()
        if waits or size is None or isinstance(error, IdleTimeout):
            await self._answer_and_close(error)
        else:
            await self._answer_and_linger(error, small=0 <= size <= MAX_DOCUMENT)

    def say_stale(self, seconds: float | None) -> None:
        """What is answered comes from memory, and the store was last heard so long ago; None: it comes from there."""
        if seconds is not None:
            self.set_header("X-Imgsvc-Stale", str(max(math.ceil(seconds), 1)))

    async def drain(self) -> None:
        """Waits until what was written is on its way. Raises IdleTimeout when the client takes nothing for
        `idleTimeout`, StreamClosedError when it has left."""
        await self.until_taken(asyncio.ensure_future(self.flush()))

    async def until_taken(self, going_out: asyncio.Future[None]) -> None:
        """Waits for what is done when the client has taken something. Raises as `drain` does."""
        idle_timeout = self.context.settings.idle_timeout
        taken = acknowledged(self._connection.stream)
        while not (await asyncio.wait({going_out}, timeout=idle_timeout))[0]:
            before, taken = taken, acknowledged(self._connection.stream)
            if taken == before:
                going_out.cancel()
                raise IdleTimeout(f"the client took nothing for {idle_timeout:g} seconds")
        going_out.result()

    def _no_such_method(self, *_: str) -> None:
        raise HTTPError(self.otherwise)

    get: Method = _no_such_method
    head: Method = _no_such_method
    post: Method = _no_such_method
    put: Method = _no_such_method
    delete: Method = _no_such_method
    patch: Method = _no_such_method
    options: Method = _no_such_method

    async def stop(self) -> None:
        """Ends the request before its time, leaving nothing half behind."""
        stopping = Stopping("the service is stopping")
        if self._heard is not None and not self._headers_written:
            await self.give_up(stopping)
            return  # the shutdown closes what is left of the connection
        await self.abandon_body(stopping)
        self.cut()

    def cut(self) -> None:
        """Ends the connection so that nobody takes what was sent for a whole answer."""
        self._connection.close()
        self._leave(CUT)

    def decode_argument(self, value: bytes, name: str | None = None) -> str:
        """What is no UTF-8 in a path names nothing that we have."""
        return value.decode("utf-8", "replace") if name is None else super().decode_argument(value, name)

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        if self._headers_written:
            self.cut()
        else:
            super().send_error(status_code, **kwargs)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        _, error, _ = kwargs.get("exc_info") or (None, HTTPError(status_code), None)
        if status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            error = HTTPError(self.otherwise)  # a method that nobody knows has not got as far as a path of ours
        self._write_error_document(error)
        self.finish()

    def log_exception(
        self, _kind: type[BaseException] | None, value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Only our own mistakes leave a traceback; a client's are in its request's line."""
        if not isinstance(value, ImgsvcError | HTTPError | StreamClosedError):
            log.error("request failed", exc_info=value, path=self.request.path)

    def write(self, chunk: str | bytes | dict[str, Any]) -> None:
        # Records and names of others may have what is no text.
        data = chunk.encode(errors="replace") if isinstance(chunk, str) else chunk
        if self.request.method != "HEAD":
            self._bytes_out += len(data)
        super().write(data)

    def on_finish(self) -> None:
        self._leave(self.get_status())

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self.context.in_background(self.abandon_body(Incomplete("the sender went away before the end")))
        self._leave(CLIENT_LEFT)

    def _leave(self, status: int) -> None:
        """The request is over: one line in the log."""
        self._stop_timer()
        if self._left:
            return
        self._left = True
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

    @property
    def _connection(self) -> HTTP1Connection:
        return cast("HTTP1Connection", self.request.connection)

    def _write_error_document(self, error: BaseException, **headers: str) -> None:
        status = status_of(error)
        document = error_document(error, expose_stack=self.context.settings.expose_stack).encode(errors="replace")
        self.clear()
        self.set_status(status, REASONS.get(status))
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(self.allowed)
        for name, value in (fields_of(error) | headers).items():
            self.set_header(name, value)
        self.set_header("Content-Length", str(len(document)))
        self.write(document)

    def _body_size(self) -> int | None:
        """As announced, or None when nobody can tell where the body ends."""
        try:
            return self.announced_length()
        except Invalid:
            return None

    async def _answer_and_linger(self, error: Exception, *, small: bool) -> None:
        self._answered = True
        self._write_error_document(error, **({} if small else {"Connection": "close"}))
        self._start_timer(LULL, self._linger, time.monotonic() + LINGER, self._bytes_in)
        with contextlib.suppress(StreamClosedError):
            await self.flush()

    async def _answer_and_close(self, error: Exception) -> None:
        self._answered = True
        self._write_error_document(error, Connection="close")
        with contextlib.suppress(StreamClosedError):
            await self.finish()
        self.cut()

    async def _close_if_said(self) -> None:
        """After an answer that went ahead of the body, now that the body has come to its end all the same."""
        if self._headers.get("Connection") == "close":
            with contextlib.suppress(StreamClosedError):
                await self.finish()
            self.cut()

    def _has_body(self) -> bool:
        headers = self.request.headers
        return headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers

    def _after_body(self, method: Method) -> Method:
        """What Tornado is to call in place of `method` when the body has come."""

        async def call(*arguments: str) -> None:
            self._stop_timer()
            if self._answered:
                await self._close_if_said()
            elif (result := method(*arguments)) is not None:
                await result

        return call

    def _watch_silence(self) -> None:
        """Looks again when the sender could have been silent for too long. While we are busy, it is not its fault."""
        idle_timeout = self.context.settings.idle_timeout
        silent = 0 if self._heard is None else time.monotonic() - self._heard
        if silent >= idle_timeout:
            error = IdleTimeout(f"nothing came for {idle_timeout:g} seconds, after {self._bytes_in} bytes")
            self.context.in_background(self.give_up(error))
        else:
            self._start_timer(idle_timeout - silent, self._watch_silence)

    def _linger(self, latest: float, bytes_in: int) -> None:
        """Closes as soon as the client has stopped sending, or at the latest."""
        if self._bytes_in > bytes_in and time.monotonic() < latest:
            self._start_timer(LULL, self._linger, latest, self._bytes_in)
        elif not self._finished:
            self.finish()

    def _start_timer(self, seconds: float, then: Callable[..., None], *arguments: object) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, then, *arguments)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def own_error(error: Exception) -> ImgsvcError:
    """What a record may say: our own sentence, and nothing of an unexpected exception, which is in the log."""
    return error if isinstance(error, ImgsvcError) else Unavailable("internal error")


class UnknownPathHandler(BaseHandler):
    """Every path that is none of ours, whatever the method."""

    needs_stores = False
    otherwise = HTTPStatus.NOT_FOUND
