"""Fetches pending images from their sources, in a bounded number of threads."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from imgsvc.errors import Conflict, FetchFailed, ImgsvcError, Invalid, NotFound, Stopping, Unavailable
from imgsvc.fetch import Fetch
from imgsvc.images.store import ImageStore
from imgsvc.metadata.image import Image, Status
from imgsvc.metadata.store import MetadataStore
from imgsvc.settings import FetchSettings
from imgsvc.settlements import Settlements
from imgsvc.throttle import Throttle
from imgsvc.transfers import Transfers
from imgsvc.turns import Turns

# Seconds between two questions to a metadata store that does not answer.
_RETRY_INTERVAL = 1.0
# Seconds after which it is noticed that a fetch that waits was cancelled.
_LOOK = 0.25

log = structlog.get_logger()


class Fetcher:
    """Images wait as pending for one of `settings.concurrency` threads, first come, first served. A fetch whose source
    broke off waits without one."""

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
        self._throttle = Throttle(settings.max_bytes_per_second)
        self._turns: Turns[_Turn] = Turns()
        self._running: set[Fetch] = set()
        # Ids of images whose first turn is to come, and whose transfer is about to begin.
        self._waiting: set[str] = set()
        self._beginning: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._closing = threading.Event()
        self._disk = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="fetch-disk")
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            for number in range(settings.concurrency)
        ]
        # The others may all be busy, for hours.
        self._threads.append(threading.Thread(target=self._end_cancelled, name="fetch-ends", daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, image_id: str) -> None:
        """Has a claimed, pending image fetched, unless it waits for that already. Returns at once."""
        with self._lock:
            if image_id in self._waiting:
                return
            self._waiting.add(image_id)
        self._turns.put(_Turn(image_id))

    def is_waiting(self, image_id: str) -> bool:
        """Whether it was submitted, and its transfer has not begun yet."""
        with self._lock:
            return image_id in self._waiting or image_id in self._beginning

    def take(self, image: Image) -> Image:
        """Makes an image, which is given as it shall be, pending, one that is fetched here, and submits it. Raises
        Conflict or NotFound when its record is no longer as it was, Invalid when it is one that cannot be written; then
        nothing is left of that. After Unavailable or NoSpace of the records it is tried again."""
        self._images.claim(image.id)
        return self._settlements.settle(image.id, lambda: self._take_claimed(image))

    def close(self) -> None:
        """Stops the fetches and returns when they have; they and those that wait are left for the next start."""
        with self._lock:
            self._stopping = True
            running = list(self._running)
        for fetch in running:
            fetch.transfer.cancel(Stopping("the service is stopping"))
        waiting = self._turns.close()
        self._closing.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        for turn in waiting:
            if turn.fetch is not None:
                turn.fetch.transfer.suspend()
        self._disk.shutdown()

    def _take_claimed(self, image: Image) -> Image:
        try:
            image = self._records.update(image)
        except (NotFound, Conflict, Invalid):
            self._images.unclaim(image.id)
            raise
        self.submit(image.id)
        return image

    def _work(self) -> None:
        while (turn := self._turns.get()) is not None:
            with structlog.contextvars.bound_contextvars(image=turn.image_id):
                try:
                    self._take(turn)
                except Exception:  # a thread that dies would leave every later image pending
                    log.exception("fetch failed unexpectedly")

    def _end_cancelled(self) -> None:
        """Ends those that wait for their source, and were cancelled."""
        while not self._closing.wait(_LOOK):
            for turn in self._turns.hurried():
                if turn.fetch is not None and turn.fetch.transfer.cancelled is not None:
                    with structlog.contextvars.bound_contextvars(image=turn.image_id):
                        self._end(turn.fetch, turn.fetch.transfer.cancelled)

    def _end(self, fetch: Fetch, reason: ImgsvcError) -> None:
        try:
            fetch.transfer.cancel(reason)  # which knows what becomes of one that is paused
        except Exception:  # the others are to be ended all the same
            log.exception("fetch not ended")

    def _take(self, turn: _Turn) -> None:
        fetch = turn.fetch or self._begin(turn)
        if fetch is None:
            return
        with self._lock:
            self._running.add(fetch)
            if self._stopping:
                fetch.transfer.cancel(Stopping("the service is stopping"))
        try:
            wait = fetch.go_on()
        except Stopping:
            fetch.transfer.suspend()
        except ImgsvcError as error:
            fetch.transfer.abort(error)
        except BaseException:
            fetch.transfer.abort(FetchFailed("the fetch failed for a reason of our own, which is in the log"))
            raise
        else:
            if wait is not None:
                self._put_off(_Turn(turn.image_id, fetch), wait)
        finally:
            with self._lock:
                self._running.discard(fetch)

    def _begin(self, turn: _Turn) -> Fetch | None:
        """None when there is nothing to fetch, or not yet."""
        with self._lock:
            self._waiting.discard(turn.image_id)
            self._beginning.add(turn.image_id)
        try:
            return self._begun(turn)
        finally:
            with self._lock:
                self._beginning.discard(turn.image_id)

    def _begun(self, turn: _Turn) -> Fetch | None:
        image = self._record(turn)
        if image is None:
            return None
        try:
            transfer = self._transfers.fetch(image)
        except ImgsvcError as error:
            self._settlements.fail(image, error)
            return None
        return Fetch(
            transfer,
            self._transfers,
            self._settings,
            throttle=self._throttle,
            disk=self._disk,
            reopen=functools.partial(self._images.writer, image.id, keep=True),
        )

    def _record(self, turn: _Turn) -> Image | None:
        """The record, now that its turn has come; None when the image need not be fetched any more, or not here."""
        try:
            image = self._records.get(turn.image_id)
            if image.status is Status.PENDING and self._records.may_own(image.id):
                return image
            log.info("fetch left to others", image=image.id, status=image.status.value)
        except NotFound:
            pass
        except Unavailable as error:
            # Behind the others: it may be this record alone that cannot be read.
            log.warning("fetch waits for the metadata store", reason=str(error))
            with self._lock:
                self._waiting.add(turn.image_id)
            self._turns.put(turn, _RETRY_INTERVAL)
            return None
        if not self._transfers.is_known(turn.image_id):
            self._images.unclaim(turn.image_id)
        return None

    def _put_off(self, turn: _Turn, seconds: float) -> None:
        with self._lock:
            if not self._stopping:
                self._turns.put(turn, seconds)
                return
        if turn.fetch is not None:
            turn.fetch.transfer.suspend()


@dataclass(frozen=True, slots=True)
class _Turn:
    """An image whose fetch is to begin, or the `fetch` that is to go on."""

    image_id: str
    fetch: Fetch | None = None

    @property
    def in_a_hurry(self) -> bool:
        """Somebody has cancelled it."""
        return self.fetch is not None and self.fetch.transfer.cancelled is not None
