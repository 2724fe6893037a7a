"""Copies of images that this member is asked to make, or makes in place of damaged ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import structlog

from imgsvc.errors import ImgsvcError, NotComplete, Unavailable
from imgsvc.metadata.image import Image, Status
from imgsvc.throttle import Throttle

# Copies at once, and with those that wait.
_AT_ONCE = 4
_MOST = 64

log = structlog.get_logger()


class Copier(Protocol):
    def copy(self, image: Image, throttle: Throttle | None = None) -> None:
        """Returns when this member holds the image, on record; raises an ImgsvcError when it does not."""


class Copies:
    """One for an image, however many ask."""

    def __init__(self, copier: Copier, get: Callable[[str], Image], held: Callable[[str], bool]) -> None:
        """`get` reads a record, `held` says whether this member has the image's bytes, on record; both may block, and
        raise what a store does."""
        self._copier = copier
        self._get = get
        self._held = held
        self._lock = threading.Lock()
        self._running: dict[str, Future[None]] = {}
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="copies")

    def begin(self, image_id: str) -> Future[None]:
        """Has the image copied, and returns what becomes of it. Never blocks. Raises Unavailable when too many wait."""
        with self._lock:
            if image_id in self._running:
                return self._running[image_id]
            if len(self._running) >= _MOST:
                raise Unavailable("too many images wait to be copied")
            try:
                copy = self._running[image_id] = self._threads.submit(self._copy, image_id)
            except RuntimeError as error:
                raise Unavailable("the service is stopping") from error
        copy.add_done_callback(lambda _: self._ended(image_id, copy))
        return copy

    def mend(self, image_id: str) -> None:
        """Has an image that was set aside here copied from another member, if one has it. Never blocks or raises."""
        try:
            self.begin(image_id).add_done_callback(lambda copy: _say(image_id, copy))
        except Unavailable as error:
            log.warning("image not mended", image=image_id, reason=str(error))

    def close(self) -> None:
        """Returns when those under way have ended: who makes them ends them before."""
        self._threads.shutdown(cancel_futures=True)

    def _copy(self, image_id: str) -> None:
        image = self._get(image_id)
        if image.status is not Status.COMPLETE:
            raise NotComplete(f"image {image_id} is not complete")
        if not self._held(image_id):
            self._copier.copy(image)

    def _ended(self, image_id: str, copy: Future[None]) -> None:
        with self._lock:
            if self._running.get(image_id) is copy:
                del self._running[image_id]


def _say(image_id: str, copy: Future[None]) -> None:
    if copy.cancelled():
        return
    match copy.exception():
        case None:
            log.info("image mended", image=image_id)
        case ImgsvcError() as error:
            log.warning("image not mended", image=image_id, reason=str(error))
        case error:
            log.error("image not mended", image=image_id, exc_info=error)
