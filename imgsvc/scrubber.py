"""The scrub in the background: when a pass is due, and how it survives restarts."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

import structlog

from imgsvc.errors import ImgsvcError, Stopping
from imgsvc.foreign import read_json
from imgsvc.images.store import ImageStore
from imgsvc.metadata.image import format_time, parse_time
from imgsvc.metadata.store import MetadataStore
from imgsvc.scrub import Outcome, Scrub
from imgsvc.settings import ScrubSettings
from imgsvc.whole import Pace

# Seconds: a process that is killed repeats so much of its pass, and the image that it was reading.
_NOTE_INTERVAL = 60.0
# Seconds after which the clock is looked at again: somebody may have set it.
_CLOCK_INTERVAL = 600.0
# How long `close` waits for a disk that hangs.
_CLOSING_SECONDS = 1.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Progress:
    """Of a pass that began at `began` and is over, or has come to the image `after`."""

    began: str
    after: str = ""
    done: bool = False

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_line(cls, line: str) -> Self | None:
        """None when it is not to be understood."""
        try:
            match read_json(line):
                case {"began": str(began), "after": str(after), "done": bool(done)} if parse_time(began):
                    return cls(began, after, done)
        except ValueError:
            pass
        return None

    def next_pass(self, interval: float) -> datetime | None:
        """When it is due; None for now, also when this one says that it began in the future."""
        began = parse_time(self.began)
        if began is None or began > datetime.now(UTC):
            return None
        return began + timedelta(seconds=interval)


class Scrubber:
    """One thread. A pass goes on where the last process left it, and the next is due an interval after its beginning:
    so each image is read once in an interval, however often the service is started anew, if the rate allows it."""

    def __init__(
        self,
        settings: ScrubSettings,
        images: ImageStore,
        records: MetadataStore,
        damaged: Callable[[str], None] = lambda _image_id: None,
    ) -> None:
        """`damaged` is told of each image that was set aside; it must not block."""
        self._settings = settings
        self._damaged = damaged
        self._images = images
        self._closing = threading.Event()
        self._scrub = Scrub(images, records, Pace(settings.bytes_per_second), self._closing)
        # Read once: where it cannot be written, one pass must not follow the other without end.
        self._last: Progress | None = None
        self._noted = 0.0
        self._thread = threading.Thread(target=self._work, name="scrub", daemon=True)

    def start(self) -> None:
        """Does nothing when the settings turn it off."""
        if self._settings.bytes_per_second and self._settings.interval:
            self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSING_SECONDS)

    def _work(self) -> None:
        self._last = self._last_noted()
        while not self._closing.is_set():
            try:
                progress = self._due()
                if progress is not None:
                    self._pass(progress)
            except Stopping:
                return
            except Exception:  # a thread that dies would leave all images unread from then on
                log.exception("scrub failed unexpectedly")
                self._closing.wait(_CLOCK_INTERVAL)

    def _due(self) -> Progress | None:
        """The pass to go on with; None after a wait, when there is none yet."""
        last = self._last
        if last is not None and not last.done:
            return last
        due = last.next_pass(self._settings.interval) if last is not None else None
        wait = (due - datetime.now(UTC)).total_seconds() if due is not None else 0.0
        if wait <= 0:
            return Progress(format_time(datetime.now(UTC)))
        self._closing.wait(min(wait, _CLOCK_INTERVAL))
        return None

    def _pass(self, progress: Progress) -> None:
        started, size, found = time.monotonic(), 0, Counter[Outcome]()
        try:
            for finding in self._scrub.run(progress.after):
                found[finding.outcome] += 1
                size += finding.size
                if finding.outcome is Outcome.DAMAGED:
                    self._damaged(finding.image_id)
                progress = self._last = Progress(progress.began, finding.image_id)
                if time.monotonic() >= self._noted + _NOTE_INTERVAL:
                    self._note(progress)
        except Stopping:
            self._note(progress)
            raise
        self._note(Progress(progress.began, done=True))
        log.info(
            "scrub",
            images=found.total(),
            bytes=size,
            damaged=found[Outcome.DAMAGED],
            unread=found[Outcome.UNREAD],
            seconds=round(time.monotonic() - started, 3),
            began=progress.began,
        )

    def _last_noted(self) -> Progress | None:
        try:
            return Progress.of_line(self._images.remembered("scrub"))
        except ImgsvcError as error:
            log.warning("scrub begins anew", reason=str(error))
            return None

    def _note(self, progress: Progress) -> None:
        self._last, self._noted = progress, time.monotonic()
        try:
            self._images.remember("scrub", progress.to_line())
        except ImgsvcError as error:
            log.warning("scrub not noted", reason=str(error))
