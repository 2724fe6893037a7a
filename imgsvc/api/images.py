"""The image routes of the wire contract."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from tornado.httputil import HTTPHeaders

from imgsvc.api.base import BaseHandler, own_error
from imgsvc.api.digest_fields import announced_digest, digest_in_hex
from imgsvc.api.upload import Upload
from imgsvc.errors import ImgsvcError, Incomplete, Invalid
from imgsvc.foreign import read_json
from imgsvc.metadata.image import Image, ImageType
from imgsvc.service import ImageService

_COUNT = re.compile(r"[1-9][0-9]?")
_MOST_COPIES = 16

log = structlog.get_logger()


class ImageAnswer(BaseHandler):
    """Answers with one image."""

    def write_image(self, image: Image, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.set_status(status)
        self.write_document(image.to_json())

    def write_document(self, document: str) -> None:
        self.write(document + "\n")


class ImagesHandler(ImageAnswer):
    """`/images`: list, upload, fetch."""

    allowed = ("GET", "HEAD", "PUT", "POST")
    upload: Upload[Image] | None = None
    # Members that are to hold an upload before it is answered.
    copies = 1

    async def get(self) -> None:
        """Lists. Pages are sent as they are read, so that neither memory nor the event loop feels a long list."""
        run = self.context.looks_pool.run
        images = self.context.service
        pages, page = await run(_first_page, images, self._wanted_type())
        self.say_stale(images.stale)
        self.write("[")
        while page is not None:
            self.write(page)
            page = await run(_next_page, pages)
            if page is not None:
                self.write(",")
                await self.drain()
                if self.request.method == "HEAD":
                    return  # the headers have gone, and are the same however long the list
        self.write("]\n")
        if self.request.version == "HTTP/1.0" and self._headers_written:
            # No length, and no chunks in HTTP/1.0: only the connection's end says that this is all.
            await self.finish()
            self._connection.close()

    head = get

    async def accept_body(self) -> None:
        if self.request.method == "PUT":
            await self._begin_upload()
        else:
            await super().accept_body()

    async def body_received(self, chunk: bytes) -> None:
        if self.upload is None:
            await super().body_received(chunk)
        else:
            await self.upload.receive(chunk)

    async def abandon_body(self, reason: ImgsvcError) -> None:
        if self.upload is not None:
            await self.upload.abort(reason)

    async def put(self) -> None:
        """Receives an upload, whose body has come by now."""
        upload = self.upload or await self._begin_upload()
        try:
            image = await upload.finish()
        except Exception as error:
            await self.abandon_body(own_error(error))
            raise
        if self.copies > 1:
            image = await self.context.copies_pool.run(self.context.service.wait_for_copies, image, self.copies)
        if not self._answered:  # which it is when the service stops meanwhile
            self.write_image(image)

    async def post(self) -> None:
        """Has a source fetched."""
        wanted = _fetch_request(bytes(self.body))
        image = await self.context.records_pool.run(self.context.service.fetch, *wanted)
        self.write_image(image, HTTPStatus.ACCEPTED)

    async def _begin_upload(self) -> Upload[Image]:
        headers = self.request.headers
        image_type = parsed_type(headers.get("X-Image-Type", ""), "invalid X-Image-Type header")
        # Tornado hands headers over as latin-1; the wire contract has UTF-8 in this one.
        comment = headers.get("X-Image-Comment", "").encode("latin-1", "replace").decode("utf-8", "replace")
        self.copies = _wanted_copies(headers)
        transfer = await self.context.records_pool.run(
            self.context.service.upload,
            image_type,
            comment,
            self.announced_length(),
            announced_digest(headers),
            copies=self.copies,
        )
        context = self.context
        upload = Upload(transfer, context.bytes_pool, context.ends_pool, self.give_up, grace=context.grace)
        if self._connection.stream.closed():
            await upload.abort(Incomplete("the sender went away before the first byte"))
        self.upload = upload
        return upload

    def _wanted_type(self) -> ImageType | None:
        wanted = self.get_query_arguments("type", strip=False)
        if wanted in ([], [""]):
            return None
        return parsed_type(wanted[0] if len(wanted) == 1 else "", "invalid type")


class ImageHandler(ImageAnswer):
    """`/images/{id}`"""

    allowed = ("GET", "HEAD", "DELETE")

    async def get(self, image_id: str) -> None:
        images = self.context.service
        document = images.peek(image_id)  # which is quicker than the way into a thread and back
        if document is None:
            image, stale = await self.context.looks_pool.run(images.look, image_id)
            self.say_stale(stale)
            document = image.to_json()
        self.write_document(document)

    head = get

    async def delete(self, image_id: str) -> None:
        self.write_image(await self.context.records_pool.run(self.context.service.delete, image_id))


def _first_page(images: ImageService, image_type: ImageType | None) -> tuple[Iterator[Sequence[str]], bytes | None]:
    """All pages of a list, and the first of them."""
    pages = images.list(image_type)
    return pages, _next_page(pages)


def _next_page(pages: Iterator[Sequence[str]]) -> bytes | None:
    """The next page that has images, as the inside of a JSON array; None at the end."""
    for page in pages:
        if page:
            return ",".join(page).encode(errors="replace")
    return None


def _wanted_copies(headers: HTTPHeaders) -> int:
    """How many members are to hold the image before the answer. Raises Invalid."""
    said = headers.get_list("X-Image-Replicas") or ["1"]
    if len(said) > 1 or not _COUNT.fullmatch(said[0]) or int(said[0]) > _MOST_COPIES:
        raise Invalid(f"invalid X-Image-Replicas header: it is one number from 1 to {_MOST_COPIES}")
    return int(said[0])


def _fetch_request(body: bytes) -> tuple[str, ImageType, str, str]:
    """Source, type, comment and expected digest out of a POST's body. Raises Invalid, which says what is wrong."""
    try:
        document = read_json(body)
    except ValueError as error:
        raise Invalid("the body is not JSON") from error
    if not isinstance(document, dict):
        raise Invalid("the body is not a JSON object")
    source = _text(document, "source")
    if not source:
        raise Invalid("missing image source")
    image_type = parsed_type(_text(document, "type"), "invalid image type")
    sha256 = _text(document, "sha256")
    return source, image_type, _text(document, "comment"), sha256 and digest_in_hex(sha256, "sha256")


def _text(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Invalid(f"{key} is not a string")
    # JSON can spell half a surrogate pair, which no UTF-8 can.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parsed_type(text: str, complaint: str) -> ImageType:
    """Raises Invalid, with the complaint."""
    try:
        return ImageType(text)
    except ValueError as error:
        raise Invalid(complaint) from error
