"""How far the records of a cluster had come, kept with the images: a store of records that was restored from a backup
has lost what came since, and none of that was deleted."""

from __future__ import annotations

import threading

import structlog

from imgsvc.errors import ImgsvcError
from imgsvc.images.store import ImageStore
from imgsvc.metadata.store import MetadataStore

# Seconds between two notes, each of which is a sync of the disk.
_INTERVAL = 30.0
# Seconds that a stop waits for the last one.
_PATIENCE = 5.0

log = structlog.get_logger()


class History:
    """One thread, which notes how far the records have come when that has changed."""

    def __init__(self, images: ImageStore, records: MetadataStore) -> None:
        self._images = images
        self._records = records
        self._noted = ""
        self._closing = threading.Event()
        # A daemon, as the disk may hang.
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)

    def _run(self) -> None:
        self._note()
        while not self._closing.wait(_INTERVAL):
            self._note()
        self._note()

    def _note(self) -> None:
        try:
            position = self._records.mark(self._noted)
            if position != self._noted:
                self._images.remember("records", position)
                self._noted = position
        except ImgsvcError as error:
            log.info("it is not noted how far the records have come", reason=str(error))
        except Exception:  # the next note may do
            log.exception("it is not noted how far the records have come")
