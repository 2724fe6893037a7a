"""The bytes of an image, or a range of them, on their way out."""

from __future__ import annotations

import asyncio
import base64
from datetime import UTC, datetime
from email.utils import format_datetime
from http import HTTPStatus

import structlog
from tornado.iostream import StreamClosedError
from tornado.web import HTTPError

from imgsvc.api.base import CLIENT_LEFT, BaseHandler
from imgsvc.api.conditions import Validators, precondition, range_applies, validators_of
from imgsvc.api.outlet import Outlet
from imgsvc.api.ranges import ByteRange, Unsatisfiable, requested_range
from imgsvc.cluster.supply import LOAD
from imgsvc.errors import IdleTimeout, Unreadable
from imgsvc.images.store import ImageReader
from imgsvc.metadata.image import Image

# Bytes that are read and written; what cannot be read at all is so answered with an error. The rest takes the quick
# way.
_BLOCK = 1 << 16
# All of a part that is no larger goes so. qemu asks for several ranges of up to 2.3 MiB at once, and `qemu-img convert`
# (7.2) waits for ever when they come in one go, from any server.
_SMALL = 4 << 20

log = structlog.get_logger()


class DownloadHandler(BaseHandler):
    """`/images/{id}/download`"""

    allowed = ("GET", "HEAD")
    _outlet: Outlet | None = None

    # Done when the byte that is waited for has arrived, or nobody waits any more.
    _arrival: asyncio.Future[None] | None = None

    async def get(self, image_id: str) -> None:
        own = bool(self.context.signatures.peer(self.request.headers, str(self.request.method), self.request.uri or ""))
        if own:
            self.set_header(LOAD, str(len(self.in_flight)))
        image, reader, stale = await self.context.looks_pool.run(self.context.service.open, image_id, own=own)
        self.say_stale(stale)
        try:
            await self._answer(image, reader)
        except Unreadable:
            self.context.service.doubt(image.id)
            raise
        finally:
            self.context.in_background(self._close(reader))

    head = get

    async def _answer(self, image: Image, reader: ImageReader) -> None:
        current = validators_of(image, datetime.now(UTC))
        verdict = precondition(self.request.headers, current)
        if verdict is HTTPStatus.PRECONDITION_FAILED:
            raise HTTPError(verdict, "a precondition of the request does not hold")
        try:
            part = None if verdict is HTTPStatus.NOT_MODIFIED else self._wanted(image.size, current)
        except Unsatisfiable:
            error = HTTPError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "the image has no bytes in this range")
            self._write_error_document(error, **{"Content-Range": f"bytes */{image.size}"})
            return
        self._validate_by(current)
        if verdict is HTTPStatus.NOT_MODIFIED:
            self.set_status(verdict)
            return
        self._describe(image, part)
        if self.request.method != "HEAD":
            await self._send(image, reader, part or ByteRange(0, image.size - 1))

    def _wanted(self, size: int, current: Validators) -> ByteRange | None:
        """None is the whole. Raises Unsatisfiable. A range is defined for GET alone (RFC 9110, section 14.2)."""
        field = self.request.headers.get("Range")
        if field is None or self.request.method != "GET" or not range_applies(self.request.headers, current):
            return None
        return requested_range(field, size)

    def _validate_by(self, current: Validators) -> None:
        if current.etag:
            self.set_header("ETag", current.etag)
        if current.modified is not None:
            self.set_header("Last-Modified", format_datetime(current.modified, usegmt=True))

    def _describe(self, image: Image, part: ByteRange | None) -> None:
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("Accept-Ranges", "bytes")
        if image.sha256:
            # Of the whole image, also with a part of it (RFC 9530, section 3).
            digest = base64.b64encode(bytes.fromhex(image.sha256)).decode()
            self.set_header("Repr-Digest", f"sha-256=:{digest}:")
        if part is not None:
            self.set_status(HTTPStatus.PARTIAL_CONTENT)
            self.set_header("Content-Range", part.content_range(image.size))
        self.set_header("Content-Length", str(image.size if part is None else part.size))

    async def _send(self, image: Image, reader: ImageReader, part: ByteRange) -> None:
        """Raises what the reader does, which cuts the connection when the first bytes have gone."""
        end = part.last + 1
        offset = part.first
        begun = end if part.size <= _SMALL else offset + _BLOCK
        try:
            while offset < begun:
                await self._arrived(reader, offset, end)
                block = await self.context.reads_pool.run(reader.read, offset, min(_BLOCK, begun - offset))
                self.write(block)
                await self.drain()
                offset += len(block)
            if offset < end:
                await self._send_rest(reader, offset, end)
        except IdleTimeout as error:
            log.info("download ended", image=image.id, reason=str(error))
            self.cut()

    async def _send_rest(self, reader: ImageReader, offset: int, end: int) -> None:
        stream = self._connection.stream
        if stream.closed():
            self._leave(CLIENT_LEFT)
            raise StreamClosedError
        with Outlet(stream, reader, offset, end) as outlet:
            self._outlet = outlet
            try:
                await self.context.reads_pool.run(outlet.send)
                while not outlet.done and not stream.closed():
                    if reader.arrived(outlet.position):
                        await self.until_taken(outlet.writable())
                    else:
                        await self._arrived(reader, outlet.position, end)
                    await self.context.reads_pool.run(outlet.send)
            except OSError as error:
                log.debug("client left", reason=str(error))
            finally:
                self._let_go()
        if stream.closed() or not outlet.done:
            self._leave(self.get_status() if outlet.done else CLIENT_LEFT)
            raise StreamClosedError
        # Tornado would count what it sends itself, and cut the connection for what is missing.
        self._connection._expected_content_remaining = 0  # noqa: SLF001

    async def _arrived(self, reader: ImageReader, offset: int, end: int) -> None:
        """Waits until the byte at `offset` is there, if it is still on its way. Raises StreamClosedError when the
        client has left, and what the reader raises."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(_done, arrival)

        while not reader.arrived(offset):
            if self._connection.stream.closed():
                raise StreamClosedError
            arrival = self._arrival = loop.create_future()
            reader.wait(offset, end - offset, wake)
            await arrival

    async def _close(self, reader: ImageReader) -> None:
        """With the last reader of a deleted image its blocks are freed, which takes some file systems seconds."""
        try:
            await self.context.reads_pool.run(reader.close)
        except RuntimeError:  # the service has stopped, and this pool with it
            reader.close()

    def _let_go(self) -> None:
        outlet, self._outlet = self._outlet, None
        if outlet is not None:
            self._bytes_out += outlet.sent

    def _leave(self, status: int) -> None:
        if self._arrival is not None:
            _done(self._arrival)
        if self._outlet is not None:
            self._outlet.end()
            if status == CLIENT_LEFT:
                return  # `_send_rest` says it, when it knows whether the client left with all
            self._let_go()
        super()._leave(status)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
