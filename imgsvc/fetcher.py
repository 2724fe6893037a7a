"""Fetches pending images from their sources, in a bounded number of threads."""

from __future__ import annotations

import queue
import threading

import structlog

from imgsvc.blocks import Blocks
from imgsvc.errors import FetchFailed, ImgsvcError, NotFound, Stopping, Unavailable
from imgsvc.images.store import ImageStore
from imgsvc.metadata.image import Image, Status
from imgsvc.metadata.store import MetadataStore
from imgsvc.settings import FetchSettings
from imgsvc.settlements import Settlements
from imgsvc.source import Source
from imgsvc.transfer import Transfer
from imgsvc.transfers import Transfers

# Seconds between two questions to a metadata store that does not answer.
_RETRY_INTERVAL = 1.0

log = structlog.get_logger()


class Fetcher:
    """Images wait as pending for one of `settings.concurrency` threads, first come, first served."""

    def __init__(
        self,
        settings: FetchSettings,
        images: ImageStore,
        records: MetadataStore,
        transfers: Transfers,
        settlements: Settlements,
    ) -> None:
        self._settings = settings
        self._images = images
        self._records = records
        self._transfers = transfers
        self._settlements = settlements
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._running: set[Transfer] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            for number in range(settings.concurrency)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, image_id: str) -> None:
        """Has a claimed, pending image fetched. Returns at once."""
        self._queue.put(image_id)

    def close(self) -> None:
        """Stops the running fetches and returns when they have; they and those that wait are left for the next
        start."""
        with self._lock:
            self._stopping.set()
            running = list(self._running)
        for transfer in running:
            transfer.cancel(Stopping("the service is stopping"))
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _work(self) -> None:
        while (image_id := self._queue.get()) is not None and not self._stopping.is_set():
            with structlog.contextvars.bound_contextvars(image=image_id):
                try:
                    if (image := self._record(image_id)) is not None:
                        self._fetch(image)
                except Exception:  # a thread that dies would leave every later image pending
                    log.exception("fetch failed unexpectedly")

    def _fetch(self, image: Image) -> None:
        try:
            transfer = self._transfers.fetch(image)
        except ImgsvcError as error:
            self._settlements.fail(image, error)
            return
        with self._lock:
            self._running.add(transfer)
            if self._stopping.is_set():
                transfer.cancel(Stopping("the service is stopping"))
        try:
            self._read(image.source, transfer)
        except Stopping:
            transfer.suspend()
        except ImgsvcError as error:
            transfer.abort(error)
        except BaseException:
            transfer.abort(FetchFailed("the fetch failed for a reason of our own, which is in the log"))
            raise
        finally:
            with self._lock:
                self._running.discard(transfer)

    def _record(self, image_id: str) -> Image | None:
        """The record, now that its turn has come; None when the image need not be fetched any more."""
        try:
            image = self._records.get(image_id)
        except NotFound:
            self._images.unclaim(image_id)
            return None
        except Unavailable as error:
            # To the end of the queue: it may be this record alone that cannot be read.
            log.warning("fetch waits for the metadata store", reason=str(error))
            self._queue.put(image_id)
            self._stopping.wait(_RETRY_INTERVAL)
            return None
        return image if image.status is Status.PENDING else None

    def _read(self, url: str, transfer: Transfer) -> None:
        intake = _Intake(self._transfers, transfer)
        Source(url, self._settings, intake).read()
        intake.flush()
        transfer.finish()


class _Intake:
    """Hands what a source delivers to the transfer, in blocks."""

    def __init__(self, transfers: Transfers, transfer: Transfer) -> None:
        self._transfers = transfers
        self._transfer = transfer
        self._blocks = Blocks()

    def begin(self, expected_size: int) -> None:
        self._transfers.admit(expected_size)
        self._transfer.start(expected_size)

    def piece(self, data: bytes) -> None:
        self._blocks.add(data)
        if self._blocks.due():
            self._transfer.feed(self._blocks.take())

    def tick(self) -> None:
        if self._transfer.cancelled is not None:
            raise self._transfer.cancelled
        if self._blocks.due():
            self._transfer.feed(self._blocks.take())

    def flush(self) -> None:
        while block := self._blocks.take():
            self._transfer.feed(block)
