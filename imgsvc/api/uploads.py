"""The routes of the tus protocol, by which uploads survive their client, the network and the service."""

from __future__ import annotations

from http import HTTPStatus

from tornado.web import HTTPError

from imgsvc.api import tus
from imgsvc.api.base import BaseHandler, own_error
from imgsvc.api.upload import Upload
from imgsvc.errors import ImgsvcError, Incomplete, TooLarge
from imgsvc.resumable import ALGORITHMS, Checksum, Progress


class TusHandler(BaseHandler):
    """What both kinds of paths share."""

    # Of the upload that the request has made, for its answer, be that an error.
    location = ""
    incoming: Upload[Progress] | None = None

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("Tus-Resumable", tus.VERSION)
        self.set_header("Tus-Version", tus.VERSION)
        self.set_header("Cache-Control", "no-store")
        if self.location:
            self.set_header("Location", self.location)

    @property
    def method(self) -> str:
        """What the request asks for, which some clients cannot say as HTTP has it."""
        return self.request.headers.get("X-HTTP-Method-Override", str(self.request.method))

    async def prepare(self) -> None:
        wanted = self.method if self.method in self.allowed else "no such method"
        setattr(self, str(self.request.method).lower(), getattr(self, wanted.lower(), self._no_such_method))
        await super().prepare()

    def check_request(self) -> None:
        super().check_request()
        spoken = self.request.headers.get("Tus-Resumable")
        if self.method in self.allowed and self.method != "OPTIONS" and spoken != tus.VERSION:
            raise HTTPError(HTTPStatus.PRECONDITION_FAILED, f"Tus-Resumable must be {tus.VERSION}")

    def check_method(self) -> None:
        if self.method not in self.allowed:
            raise HTTPError(self.otherwise)

    async def body_received(self, chunk: bytes) -> None:
        if self.incoming is None:
            await super().body_received(chunk)
        else:
            await self.incoming.receive(chunk)

    async def abandon_body(self, reason: ImgsvcError) -> None:
        if self.incoming is not None:
            await self.incoming.abort(reason)

    def options(self, *_: str) -> None:
        """Says what the service can do."""
        self.set_header("Tus-Extension", ",".join(tus.EXTENSIONS))
        self.set_header("Tus-Checksum-Algorithm", ",".join(ALGORITHMS))
        if self.context.settings.max_image_size:
            self.set_header("Tus-Max-Size", str(self.context.settings.max_image_size))
        self.set_status(HTTPStatus.NO_CONTENT)

    def check_content_type(self) -> None:
        """Raises unless the body is the bytes of an upload."""
        if self.request.headers.get("Content-Type", "").strip().lower() != tus.CONTENT_TYPE:
            raise HTTPError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Content-Type must be {tus.CONTENT_TYPE}")

    async def begin(self, image_id: str, offset: int, length: int, checksum: Checksum | None) -> Upload[Progress]:
        """Has the upload wait for the body."""
        request = await self.context.records_pool.run(self.context.uploads.go_on, image_id, offset, length, checksum)
        context = self.context
        incoming = Upload(
            request,
            context.bytes_pool,
            context.ends_pool,
            self.give_up,
            grace=context.grace,
            resumable=True,
            offset=offset,
        )
        if self._connection.stream.closed():
            await incoming.abort(Incomplete("the sender went away before the first byte"))
        self.incoming = incoming
        return incoming

    async def finish_body(self, incoming: Upload[Progress]) -> Progress:
        """How far the upload is, now that the body has come."""
        try:
            return await incoming.finish()
        except Exception as error:
            await self.abandon_body(own_error(error))
            raise

    def say_progress(self, progress: Progress) -> None:
        self.set_header("Upload-Offset", str(progress.offset))
        if progress.expires is not None:
            self.set_header("Upload-Expires", tus.expiry(progress.expires))


class UploadsHandler(TusHandler):
    """`/uploads`: creation, with the first bytes or without any."""

    allowed = ("POST", "OPTIONS")

    async def accept_body(self) -> None:
        if self.method != "POST":
            await super().accept_body()
            return
        self.check_content_type()
        length, checksum = self.announced_length(), tus.checksum(self.request.headers)
        if length > tus.number(self.request.headers, "Upload-Length"):
            raise TooLarge("the body is longer than Upload-Length says that the upload is")
        progress = await self._create()
        await self.begin(progress.image.id, 0, length, checksum)

    async def post(self, *_: str) -> None:
        if self.incoming is None:
            progress = await self._create()
        else:
            progress = await self.finish_body(self.incoming)
        self.set_status(HTTPStatus.CREATED)
        self.clear_header("Content-Type")
        self.say_progress(progress)

    async def _create(self) -> Progress:
        wanted = tus.creation(self.request.headers)
        progress = await self.context.records_pool.run(
            self.context.uploads.create,
            wanted.image_type,
            wanted.comment,
            wanted.length,
            wanted.sha256,
            wanted.metadata,
        )
        # Relative to this request, so that it holds behind any proxy.
        self.location = f"{'' if self.request.path.endswith('/') else 'uploads/'}{progress.image.id}"
        self.set_header("Location", self.location)
        return progress


class UploadHandler(TusHandler):
    """`/uploads/{id}`"""

    allowed = ("HEAD", "PATCH", "DELETE", "OPTIONS")

    async def accept_body(self) -> None:
        if self.method != "PATCH":
            await super().accept_body()
            return
        await self._begin(self.announced_length())

    async def head(self, image_id: str) -> None:
        """How far it is."""
        progress = await self.context.records_pool.run(self.context.uploads.look, image_id)
        self.clear_header("Content-Type")
        self.say_progress(progress)
        self.set_header("Upload-Length", str(progress.length))
        self.set_header("Upload-Metadata", progress.metadata or tus.metadata_of(progress.image))

    async def patch(self, _image_id: str) -> None:
        """Brings it on by a body, which has come by now."""
        progress = await self.finish_body(self.incoming or await self._begin(0))
        self.set_status(HTTPStatus.NO_CONTENT)
        self.say_progress(progress)

    async def delete(self, image_id: str) -> None:
        """Terminates it."""
        await self.context.records_pool.run(self.context.service.terminate, image_id)
        self.set_status(HTTPStatus.NO_CONTENT)

    async def _begin(self, length: int) -> Upload[Progress]:
        self.check_content_type()
        headers = self.request.headers
        offset, checksum = tus.number(headers, "Upload-Offset"), tus.checksum(headers)
        return await self.begin(self.path_args[0], offset, length, checksum)
