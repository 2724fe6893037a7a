"""Gives a digest to images that came without one: those of the Go program."""

from __future__ import annotations

import dataclasses
import hashlib
import queue
import threading

import structlog

from imgsvc.blocks import BLOCK
from imgsvc.errors import ImgsvcError, Incomplete, Unavailable
from imgsvc.images.store import ImageStore
from imgsvc.metadata.image import Status
from imgsvc.metadata.store import MetadataStore

# Seconds before an image is tried again whose store did not answer.
_RETRY_INTERVAL = 5.0

log = structlog.get_logger()


class Digests:
    """One thread that reads one image at a time. What it has not done by the end of the process, the next start
    submits again."""

    def __init__(self, images: ImageStore, records: MetadataStore) -> None:
        self._images = images
        self._records = records
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="digests", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, image_id: str) -> None:
        """Has the digest of a complete image, held here, computed and recorded. Returns at once."""
        self._queue.put(image_id)

    def close(self) -> None:
        self._closing.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while (image_id := self._queue.get()) is not None and not self._closing.is_set():
            try:
                self._record(image_id, self._compute(image_id))
            except Unavailable as error:
                log.warning("digest waits", image=image_id, reason=str(error))
                self._queue.put(image_id)
                self._closing.wait(_RETRY_INTERVAL)
            except ImgsvcError as error:
                log.info("digest not recorded", image=image_id, reason=str(error))

    def _compute(self, image_id: str) -> str:
        reader = self._images.open(image_id)
        try:
            digest = hashlib.sha256()
            offset = 0
            while block := reader.read(offset, BLOCK):
                if self._closing.is_set():
                    raise Incomplete("the service is stopping")
                digest.update(block)
                offset += len(block)
        finally:
            reader.close()
        return digest.hexdigest()

    def _record(self, image_id: str, sha256: str) -> None:
        image = self._records.get(image_id)
        if image.status is Status.COMPLETE and not image.sha256:
            self._records.update(dataclasses.replace(image, sha256=sha256))
            log.info("digest recorded", image=image_id, sha256=sha256)
