"""What members ask of each other."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import structlog

from imgsvc.api.base import BaseHandler
from imgsvc.cluster.peers import COPY_WAIT
from imgsvc.errors import Forbidden, NotFound
from imgsvc.metadata.image import is_id

log = structlog.get_logger()


class OrderHandler(BaseHandler):
    """`/peers/{order}/{image id}`: an order, which only a member of the cluster may give."""

    allowed = ("POST",)

    def check_request(self) -> None:
        super().check_request()
        if self.request.method == "POST":
            self._member()

    def ordered(self, image_id: str) -> str:
        """The image of the order, which the log names with who gave it. Raises NotFound for what is no id."""
        if not is_id(image_id):
            raise NotFound(f"there is no image {image_id!r}")
        log.info("order", member=self._member(), path=self.request.path)
        return image_id

    def _member(self) -> str:
        """The id of the member that asks. Raises Forbidden."""
        peer = self.context.signatures.peer(self.request.headers, "POST", self.request.uri or "")
        if not peer:
            raise Forbidden("only members of the cluster may ask for this")
        return peer


class CheckHandler(OrderHandler):
    """`/peers/check/{id}`: whoever sends this got bytes of the image from here whose digest was wrong."""

    async def post(self, image_id: str) -> None:
        self.context.checks.submit(self.ordered(image_id))
        self.set_status(HTTPStatus.ACCEPTED)
        self.write('{"status":"queued"}\n')


class CopyHandler(OrderHandler):
    """`/peers/copy/{id}`: 200 when this member holds the image; 202 after a while when it is still being copied."""

    async def post(self, image_id: str) -> None:
        copy = asyncio.wrap_future(self.context.copies.begin(self.ordered(image_id)))
        done, _ = await asyncio.wait({copy}, timeout=COPY_WAIT)
        if done:
            copy.result()
            self.write('{"status":"held"}\n')
        else:
            copy.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody asks for it any more
            self.set_status(HTTPStatus.ACCEPTED)
            self.write('{"status":"copying"}\n')
