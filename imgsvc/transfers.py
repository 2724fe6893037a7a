"""All transfers of this member: how they begin, the thread that keeps their records true, how they are cancelled."""

from __future__ import annotations

import threading
from concurrent.futures import Executor

import structlog

from imgsvc.errors import ImgsvcError, NoSpace, Unavailable
from imgsvc.images.store import ImageStore
from imgsvc.intake import Intake
from imgsvc.metadata.image import Image, ImageType, new_id
from imgsvc.metadata.store import MetadataStore
from imgsvc.room import Room
from imgsvc.settlements import Settlements
from imgsvc.transfer import FIRST_REPORT, Kind, Transfer

log = structlog.get_logger()


class Transfers:
    """Every method may be called from any thread, and may block. Digests are computed by `hashers`."""

    def __init__(
        self, images: ImageStore, records: MetadataStore, room: Room, settlements: Settlements, *, hashers: Executor
    ) -> None:
        self._images = images
        self._records = records
        self._room = room
        self._settlements = settlements
        self._hashers = hashers
        self._running: dict[str, Transfer] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep_records_true, name="transfers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Tries once more to settle what waits."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._settlements.retry()

    def upload(self, image_type: ImageType, comment: str, expected_size: int, expected_sha256: str = "") -> Transfer:
        """Begins an upload of `expected_size` bytes, or UNKNOWN_SIZE, that must have the digest `expected_sha256`
        unless that is "". Raises TooLarge, NoSpace or Unavailable; then nothing is left of it."""
        self.admit(expected_size)
        image = Image(id=new_id(), type=image_type, comment=comment, expected_sha256=expected_sha256)
        image = image.started(expected_size)
        transfer = self._begin(image, Kind.UPLOAD, keep=False)
        transfer.create()
        return transfer

    def fetch(self, image: Image) -> Transfer:
        """Begins the fetch of a claimed, pending image, whose owner may `recover` what an earlier fetch left. Raises
        NoSpace or Unavailable."""
        self._images.delete(image.id)  # an image in error may have bytes, which the Go program left
        return self._begin(image, Kind.FETCH, keep=True)

    def resume(self, image: Image) -> Transfer:
        """Takes an upload over from an earlier run: it is paused, and its owner may `recover` what there is. Raises
        NoSpace or Unavailable."""
        transfer = self._begin(image, Kind.UPLOAD, keep=True)
        transfer.pause()
        return transfer

    def admit(self, expected_size: int, transfer: Transfer | None = None) -> None:
        """Raises TooLarge or NoSpace when as many bytes, less those that the transfer has, cannot come in beside what
        was announced to the others that are running and not paused."""
        self._room.check_size(expected_size)
        missing = expected_size - (0 if transfer is None else transfer.size)
        others = self.announced - (0 if transfer is None else transfer.missing)
        self._room.check_space(max(missing, 0) + others)

    @property
    def announced(self) -> int:
        """Bytes that are still to come in all transfers that are running and not paused."""
        with self._lock:
            return sum(transfer.missing for transfer in self._running.values())

    def check_size(self, size: int) -> None:
        """Raises TooLarge when no image may have so many bytes."""
        self._room.check_size(size)

    def is_known(self, image_id: str) -> bool:
        """Whether this process is transferring the image, or has yet to settle it."""
        with self._lock:
            running = image_id in self._running
        return running or self._settlements.waiting(image_id)

    def revisions(self) -> list[tuple[str, int]]:
        """The images that this process is transferring, each with the revision that it last wrote of the record."""
        with self._lock:
            running = list(self._running.values())
        return [(transfer.image.id, transfer.image.revision) for transfer in running if not transfer.over]

    def cancel(self, image_id: str, reason: ImgsvcError) -> None:
        """As `Transfer.cancel`, if the image's transfer is running here."""
        with self._lock:
            transfer = self._running.get(image_id)
        if transfer is not None:
            transfer.cancel(reason)

    def reconcile(self) -> None:
        """Cancels what is paused, and was deleted or ended by somebody else while deletions could not be followed; the
        others find out by themselves. Raises Unavailable."""
        with self._lock:
            running = list(self._running.values())
        for transfer in running:
            if transfer.paused:
                transfer.check()

    def _begin(self, image: Image, kind: Kind, *, keep: bool) -> Transfer:
        transfer = Transfer(
            image,
            kind,
            Intake(self._images.writer(image.id, keep=keep), self._hashers),
            records=self._records,
            room=self._room,
            settlements=self._settlements,
            ended=self._forget,
        )
        with self._lock:
            self._running[image.id] = transfer
        return transfer

    def _forget(self, transfer: Transfer) -> None:
        with self._lock:
            self._running.pop(transfer.image.id, None)

    def _keep_records_true(self) -> None:
        while not self._closing.wait(FIRST_REPORT):
            with self._lock:
                running = list(self._running.values())
            try:
                self._settlements.retry()
                for transfer in running:
                    transfer.report()
            except (Unavailable, NoSpace) as error:
                # The bytes still come in; the record catches up when the store answers again.
                log.debug("progress not recorded", reason=str(error))
            except Exception:  # without this thread no record would follow any more
                log.exception("records not kept true")
