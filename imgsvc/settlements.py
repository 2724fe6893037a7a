"""How records come to their final state: at once, or as soon as the stores allow it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

import structlog

from imgsvc.errors import Conflict, ImgsvcError, NoSpace, NotFound, Unavailable
from imgsvc.images.store import ImageStore, is_stored
from imgsvc.metadata.image import Image, Status
from imgsvc.metadata.store import MetadataStore

T = TypeVar("T")
log = structlog.get_logger()


class Settlements:
    """Steps by image id. Each may be taken again when its outcome is not known, and is, by `retry`.

    What still waits when the process ends is found by the next start, for the image's claim or bytes are still there.
    """

    def __init__(self, images: ImageStore, records: MetadataStore) -> None:
        self._images = images
        self._records = records
        self._waiting: dict[str, Callable[[], object]] = {}
        self._lock = threading.Lock()

    def complete(self, image: Image, size: int, sha256: str) -> Image:
        """Its bytes are on the disk for good. Raises Conflict when the record is gone, or was ended by somebody else,
        and drops the bytes; raises Unavailable or NoSpace when the record must follow later."""
        final = image.completed(size, sha256)
        return self.settle(image.id, lambda: self._complete(final))

    def fail(self, image: Image, reason: ImgsvcError) -> Image:
        """It has no bytes, and will get none by itself. Never raises."""
        final = image.progressed(0).failed(str(reason))
        try:
            return self.settle(image.id, lambda: self._fail(final))
        except ImgsvcError as error:
            log.warning("record not settled yet", image=image.id, reason=str(error))
            return final

    def discard(self, image_id: str) -> None:
        """It may have a record, and nobody was told of it: the record goes, by `retry`, so that a sender need not
        wait for a store that has just failed."""
        self.later(image_id, lambda: self._discard(image_id))

    def settle(self, image_id: str, step: Callable[[], T]) -> T:
        """Takes the step and returns its result. Raises what it raises; after Unavailable or NoSpace it is taken again
        by `retry` until it works, and once more after a mistake of ours."""
        try:
            return step()
        except (NotFound, Conflict):
            raise
        except Exception:
            self.later(image_id, step)
            raise

    def later(self, image_id: str, step: Callable[[], object]) -> None:
        """Leaves the step to `retry`."""
        with self._lock:
            self._waiting[image_id] = step

    def write(self, image: Image) -> Image:
        """Updates the record of a transfer of ours, also when its revision is not the one that we know: an earlier
        write may have succeeded although we were told otherwise, or may succeed at this very moment. Raises Conflict
        when it is no longer in transfer, or when another member transfers it by now."""
        while True:
            try:
                return self._records.update(image)
            except Conflict:
                stored = self._records.get(image.id)
                if not stored.in_transfer or not self._records.may_own(image.id):
                    raise
                image = image.at_revision(stored.revision)

    def waiting(self, image_id: str) -> bool:
        with self._lock:
            return image_id in self._waiting

    def retry(self) -> None:
        """Takes what waits, until a step still cannot be taken; that one is the last to be tried the next time."""
        with self._lock:
            waiting = list(self._waiting.items())
        for image_id, step in waiting:
            self._put_behind(image_id, step)
            try:
                step()
            except (Unavailable, NoSpace):
                return
            except ImgsvcError as error:
                log.info("settled otherwise", image=image_id, reason=str(error))
            except Exception:  # a mistake of ours: a third time would be no better, and the next start finds it
                log.exception("not settled", image=image_id)
            else:
                log.info("settled", image=image_id)
            with self._lock:
                # The step may have set things going whose own end waits by now.
                if self._waiting.get(image_id) is step:
                    del self._waiting[image_id]

    def _put_behind(self, image_id: str, step: Callable[[], object]) -> None:
        """So that one that never works, for a reason of its own, does not hold up the others."""
        with self._lock:
            if self._waiting.get(image_id) is step:
                self._waiting[image_id] = self._waiting.pop(image_id)

    def _complete(self, final: Image) -> Image:
        try:
            return self.write(final)
        except NotFound as error:
            self._images.delete(final.id)
            raise Conflict("the image was deleted during its transfer") from error
        except Conflict as error:
            stored = self._records.get(final.id)
            if stored.status is Status.COMPLETE and stored.sha256 == final.sha256:
                note_copy(self._records, self._images, final)
                return stored
            # They are not the bytes of this record, and must not be there when it is complete.
            self._images.delete(final.id)
            raise Conflict("the image was ended by somebody else during its transfer") from error

    def _fail(self, final: Image) -> Image:
        try:
            final = self.write(final)
        except (NotFound, Conflict) as error:
            log.info("record left as it was", image=final.id, reason=str(error))
        self._images.unclaim(final.id)
        return final

    def _discard(self, image_id: str) -> None:
        with contextlib.suppress(NotFound):
            self._records.delete(image_id)
        self._images.unclaim(image_id)


def note_copy(records: MetadataStore, images: ImageStore, image: Image) -> None:
    """Puts on record that this member holds the bytes of this very image: complete, and with its digest. May be
    repeated, however late; a copy that was dropped in the meantime stays without a note. Raises Conflict or NotFound
    when the record is not that image's any more."""
    records.hold(image)
    # Only now: who drops a copy takes the note away first, and looks for a new one afterwards.
    if not is_stored(images, image.id):
        records.release(image.id)
