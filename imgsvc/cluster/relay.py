"""An image on its way through this member, which keeps nothing of it: for when there is no room for a copy."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import structlog

from imgsvc.cluster.supply import Supply
from imgsvc.errors import ImgsvcError, PeerFailed, Stopping, Unavailable
from imgsvc.metadata.image import Image
from imgsvc.metadata.mirror import LiveMember

log = structlog.get_logger()

# Bytes that are asked for at a time, and that wait in memory for each client.
_PART = 256 * 1024


class Relay:
    """An ImageReader. What a client is about to take is fetched by a thread of `threads`, part by part, so that one
    that is slow holds nothing but a part.

    Who reads from the first byte to the last has the digest found right before the last part; `before` is the digest of
    what was read elsewhere until `offset`. Parts in another order are only known to be of the right version.
    """

    def __init__(
        self,
        image: Image,
        supply: Supply,
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
        self._threads = threads
        self._ended = ended
        self._digest = hashlib.sha256() if before is None else before.copy()
        self._hashed = offset
        self._in_order = bool(image.sha256) and (not offset or before is not None)
        self._given: dict[str, LiveMember] = {}
        # The first byte of the part, and the part.
        self._part = (0, b"")
        self._error: ImgsvcError | None = None
        self._closed = threading.Event()

    def refuse(self, error: ImgsvcError) -> None:
        """It gives no byte."""
        self._error = error

    def arrived(self, offset: int) -> int:
        if self._error is not None:
            raise self._error
        first, part = self._part
        return first + len(part) - offset if first <= offset < first + len(part) else 0

    def wait(self, offset: int, length: int, wake: Callable[[], None]) -> None:
        if self._error is not None:
            wake()
            return
        try:
            self._threads.submit(self._fetch, offset, min(length, _PART, self.size - offset), wake)
        except RuntimeError:
            self._error = Stopping("the service is stopping")
            wake()

    def read(self, offset: int, length: int) -> bytes:
        count = min(self.arrived(offset), length)
        first, part = self._part
        return part[offset - first : offset - first + count]

    def send(self, descriptor: int, offset: int, length: int) -> int:
        try:
            return os.write(descriptor, self.read(offset, length))
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self._closed.set()
        self._part = (0, b"")
        self._ended(self)

    def _fetch(self, offset: int, length: int, wake: Callable[[], None]) -> None:
        try:
            self._part = (0, b"")
            part = self._right(offset, length)
            self._part = (offset, part)
        except ImgsvcError as error:
            self._error = error
        except Exception:
            log.exception("bytes not passed on", image=self._image.id)
            self._error = Unavailable("the bytes could not be passed on, for a reason of our own, which is in the log")
        finally:
            wake()

    def _right(self, offset: int, length: int) -> bytes:
        """The part, found right if it is the last of all."""
        liars: set[str] = set()
        while True:
            part, giver = self._from_anybody(offset, length, liars)
            if self._is_right(offset, part, giver):
                return part
            self._supply.accuse(self._given.values(), self._image)
            if offset:
                raise PeerFailed("the bytes that came had the wrong digest")
            liars.add(giver.id)
            self._given.clear()
            self._digest, self._hashed = hashlib.sha256(), 0

    def _from_anybody(self, offset: int, length: int, without: set[str]) -> tuple[bytes, LiveMember]:
        tried = set(without)
        trouble = "no other is live, or known to have the right bytes"
        while (member := self._supply.choice.best(self._image, tried)) is not None:
            try:
                return self._supply.part(self._image, member, offset, length, self._look), member
            except PeerFailed as error:
                trouble = f"{member.id}: {error}"
                tried.add(member.id)
        raise self._supply.nobody(self._image, trouble)

    def _is_right(self, offset: int, part: bytes, giver: LiveMember) -> bool:
        """False when it is the last part and the digest of all is wrong."""
        if not self._in_order or offset != self._hashed:
            self._in_order = False
            return True
        self._given[giver.id] = giver
        self._digest.update(part)
        self._hashed += len(part)
        return self._hashed < self.size or self._digest.hexdigest() == self._image.sha256

    def _look(self) -> None:
        if self._closed.is_set():
            raise Stopping("nobody wants it any more")
