"""An image on its way through this member, which keeps nothing of it: for when there is no room for a copy."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import structlog

from imgsvc.cluster.parts import Parts
from imgsvc.cluster.supply import Supply
from imgsvc.errors import ImgsvcError, PeerFailed, Stopping, Unavailable
from imgsvc.metadata.image import Image
from imgsvc.metadata.mirror import LiveMember

log = structlog.get_logger()


class Relay:
    """An ImageReader. What a client is about to take is fetched by a thread of `threads`, piece by piece, so that one
    that is slow holds nothing but a piece.

    Who reads from the first byte to the last has the digest found right before the last piece; `before` is the digest
    of what was read elsewhere until `offset`. Pieces in another order are only known to be of the right version.
    """

    def __init__(
        self,
        image: Image,
        supply: Supply,
        parts: Parts,
        threads: Executor,
        ended: Callable[[Relay], None],
        *,
        offset: int = 0,
        before: Any | None = None,
    ) -> None:
        """`ended` is called with this when it is closed."""
        self.size = image.size
        self._image = image
        self._supply = supply
        self._parts = parts
        self._threads = threads
        self._ended = ended
        self._digest = hashlib.sha256() if before is None else before.copy()
        self._hashed = offset
        self._in_order = bool(image.sha256) and (not offset or before is not None)
        self._given: dict[str, LiveMember] = {}
        # Where the piece begins, and the piece.
        self._piece = (0, b"")
        self._error: ImgsvcError | None = None
        self._closed = threading.Event()
        parts.use(image)

    def refuse(self, error: ImgsvcError) -> None:
        """It gives no byte."""
        self._error = error

    def arrived(self, offset: int) -> int:
        if self._error is not None:
            raise self._error
        first, piece = self._piece
        return first + len(piece) - offset if first <= offset < first + len(piece) else 0

    def wait(self, offset: int, length: int, wake: Callable[[], None]) -> None:
        if self._error is not None:
            wake()
            return
        try:
            self._threads.submit(self._fetch, offset, min(length, self.size - offset), wake)
        except RuntimeError:
            self._error = Stopping("the service is stopping")
            wake()

    def read(self, offset: int, length: int) -> bytes:
        count = min(self.arrived(offset), length)
        first, piece = self._piece
        return piece[offset - first : offset - first + count]

    def send(self, descriptor: int, offset: int, length: int) -> int:
        try:
            return os.write(descriptor, self.read(offset, length))
        except BlockingIOError:
            return 0

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._piece = (0, b"")
        self._parts.leave(self._image)
        self._ended(self)

    def _fetch(self, offset: int, length: int, wake: Callable[[], None]) -> None:
        try:
            self._piece = (0, b"")
            self._piece = (offset, self._right(offset, length))
        except ImgsvcError as error:
            self._error = error
        except Exception:
            log.exception("bytes not passed on", image=self._image.id)
            self._error = Unavailable("the bytes could not be passed on, for a reason of our own, which is in the log")
        finally:
            wake()

    def _right(self, offset: int, length: int) -> bytes:
        """The piece, found right if it is the last of all."""
        piece, giver = self._parts.get(self._image, offset, length, self._look)
        liars = set[str]()
        while not self._is_right(offset, piece, giver):
            self._supply.accuse(self._given.values(), self._image)
            self._parts.forget(self._image)
            if len(self._given) == 1:
                self._supply.choice.failed(giver)
            if offset:
                raise PeerFailed("the bytes that came had the wrong digest")
            liars.add(giver.id)
            self._given.clear()
            self._digest, self._hashed = hashlib.sha256(), 0
            piece, giver = self._parts.ask(self._image, 0, self.size, self._look, without=liars)
        return piece

    def _is_right(self, offset: int, piece: bytes, giver: LiveMember) -> bool:
        """False when it is the last piece and the digest of all is wrong."""
        if not self._in_order or offset != self._hashed:
            self._in_order = False
            return True
        self._given[giver.id] = giver
        self._digest.update(piece)
        self._hashed += len(piece)
        return self._hashed < self.size or self._digest.hexdigest() == self._image.sha256

    def _look(self) -> None:
        if self._closed.is_set():
            raise Stopping("nobody wants it any more")
