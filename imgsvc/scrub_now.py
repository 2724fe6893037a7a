"""`imgsvc scrub`: one pass, asked for by a person, who is told what was found."""

from __future__ import annotations

import signal
import threading
from collections import Counter

from imgsvc.errors import Stopping
from imgsvc.images.store import ImageStore
from imgsvc.metadata.store import MetadataStore
from imgsvc.scrub import Outcome, Scrub
from imgsvc.settings import Settings
from imgsvc.stores import opened_beside
from imgsvc.whole import Pace

_BAD = (Outcome.DAMAGED, Outcome.UNREAD)


def scrub_now(settings: Settings, bytes_per_second: int) -> int:
    """Prints each image that does not match, and a summary; returns the exit status, 0 when all match, else 1. SIGINT
    and SIGTERM end it between two blocks. Raises ConfigError, or Unavailable when the records cannot be had."""
    closing = threading.Event()
    with opened_beside(settings) as (images, records):
        _ = records.identity  # later it waits for them
        work = _Work(images, records, Pace(bytes_per_second), closing)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: closing.set())
        work.start()
        # In turns, for a signal is handled between two of them.
        while work.is_alive():
            work.join(0.2)
    return work.status


class _Work(threading.Thread):
    """A thread of its own, so that what handles a signal never meets a lock that it holds itself."""

    def __init__(self, images: ImageStore, records: MetadataStore, pace: Pace, closing: threading.Event) -> None:
        super().__init__(name="scrub", daemon=True)
        self._scrub = Scrub(images, records, pace, closing)
        self.status = 1

    def run(self) -> None:
        found, size, ended = Counter[Outcome](), 0, ""
        try:
            for finding in self._scrub.run():
                found[finding.outcome] += 1
                size += finding.size
                if finding.outcome in _BAD:
                    _say(f"{finding.image_id}: {finding.reason}")
        except Stopping:
            ended = "; stopped before the end"
        _say(
            f"{found[Outcome.MATCHES]} images of {size} bytes match, {found[Outcome.DAMAGED]} do not,"
            f" {found[Outcome.UNREAD]} cannot be read, {found[Outcome.LEFT]} are left out{ended}"
        )
        self.status = int(bool(ended) or any(found[bad] for bad in _BAD))


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the answer
