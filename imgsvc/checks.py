"""Images that somebody doubts: read again soon, one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from imgsvc.errors import Stopping, Unavailable
from imgsvc.images.store import ImageStore
from imgsvc.metadata.store import MetadataStore
from imgsvc.scrub import Outcome, Scrub
from imgsvc.whole import Pace

# Images that wait to be checked.
_MOST_WAITING = 1_000
# Seconds for which one that was found right is not read again: who doubts it once more may have got it over a bad line,
# and if not, that is soon enough.
_RIGHT_FOR = 60.0
# How long `close` waits for a disk that hangs.
_CLOSING_SECONDS = 1.0

log = structlog.get_logger()


class Checks:
    """One thread, that reads one image at a time, once however many doubt it: whoever may ask for it can cost this
    member a read, and nothing else."""

    def __init__(
        self,
        images: ImageStore,
        records: MetadataStore,
        *,
        held: Callable[[str], bool],
        damaged: Callable[[str], None],
    ) -> None:
        """`held` says whether this member is on record as holding an image: no others are looked at. `damaged` is told
        of each that was set aside. Neither may block."""
        self._closing = threading.Event()
        # As fast as it goes: until it was read, who asks for it may get what is wrong.
        self._scrub = Scrub(images, records, Pace(0), self._closing)
        self._held = held
        self._damaged = damaged
        self._changed = threading.Condition()
        # In the order in which they came, with when each may be read.
        self._waiting: dict[str, float] = {}
        self._right: dict[str, float] = {}
        self._thread = threading.Thread(target=self._work, name="checks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, image_id: str) -> None:
        """Has the image read soon. Never blocks. Raises Unavailable when too many wait."""
        with self._changed:
            if image_id in self._waiting or not self._held(image_id):
                return
            if len(self._waiting) >= _MOST_WAITING:
                raise Unavailable("too many images wait to be checked")
            self._waiting[image_id] = self._right.get(image_id, 0.0)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing.set()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(_CLOSING_SECONDS)

    def _work(self) -> None:
        while (image_id := self._next()) is not None:
            try:
                self._check(image_id)
            except Stopping:
                return
            except Exception:  # a thread that dies would leave all others unread
                log.exception("check failed unexpectedly", image=image_id)
            with self._changed:
                del self._waiting[image_id]

    def _next(self) -> str | None:
        with self._changed:
            while not self._closing.is_set():
                now = time.monotonic()
                for image_id, when in self._waiting.items():
                    if when <= now:
                        return image_id
                self._changed.wait(min(self._waiting.values()) - now if self._waiting else None)
        return None

    def _check(self, image_id: str) -> None:
        finding = self._scrub.check(image_id)
        log.info("image checked", image=image_id, found=finding.outcome.name.lower(), reason=finding.reason)
        if finding.outcome is Outcome.MATCHES:
            self._note_right(image_id)
        elif finding.outcome is Outcome.DAMAGED:
            self._damaged(image_id)

    def _note_right(self, image_id: str) -> None:
        now = time.monotonic()
        with self._changed:
            self._right = {other: until for other, until in self._right.items() if until > now}
            self._right[image_id] = now + _RIGHT_FOR
