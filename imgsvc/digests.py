"""Reads whole images in the background: those that came without a digest get one, and those of which only the size
speaks for them are held against the digest that their record has."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable

import structlog

from imgsvc.errors import Conflict, ImgsvcError, NotFound, Stopping, Unavailable, Unreadable
from imgsvc.images.store import ImageReader, ImageStore, is_stored
from imgsvc.metadata.image import DAMAGED, Image, Status
from imgsvc.metadata.store import MetadataStore, let_go
from imgsvc.settlements import note_copy
from imgsvc.whole import digest_of

# Seconds before a metadata store that did not answer is asked again.
_RETRY_INTERVAL = 5.0
# How often it is asked with one digest in hand: a minute's worth.
_TRIES = 12
# Seconds before a disk that did not give an image is asked once more.
_READ_AGAIN = 1.0

log = structlog.get_logger()


class Digests:
    """One thread that reads one image at a time. What it has not done by the end of the process, the next start
    submits again."""

    def __init__(self, images: ImageStore, records: MetadataStore) -> None:
        self._images = images
        self._records = records
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._waiting: set[str] = set()
        self._doubted: set[str] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="digests", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, image_id: str, *, doubted: bool = False) -> None:
        """Has a complete image that is stored here read. Returns at once.

        A `doubted` one is not on record as held here: it is to be served only when its digest has been found right,
        and is set aside when it is wrong.
        """
        with self._lock:
            if doubted:
                self._doubted.add(image_id)
            if image_id in self._waiting:
                return
            self._waiting.add(image_id)
        self._queue.put(image_id)

    def doubts(self, image_id: str) -> bool:
        """Whether the bytes that were here when the image was submitted are still to be held against its digest."""
        with self._lock:
            return image_id in self._doubted

    def close(self) -> None:
        self._closing.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while (image_id := self._queue.get()) is not None and not self._closing.is_set():
            try:
                done = self._settle(image_id)
            except Exception:  # a thread that dies would leave every later image without
                log.exception("digest failed unexpectedly", image=image_id)
                done = True
            if done:
                with self._lock:
                    self._waiting.discard(image_id)
                    # What was not found right has no note, and is not served for that. A doubt that stays would be
                    # about other bytes when the image is brought here again.
                    self._doubted.discard(image_id)
            else:
                self._queue.put(image_id)
                self._closing.wait(_RETRY_INTERVAL)

    def _settle(self, image_id: str) -> bool:
        """False when the metadata store has to be asked again. An image that cannot be read is left to the next
        start: reading it again and again would not mend the disk."""
        try:
            image = self._records.get(image_id)
            if image.status is Status.COMPLETE and (self.doubts(image_id) or not image.sha256):
                self._read(image)
        except Unavailable as error:
            log.warning("digest waits", image=image_id, reason=str(error))
            return False
        except ImgsvcError as error:
            log.info("digest not recorded", image=image_id, reason=str(error))
        return True

    def _read(self, image: Image) -> None:
        try:
            reader = self._images.open(image.id)
        except NotFound:
            # Whatever comes in its place is not what was doubted.
            with self._lock:
                self._doubted.discard(image.id)
            return
        except Unavailable as error:
            log.error("image cannot be read", image=image.id, reason=str(error))
            return
        with contextlib.closing(reader):
            try:
                sha256 = self._digest(image, reader)
            except ImgsvcError as error:
                if not self._closing.is_set():
                    log.error("image cannot be read", image=image.id, reason=str(error))
                if isinstance(error, Unreadable) and self.doubts(image.id):
                    self._make_way(image, reader)
                return
            self._insist(image, lambda: self._judge(image, sha256, reader))

    def _digest(self, image: Image, reader: ImageReader) -> str:
        try:
            return digest_of(reader, self._go_on)
        except Unreadable as error:
            log.warning("image is read again", image=image.id, reason=str(error))
        self._closing.wait(_READ_AGAIN)
        return digest_of(reader, self._go_on)

    def _make_way(self, image: Image, reader: ImageReader) -> None:
        """Bytes that nobody vouches for, and nobody will: a good copy could not come in their place. Unless it is the
        disk, which may be back with all of them."""
        try:
            self._images.ping()
            self._images.quarantine(image.id, reader)
        except ImgsvcError as error:
            log.warning("image that cannot be read stays", image=image.id, reason=str(error))
        else:
            log.error("image set aside here: it cannot be read", image=image.id)

    def _go_on(self, _count: int) -> None:
        if self._closing.is_set():
            raise Stopping("the service is stopping")

    def _insist(self, image: Image, step: Callable[[], None]) -> None:
        """For a while: to read an image takes long. Others have their turn then, in case it is this record's fault."""
        for _ in range(_TRIES - 1):
            try:
                return step()
            except Unavailable as error:
                log.warning("digest waits", image=image.id, reason=str(error))
                self._closing.wait(_RETRY_INTERVAL)
                self._go_on(0)
        return step()

    def _judge(self, read: Image, sha256: str, reader: ImageReader) -> None:
        """Of the bytes that `reader` has open, by the record as it is now: while they were read the image may have
        been damaged elsewhere, and fetched again with other bytes, even here."""
        image = self._records.get(read.id)
        if not image.sha256:
            try:
                image = self._records.update(dataclasses.replace(read, sha256=sha256))
                log.info("digest recorded", image=image.id, sha256=sha256)
            except Conflict:
                # Another member that holds it was quicker.
                image = self._records.get(image.id)
        if image.status is not Status.COMPLETE:
            return
        if image.sha256 == sha256:
            note_copy(self._records, self._images, image)
        else:
            self._set_aside(image, sha256, reader)

    def _set_aside(self, image: Image, sha256: str, reader: ImageReader) -> None:
        """Raises Conflict when the bytes that are here by now are others."""
        log.error("image set aside here: its digest is wrong", image=image.id, sha256=sha256, wanted=image.sha256)
        released = let_go(self._records, image.id, self._images.member)
        try:
            self._images.quarantine(image.id, reader)
        except Conflict:
            if released and self._images.member in (image.replicas or ()):  # it is the note of the other bytes
                note_copy(self._records, self._images, image)
            raise
        except NotFound:
            pass  # done before, when the record could not be written
        # One that nobody is on record as holding stays complete: a member that has yet to start may have its bytes.
        if image.replicas != ():
            reason = f"{DAMAGED}its sha256 is {sha256}, and should be {image.sha256}; its bytes are in quarantine"
            self._records.lose_copy(image.progressed(0).failed(reason), lambda: not is_stored(self._images, image.id))
