"""The one way that bytes get in: a stream of blocks becomes an image and its final record.

Order: claim, record, bytes, fsync, rename, record `complete`. The claim, which the image store keeps, stays until the
record is final, so that the next start finds what a crash left even when nobody else remembers who owned it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import StrEnum

import structlog

from imgsvc.errors import Conflict, ImgsvcError, Incomplete, NoSpace, NotFound, Stopping, Unavailable, WrongDigest
from imgsvc.images.store import ImageWriter
from imgsvc.intake import Intake, Origin
from imgsvc.metadata.image import UNKNOWN_SIZE, Image
from imgsvc.metadata.store import MetadataStore
from imgsvc.room import Room
from imgsvc.settlements import Settlements

# Seconds between two reports of a transfer to its record, and between a first byte and the first of them.
REPORT_INTERVAL = 1.0
FIRST_REPORT = 0.25

log = structlog.get_logger()


class Kind(StrEnum):
    UPLOAD = "upload"
    FETCH = "fetch"


class Transfer:
    """One image on its way in, driven by one owner: a request or a fetch thread.

    The owner calls `feed`, and then `finish` (or its two steps), or at any point `abort` or `suspend`, one call at a
    time. `cancel` and `report` may be called by anybody at any time, and so may `abort` and `suspend` while it is
    `paused`. Every method may block.
    """

    def __init__(
        self,
        image: Image,
        kind: Kind,
        intake: Intake,
        *,
        records: MetadataStore,
        room: Room,
        settlements: Settlements,
        ended: Callable[[Transfer], None],
    ) -> None:
        self.image = image
        self.kind = kind
        self.cancelled: ImgsvcError | None = None
        self.paused = False
        self._intake = intake
        self._records = records
        self._room = room
        self._settlements = settlements
        self._call_ended = ended
        self._bytes = threading.Lock()
        self._record = threading.Lock()
        self._over = self._ended = False
        self._began = self._reported = time.monotonic()

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._intake.size

    @property
    def missing(self) -> int:
        """Bytes that were announced and are still to come; none of one that is paused, for they may never."""
        return 0 if self._over or self.paused else max(self.image.expected_size - self.size, 0)

    @property
    def over(self) -> bool:
        """No more bytes are taken: what there is to know of the image is in its record, now or soon."""
        return self._over

    def create(self) -> None:
        """Stores the record of a new image. After an error the transfer is over and leaves no record."""
        try:
            self.image = self._records.create(self.image)
        except ImgsvcError as error:
            self._end_intake(Intake.abort)
            self._settlements.discard(self.image.id)
            self._end("refused", error)
            raise

    def recover(self, look: Callable[[], None] = lambda: None) -> Origin | None:
        """Goes on behind the bytes that are there already, after hashing them anew. Returns the `origin` that the
        transfer was restarted with when it brought them, None when there are none. Raises what the transfer was
        cancelled with, Unavailable or NoSpace, and what `look` does, which is called now and then."""

        def look_twice() -> None:
            self._check_running()
            look()

        with self._bytes:
            self._check_running()
            return self._intake.recover(look_twice)

    def restart(self, origin: Origin | None) -> None:
        """Forgets the bytes so far: those that come now are others. With an `origin`, which says what they are, they
        can be gone on with after a stop or a crash. Raises as `recover` does."""
        with self._bytes:
            self._check_running()
            if origin is None:
                self._intake.restart()
            else:
                self._intake.begin(origin)

    def checkpoint(self) -> int:
        """Returns how many bytes will still be there if the process is killed now: all, but those that are held. Raises
        as `feed` does."""
        with self._bytes:
            self._check_running()
            return self._intake.checkpoint()

    def hold(self) -> None:
        """The bytes that come now are dropped by `go_back`, by `pause` and by a crash, unless there is a `release`
        before. Raises as `feed` does."""
        with self._bytes:
            self._check_running()
            self._intake.hold()

    def release(self) -> None:
        with self._bytes:
            self._intake.release()

    def go_back(self) -> None:
        """Drops what came since `hold`. Raises as `feed` does."""
        with self._bytes:
            self._check_running()
            self._intake.go_back()

    def pause(self) -> None:
        """Lets go of the file until `go_on`, with a checkpoint. What cannot be noted is dropped. Never raises."""
        with self._bytes:
            if not self._over:
                self._intake.pause()
                self.paused = True
        if self.cancelled is not None:
            self._end_for(self.cancelled)  # for who cancels one that is not paused leaves it to its owner

    def go_on(self, open_writer: Callable[[], ImageWriter]) -> None:
        """After `pause`, with a writer that keeps what is there. Raises as `feed` does."""
        with self._bytes:
            self._check_running()
            self._intake.go_on(open_writer())
            self.paused = False

    def start(self, expected_size: int) -> None:
        """The source has answered, and announced `expected_size` bytes in all or UNKNOWN_SIZE: the record says
        `downloading`, now or, when its store does not answer, with the first progress that it takes. Raises NotFound
        when it is gone, Conflict when somebody has ended it, NoSpace."""
        with self._record:
            started = self.image.started(expected_size, self.size)
            try:
                self.image = self._settlements.write(started)
            except Unavailable as error:
                log.info("start not recorded yet", image=self.image.id, reason=str(error))
                self.image = started

    def feed(self, block: bytes | bytearray | memoryview) -> None:
        """Takes the next bytes. Raises TooLarge, NoSpace, Incomplete (more than announced), Unavailable, or what
        the transfer was cancelled with; the owner then calls `abort`."""
        with self._bytes:
            self._check_running()
            size = self.size + len(block)
            expected = self.image.expected_size
            if expected != UNKNOWN_SIZE and size > expected:
                raise Incomplete(f"{expected} bytes were announced, and more were sent")
            self._room.check_size(size)
            self._room.check_space(len(block))
            self._intake.take(block)

    def finish(self) -> Image:
        """All bytes were fed: `commit`, and then `complete`."""
        self.commit()
        return self.complete()

    def commit(self) -> None:
        """Puts the image on the disk for good. Raises as `feed` does, Incomplete when bytes are missing, and
        WrongDigest when they are not those that were expected; the owner then calls `abort`, and else `complete`."""
        with self._bytes:
            self._check_running()
            expected = self.image.expected_size
            if expected != UNKNOWN_SIZE and self.size < expected:
                raise Incomplete(f"{expected} bytes were announced, and only {self.size} came")
            check_digest(self.image, self._intake.sha256)
            self._intake.commit()
            self._over = True

    @property
    def unsettled(self) -> bool:
        """Its record has yet to follow. Never blocks."""
        return self._settlements.waiting(self.image.id)

    def complete(self) -> Image:
        """Returns the committed image once its record says that it is complete.

        Raises Conflict when it was deleted meanwhile. After Unavailable or NoSpace the image is whole, its record
        follows as soon as it can, and this may be called again.
        """
        try:
            with self._record:
                self.image = self._settlements.complete(self.image, self.size, self._intake.sha256)
        except Conflict as error:
            self._end("error", error)
            raise
        except (Unavailable, NoSpace) as error:
            self._end("unsettled", error)
            kind = NoSpace if isinstance(error, NoSpace) else Unavailable
            raise kind(f"image {self.image.id} is whole here, and its record has yet to follow: {error}") from error
        except Exception as error:
            self._end("unsettled", error)
            raise
        self._end("complete")
        return self.image

    def abort(self, reason: ImgsvcError) -> None:
        """Gives up: no bytes are kept, and the record says why. Does nothing when the transfer is over.

        Never raises: what cannot be settled now is settled as soon as the metadata store answers.
        """
        if not self._end_intake(Intake.abort):
            return
        with self._record:
            self.image = self._settlements.fail(self.image, reason)
        self._end("error", reason)

    def suspend(self) -> None:
        """Stops for a shutdown and leaves the image claimed, a fetch pending, for the next start to go on with."""
        if not self._end_intake(Intake.close):
            return
        if self.kind is Kind.FETCH:
            self._requeue()
        self._end("stopped")

    def cancel(self, reason: ImgsvcError) -> None:
        """Tells the owner to give up: `feed` and `finish` raise `reason` from now on. An owner that waits for bytes
        looks at `cancelled` at least once a second; one whose transfer is paused may be away for days, and is not
        waited for: that one is suspended when the reason is Stopping, and else aborted."""
        if self.cancelled is None:
            self.cancelled = reason
        if self.paused:
            self._end_for(self.cancelled)

    def report(self) -> None:
        """Tells the record how far this came, the first bytes at once and then every REPORT_INTERVAL seconds; cancels
        the transfer when the record is gone. Raises Unavailable or NoSpace."""
        with self._record:
            if self._over or self.cancelled is not None or not self._report_due():
                return
            if self.paused and self.size == self.image.size:
                return  # there may be many for long, and deletions of them are told
            self._reported = time.monotonic()
            begun = self.image.download_start is not None and self.size != self.image.size
            end = _end_by_others(self._write_progress if begun else self._check_record)
        if end is not None:
            self.cancel(end)

    def check(self) -> None:
        """Cancels the transfer when its record is gone, or was ended by somebody else: for who may not have been told.
        Raises Unavailable."""
        with self._record:
            if self._over or self.cancelled is not None or self.image.revision == 0:
                return
            end = _end_by_others(self._check_record)
        if end is not None:
            self.cancel(end)

    def _write_progress(self) -> None:
        self.image = self._settlements.write(self.image.progressed(self.size))

    def _check_record(self) -> None:
        """Raises NotFound or Conflict when this is not what brings the image in any more."""
        stored = self._records.get(self.image.id)
        if stored.revision == self.image.revision:
            return
        if not stored.in_transfer or not self._records.may_own(stored.id):
            raise Conflict(f"image {stored.id} has changed since it was written here")

    def _end_for(self, reason: ImgsvcError) -> None:
        """A stop costs no bytes."""
        if isinstance(reason, Stopping):
            self.suspend()
        else:
            self.abort(reason)

    def _requeue(self) -> None:
        try:
            with self._record:
                self.image = self._settlements.write(self.image.requeued())
        except ImgsvcError as error:
            log.info("record left as it was", image=self.image.id, reason=str(error))

    def _report_due(self) -> bool:
        if self.image.revision == 0:
            return False  # its record is still being created, and one that is not there yet looks like a deleted one
        first = self.image.size == 0 and self.size > 0
        return time.monotonic() - self._reported >= (FIRST_REPORT if first else REPORT_INTERVAL)

    def _check_running(self) -> None:
        if self.cancelled is not None:
            raise self.cancelled
        if self._over:
            raise Stopping("the transfer is over")

    def _end_intake(self, end: Callable[[Intake], None]) -> bool:
        """False when it had ended before."""
        with self._bytes:
            if self._over:
                return False
            self._over = True
            end(self._intake)
            return True

    def _end(self, outcome: str, reason: Exception | None = None) -> None:
        """Leaves the list of running transfers, with the transfer's one line in the log."""
        if self._ended:
            return
        self._ended = True
        self._call_ended(self)
        seconds = max(time.monotonic() - self._began, 1e-3)
        log.info(
            "transfer",
            image=self.image.id,
            kind=self.kind.value,
            bytes=self.size,
            seconds=round(seconds, 3),
            mb_per_s=round(self.size / 1e6 / seconds, 1),
            outcome=outcome,
            reason="" if reason is None else str(reason),
        )


def _end_by_others(write_or_look: Callable[[], None]) -> Conflict | None:
    """What the transfer is to be cancelled with, by what its record says."""
    try:
        write_or_look()
    except NotFound:
        return Conflict("the image was deleted during its transfer")
    except Conflict:
        return Conflict("the image was ended by somebody else during its transfer")
    return None


def check_digest(image: Image, found: str) -> None:
    """Raises WrongDigest unless the image may have this SHA-256."""
    wanted = image.expected_sha256
    if wanted not in ("", found):
        raise WrongDigest(f"the bytes have the SHA-256 {found}, and were to have {wanted}")
