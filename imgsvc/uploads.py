"""The uploads of this member that may be interrupted: by their client, by the network, or by our own end.

Their bytes come through requests, which `resumable.py` puts one behind the other. Here is which uploads there are, what
becomes of those that an earlier run left, and of those that nobody goes on with.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import structlog

from imgsvc.errors import (
    Conflict,
    Gone,
    ImgsvcError,
    Incomplete,
    NoSpace,
    NotFound,
    Stopping,
    TooLarge,
    Unavailable,
    Unreadable,
    WrongDigest,
)
from imgsvc.images.store import ImageStore
from imgsvc.intake import Origin, look_back
from imgsvc.metadata.image import UNKNOWN_SIZE, Image, ImageType, Status, is_id
from imgsvc.metadata.store import MetadataStore
from imgsvc.resumable import Checksum, Progress, Resumable
from imgsvc.settlements import Settlements
from imgsvc.transfer import Transfer, check_digest
from imgsvc.transfers import Transfers
from imgsvc.whole import digest_of

# Seconds between two looks at what has expired.
_INTERVAL = 0.5
# Seconds before a store that did not answer is asked again.
_RETRY_INTERVAL = 2.0
# The part of the time until an upload expires after which other members are told of new bytes.
_TOLD_PART = 0.1
# What the notes of such an upload say of its bytes; those of fetches say something else.
_KIND = "resumable upload"

log = structlog.get_logger()


class Incoming(Protocol):
    """The bytes of one request: what `resumable.Request` promises."""

    @property
    def cancelled(self) -> ImgsvcError | None: ...

    def feed(self, block: bytes | bytearray | memoryview) -> None: ...

    def commit(self) -> None: ...

    def complete(self) -> Progress: ...

    @property
    def unsettled(self) -> bool: ...

    def abort(self, reason: ImgsvcError) -> None: ...


class Uploads:
    """Every method may be called from any thread, and may block. An upload has the id of its image.

    One that nobody knows raises NotFound; one that has failed or expired, Gone, which says why; one that somebody else
    knows, or that is not to be told about yet, Unavailable.
    """

    def __init__(
        self,
        images: ImageStore,
        records: MetadataStore,
        transfers: Transfers,
        settlements: Settlements,
        *,
        expire: float,
    ) -> None:
        """`expire` is in seconds."""
        self._images = images
        self._records = records
        self._transfers = transfers
        self._settlements = settlements
        self._expire = expire
        self._uploads: dict[str, Resumable] = {}
        # Images whose bytes are all here, and whose records are still to say so.
        self._whole: set[str] = set()
        self._to_verify: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Leaves all uploads, which no request may bring on any more, for the next start to go on with."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        for upload in self._all():
            upload.transfer.suspend()

    def create(self, image_type: ImageType, comment: str, length: int, expected_sha256: str, metadata: str) -> Progress:
        """A new upload of so many bytes, which with none is complete. Raises TooLarge, NoSpace, or Conflict when others
        have ended it at once; then nothing is left of it."""
        transfer = self._transfers.upload(image_type, comment, length, expected_sha256)
        try:
            transfer.restart({"kind": _KIND, "metadata": metadata})
            if length == 0:
                return Progress(transfer.finish(), 0, 0, metadata)
            touched = time.time()
            self._tell_others(transfer, touched)  # or it could be ended by them before its client is told of it
        except ImgsvcError as error:
            transfer.abort(error)
            raise
        transfer.pause()
        upload = self._add(transfer, metadata, touched)
        upload.told = touched
        return upload.look()

    def look(self, image_id: str) -> Progress:
        """One that has all its bytes is complete when this returns. Raises Locked, NoSpace; WrongDigest, and then it has
        failed."""
        upload = self._known(image_id)
        return self._recorded(image_id) if upload is None else upload.look()

    def go_on(self, image_id: str, offset: int, length: int, checksum: Checksum | None = None) -> Incoming:
        """A request that brings `length` bytes, or UNKNOWN_SIZE, from `offset` on. Raises Conflict when the upload is
        elsewhere, TooLarge when it has not so many bytes, NoSpace, Locked."""
        upload = self._known(image_id)
        if upload is None:
            there = self._recorded(image_id)
            _check_fit(there.length, offset, length)
            if offset != there.offset:
                raise Conflict(f"the upload is at offset {there.offset}")
            return _Nothing(there)
        size = upload.transfer.image.expected_size
        _check_fit(size, offset, length)
        self._transfers.admit(size, upload.transfer)
        return upload.begin(offset, checksum)

    def is_known(self, image_id: str) -> bool:
        """Whether this process is to bring the upload to its end."""
        return image_id in self._whole or self._known(image_id) is not None

    def take_over(self, image: Image) -> bool:
        """Whether an image in transfer, without a source, is such an upload of an earlier run. What is there of it will
        be verified. May be called again. Raises Unavailable or NoSpace.

        An upload of any kind is one from the moment when its bytes are whole: all of them were here, and verified, when
        the process died.
        """
        if self.is_known(image.id):
            return True
        try:
            size = self._images.size(image.id)
        except NotFound:
            return self._take_unfinished(image)
        if size != image.expected_size:
            return False
        self._whole.add(image.id)
        self._to_verify.append(functools.partial(self._complete, image))
        return True

    def _take_unfinished(self, image: Image) -> bool:
        writer = self._images.writer(image.id, keep=True)
        try:
            left, size = look_back(writer.notes()), writer.size
        finally:
            writer.close()
        match left:
            case ({"kind": str(kind), "metadata": str(metadata)} as origin, moment) if kind == _KIND:
                transfer = self._transfers.resume(image)
                upload = self._add(transfer, metadata, moment, left=size)
                self._to_verify.append(functools.partial(self._verify, upload, origin))
                return True
        return False

    def _add(self, transfer: Transfer, metadata: str, touched: float, *, left: int | None = None) -> Resumable:
        image_id = transfer.image.id
        upload = Resumable(
            transfer,
            functools.partial(self._images.writer, image_id, keep=True),
            metadata=metadata,
            expire=self._expire,
            touched=touched,
            left=left,
        )
        with self._lock:
            self._uploads[image_id] = upload
        return upload

    def _known(self, image_id: str) -> Resumable | None:
        """None also of one that is at its end, of which the record knows more."""
        with self._lock:
            upload = self._uploads.get(image_id)
        if upload is None or upload.transfer.over or upload.transfer.cancelled is not None:
            return None
        return upload

    def _all(self) -> list[Resumable]:
        """Those that are not over; of the others, those whose records say so are forgotten."""
        with self._lock:
            for image_id, upload in list(self._uploads.items()):
                if upload.transfer.over and not self._transfers.is_known(image_id):
                    del self._uploads[image_id]
            return [upload for upload in self._uploads.values() if not upload.transfer.over]

    def _recorded(self, image_id: str) -> Progress:
        """What the record says of an upload that no bytes are brought to any more, or not here."""
        image = self._records.get(image_id) if is_id(image_id) else None
        if image is None or image.source:
            raise NotFound(f"there is no upload {image_id!r}")
        if image.status is Status.COMPLETE:
            return Progress(image, image.size, image.size)
        if image.status is Status.ERROR:
            raise Gone(image.error)
        if image_id in self._uploads or image_id in self._whole or self._settlements.waiting(image_id):
            raise Unavailable("the upload is being completed")
        if self._transfers.is_known(image_id):
            raise NotFound("it comes in one request, and cannot be resumed")
        carrier = self._records.carrier(image_id)
        raise Unavailable(f"the upload is at another member: {carrier or 'one that is not known'}")

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                self._look_after(self._all())
            except Exception:  # without this thread, none would be verified or given up any more
                log.exception("uploads not looked after")
            if self._to_verify:
                self._take(self._to_verify.popleft())
            else:
                self._closing.wait(_INTERVAL)

    def _look_after(self, uploads: Sequence[Resumable]) -> None:
        for upload in uploads:
            self._finish(upload)
            upload.abandon()
        self._tell_others_again([upload for upload in uploads if not upload.transfer.over])

    def _finish(self, upload: Resumable) -> None:
        """An upload that has all its bytes, and whose client may believe that it need not come again."""
        try:
            upload.finish()
        except (Unavailable, NoSpace) as error:
            log.debug("upload not complete yet", image=upload.transfer.image.id, reason=str(error))
        except ImgsvcError as error:
            log.info("upload settled otherwise", image=upload.transfer.image.id, reason=str(error))

    def _tell_others(self, transfer: Transfer, touched: float) -> None:
        """Should this member die, nobody else ends the upload before it can have expired."""
        self._records.expect(transfer.image.id, touched + self._expire * (1 + _TOLD_PART))

    def _tell_others_again(self, uploads: Iterable[Resumable]) -> None:
        """Where a good part of the time has gone by since they were told; else it would be a write for every block."""
        for upload in uploads:
            touched = upload.touched
            if upload.told is not None and touched < upload.told + self._expire * _TOLD_PART:
                continue
            try:
                self._tell_others(upload.transfer, touched)
            except (Unavailable, NoSpace) as error:
                log.debug("others were not told how long to wait", reason=str(error))
                return
            except (Conflict, NotFound) as error:
                log.info("upload lost", image=upload.transfer.image.id, reason=str(error))
                upload.transfer.cancel(Conflict(f"the upload was ended by others: {error}"))
            upload.told = touched

    def _take(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Stopping:
            pass
        except (Unavailable, NoSpace) as error:
            log.warning("verification waits", reason=str(error))
            self._to_verify.append(job)
            self._closing.wait(_RETRY_INTERVAL)
        except Exception:  # the others are to be verified all the same
            log.exception("upload not verified")

    def _look(self, _size: int = 0) -> None:
        if self._closing.is_set():
            raise Stopping("the service is stopping")

    def _verify(self, upload: Resumable, origin: Origin) -> None:
        transfer = upload.transfer
        try:
            if not transfer.over:
                upload.verify(origin, self._look)
                log.info("upload goes on", image=transfer.image.id, bytes=transfer.size)
        except Stopping:
            raise
        except (Unreadable, NotFound, Conflict) as error:
            transfer.abort(error)

    def _complete(self, image: Image) -> None:
        """An upload that was interrupted between the last of its bytes and its record."""
        try:
            reader = self._images.open(image.id)
            try:
                digest = digest_of(reader, self._look)
            finally:
                reader.close()
            check_digest(image, digest)
            with contextlib.suppress(Unavailable, NoSpace):  # then its record follows
                self._settlements.complete(image, image.expected_size, digest)
        except (Conflict, NotFound) as error:
            log.info("interrupted upload settled otherwise", image=image.id, reason=str(error))
        except (WrongDigest, Unreadable) as error:
            self._images.delete(image.id)
            self._settlements.fail(image, error)
        else:
            log.info("interrupted upload is complete", image=image.id)
        self._whole.discard(image.id)


class _Nothing:
    """A request that brings no bytes to an upload that has them all: its client was not told, or has forgotten."""

    cancelled: ImgsvcError | None = None
    unsettled = False

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def feed(self, _block: bytes | bytearray | memoryview) -> None:
        raise Incomplete("the upload has all its bytes, and more were sent")

    def commit(self) -> None:
        pass

    def complete(self) -> Progress:
        return self._progress

    def abort(self, reason: ImgsvcError) -> None:
        pass


def _check_fit(size: int, offset: int, length: int) -> None:
    if length != UNKNOWN_SIZE and offset + length > size:
        raise TooLarge(f"the upload has {size} bytes")
