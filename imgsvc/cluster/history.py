"""How far the records of a cluster had come, kept with the images: a store of records that was restored from a backup
has lost what came since, and none of that was deleted."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from imgsvc.errors import ImgsvcError
from imgsvc.images.store import ImageStore

# Seconds between two notes, each of which is a sync of the disk.
_INTERVAL = 30.0

log = structlog.get_logger()


class History:
    """One thread, which notes `position()` when it has changed."""

    def __init__(self, images: ImageStore, position: Callable[[], str]) -> None:
        """`position` does not block; "" is one that is not known."""
        self._images = images
        self._position = position
        self._noted = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        self._note()
        while not self._closing.wait(_INTERVAL):
            self._note()
        self._note()

    def _note(self) -> None:
        position = self._position()
        if position in ("", self._noted):
            return
        try:
            self._images.remember("records", position)
        except ImgsvcError as error:
            log.warning("it is not noted how far the records have come", reason=str(error))
        except Exception:  # the next note may do
            log.exception("it is not noted how far the records have come")
        else:
            self._noted = position
