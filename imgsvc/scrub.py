"""Reads images again and holds them against their records: bits rot. What does not match is set aside."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

import structlog

from imgsvc.errors import Conflict, ImgsvcError, NoSpace, NotFound, Stopping, Unavailable, Unreadable
from imgsvc.images.store import ImageReader, ImageStore, is_stored
from imgsvc.metadata.image import DAMAGED, Image, Status
from imgsvc.metadata.store import MetadataStore, let_go
from imgsvc.whole import Pace, digest_of

# Seconds before a store that did not answer is asked again, and before a disk that did not.
_RETRY_INTERVAL = 5.0
_READ_AGAIN = 1.0
# How often a record is written anew before it is left to the next pass: an hour's worth.
_TRIES = 720
# Seconds between two looks at the record of an image that is being read: one that was deleted gives its space back
# only when nobody has it open.
_LOOK_INTERVAL = 2.0

_T = TypeVar("_T")

log = structlog.get_logger()


class Outcome(Enum):
    MATCHES = auto()
    DAMAGED = auto()
    UNREAD = auto()
    LEFT = auto()  # it has no digest yet, or was deleted, changed or let go of meanwhile


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one image; `size` is in bytes, `reason` a sentence unless it matches."""

    image_id: str
    outcome: Outcome
    size: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Fault:
    """What `reader` has shown, None where there is no file. `certain` when it is the image's own, and not perhaps that
    of the whole disk."""

    reason: str
    reader: ImageReader | None = None
    certain: bool = True


class Scrub:
    """One pass over the images. It may run beside any number of others, in this process or not: what it changes it
    changes by renaming and by comparing revisions."""

    def __init__(self, images: ImageStore, records: MetadataStore, pace: Pace, closing: threading.Event) -> None:
        """Once `closing` is set, `run` raises Stopping soon."""
        self._images = images
        self._records = records
        self._pace = pace
        self._closing = closing
        self._look_at = 0.0

    def run(self, after: str = "") -> Iterator[Finding]:
        """Every complete image that this member is on record as holding, from the one that follows `after`, in the
        order of their ids. Waits while the records cannot be had.

        One whose bytes are held against their digest for other reasons, as those that nobody has vouched for yet, is
        not on record here.
        """
        while True:
            try:
                for page in self._records.held():
                    for image_id in page:
                        if image_id > after:
                            yield self._checked(image_id)
                            after = image_id
            except Unavailable as error:
                log.warning("scrub waits", reason=str(error))
                self._wait(_RETRY_INTERVAL)
            else:
                return

    def check(self, image_id: str) -> Finding:
        """One image, which is on record as held here. Waits while the records cannot be had."""
        while True:
            try:
                return self._checked(image_id)
            except Unavailable as error:
                log.warning("check waits", image=image_id, reason=str(error))
                self._wait(_RETRY_INTERVAL)

    def _checked(self, image_id: str) -> Finding:
        """Raises Unavailable when the records cannot be had."""
        try:
            return self._check(image_id)
        except (Stopping, Unavailable):
            raise
        except (Conflict, NotFound) as error:
            return Finding(image_id, Outcome.LEFT, reason=str(error))
        except Exception as error:  # one image must not keep the others from being looked at
            log.exception("scrub failed unexpectedly", image=image_id)
            return Finding(image_id, Outcome.UNREAD, reason=str(error))

    def _check(self, image_id: str) -> Finding:
        image = self._records.get(image_id)  # a page of a long pass is old
        self._require_note(image)
        if image.status is not Status.COMPLETE:
            return Finding(image_id, Outcome.LEFT, reason="it is not complete any more")
        if not image.sha256:
            return Finding(image_id, Outcome.LEFT, reason="it has no digest yet")
        with contextlib.ExitStack() as opened:
            try:
                fault = self._fault(image, opened)
            except Unavailable as error:
                log.error("image not scrubbed", image=image_id, reason=str(error))
                return Finding(image_id, Outcome.UNREAD, reason=str(error))
            if fault is None:
                return Finding(image_id, Outcome.MATCHES, image.size)
            self._require_unchanged(image)
            return self._set_aside(image, fault)

    def _fault(self, image: Image, opened: contextlib.ExitStack) -> _Fault | None:
        """None when the bytes are the image's. What was read stays open: it alone may be set aside. Raises Unavailable
        when that cannot be found out now, and Conflict or NotFound when the record has changed."""
        try:
            return self._looked_at(image, opened)
        except Unavailable as error:
            log.warning("image is read again", image=image.id, reason=str(error))
        self._wait(_READ_AGAIN)
        return self._looked_at(image, opened, again=True)

    def _looked_at(self, image: Image, opened: contextlib.ExitStack, *, again: bool = False) -> _Fault | None:
        try:
            reader = opened.enter_context(contextlib.closing(self._images.open(image.id)))
        except NotFound:
            return _Fault("its file is missing")
        try:
            difference = self._difference(image, reader)
        except Unreadable as error:
            if not again:
                raise
            return _Fault(str(error), reader, certain=False)
        return None if difference is None else _Fault(difference, reader)

    def _difference(self, image: Image, reader: ImageReader) -> str | None:
        if reader.size != image.size:
            return f"its file has {reader.size} bytes, and the image {image.size}"
        self._look_at = time.monotonic() + _LOOK_INTERVAL
        sha256 = digest_of(reader, functools.partial(self._between, image))
        return None if sha256 == image.sha256 else f"its sha256 is {sha256}, and should be {image.sha256}"

    def _between(self, image: Image, count: int) -> None:
        """Between two blocks: as long as the pace wants, but not longer than anybody wants the image."""
        until = time.monotonic() + self._pace.delay(count)
        while True:
            now = time.monotonic()
            if now >= self._look_at:
                self._look_at = now + _LOOK_INTERVAL
                with contextlib.suppress(Unavailable):
                    self._require_unchanged(image)
            self._wait(max(min(until, self._look_at) - now, 0.0))
            if now >= until:
                return

    def _require_unchanged(self, image: Image) -> None:
        now = self._records.get(image.id)
        if now.revision != image.revision:
            raise Conflict("its record has changed meanwhile")
        self._require_note(now)

    def _require_note(self, image: Image) -> None:
        """A copy that goes loses its note first."""
        if image.replicas is not None and self._images.member not in image.replicas:
            raise Conflict("this member is not on record as holding it any more")

    def _set_aside(self, image: Image, fault: _Fault) -> Finding:
        """First the note, when others hold the image; then the bytes, then the record.

        A process that dies in between leaves bytes without a note, which the next start reads, or a complete record
        without bytes: nobody can download it, and the next start and the next pass find it. The other way round it
        would leave bytes that a new fetch removes, although they are to be kept.
        """
        if not fault.certain and not self._takes_changes():
            return _unread(image, fault)
        released = self._insist(image, lambda: let_go(self._records, image.id, self._images.member))
        try:
            moved = self._moved(image, fault)
        except Conflict:
            if released:  # it is the note of the other bytes
                self._insist(image, lambda: self._note_again(image))
            raise
        if moved is None:
            if released:
                self._insist(image, lambda: self._note_again(image))
            return _unread(image, fault)
        where, aside = moved
        log.error("image damaged", image=image.id, reason=fault.reason, bytes_are=where)
        self._condemn(image, f"{DAMAGED}{fault.reason}; {where}", aside=aside)
        return Finding(image.id, Outcome.DAMAGED, reason=f"{fault.reason}; {where}")

    def _takes_changes(self) -> bool:
        """A disk that does not may be gone for a while, and all its images with it."""
        try:
            self._images.ping()
        except Unavailable:
            return False
        return True

    def _moved(self, image: Image, fault: _Fault) -> tuple[str, bool] | None:
        """Where the bytes are now, and whether nothing stands in their place; None when that may be the whole disk's
        fault. Raises Conflict when these are other bytes: another scrub found the same, and the image was fetched
        again since."""
        try:
            if fault.reader is not None:
                self._images.quarantine(image.id, fault.reader)
                return "its bytes are in quarantine", True
        except NotFound:
            pass
        except Conflict:
            raise
        except ImgsvcError as error:
            return (f"its bytes stay where they are: {error}", False) if fault.certain else None
        if image.id in self._images.quarantined():
            return "its bytes are in quarantine", True
        return "there are no bytes to keep", True

    def _note_again(self, image: Image) -> None:
        """That this member holds the image, unless its record has changed."""
        if self._records.get(image.id).revision == image.revision:
            self._records.hold(image)

    def _insist(self, image: Image, call: Callable[[], _T]) -> _T:
        """Until the records answer: what has been begun is not to be begun anew."""
        for _ in range(_TRIES):
            try:
                return call()
            except (Unavailable, NoSpace) as error:
                log.warning("record of a damaged image waits", image=image.id, reason=str(error))
                self._wait(_RETRY_INTERVAL)
        raise Conflict("its record could not be had for too long")

    def _condemn(self, judged: Image, reason: str, *, aside: bool) -> None:
        """Until the record says it."""
        for _ in range(_TRIES):
            try:
                if self._says_so(judged, reason, aside=aside):
                    return
            except (Unavailable, NoSpace) as error:
                log.warning("record of a damaged image waits", image=judged.id, reason=str(error))
                self._wait(_RETRY_INTERVAL)
        log.error("record of a damaged image left as it was", image=judged.id)

    def _says_so(self, judged: Image, reason: str, *, aside: bool) -> bool:
        """False when something changed at this very moment. An image that others hold stays complete, and so does one
        that is here again: another scrub condemned it and it was fetched, or its bytes are `aside` and a client had a
        copy brought here meanwhile."""
        try:
            image = self._records.get(judged.id)
            if image.status is not Status.COMPLETE:
                return True
            if (aside or image.revision != judged.revision) and is_stored(self._images, image.id):
                return True
            failed = image.progressed(0).failed(reason)
            if not self._records.lose_copy(failed, lambda: not (aside and is_stored(self._images, image.id))):
                log.info("copy released", image=image.id)
        except NotFound:
            return True
        except Conflict:
            return False
        return True

    def _wait(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            raise Stopping("the scrub was stopped")


def _unread(image: Image, fault: _Fault) -> Finding:
    log.error("image cannot be read", image=image.id, reason=fault.reason)
    return Finding(image.id, Outcome.UNREAD, reason=fault.reason)
