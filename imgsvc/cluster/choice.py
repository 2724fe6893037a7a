"""Which member is asked for the bytes of an image: the least loaded of those that are live and hold them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from imgsvc.errors import NotFound
from imgsvc.metadata.image import Image, Status
from imgsvc.metadata.mirror import LiveMember, Mirror

# Seconds for which what a member said of its load counts, and for which one that failed is asked after the others.
_SAID = 10.0
_FAILED = 30.0


@dataclass(slots=True)
class _Seen:
    """Of one member: what this one takes from it now, what it said that it does besides and when, when it failed, and
    the number of the turn that it had last."""

    running: int = 0
    load: int = 0
    said: float = 0.0
    failed: float = 0.0
    turn: int = 0


class Choice:
    """May be used from any thread; never blocks."""

    def __init__(self, mirror: Mirror, member_id: str) -> None:
        self._mirror = mirror
        self._member_id = member_id
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}
        self._turns = itertools.count(1)

    def holders(self, image: Image) -> Sequence[LiveMember]:
        """The other live members that are on record as holding the image."""
        live = self._mirror.members()
        return [live[member] for member in sorted(self.others(image)) if member in live]

    def others(self, image: Image) -> set[str]:
        """The ids of those that are on record as holding the image, live or not."""
        return self._on_record(image) - {self._member_id}

    def is_complete(self, image_id: str) -> bool:
        """Whether there is such an image and it is complete, as far as the mirror knows."""
        try:
            return self._mirror.get(image_id).status is Status.COMPLETE
        except NotFound:
            return False

    def is_mine(self, image: Image) -> bool:
        """Whether this member is on record as holding the image."""
        return self._member_id in self._on_record(image)

    def has_noted(self, image: Image) -> bool:
        """Whether this member is on record by now as holding what this record is of, if it is of any digest."""
        with suppress(NotFound):
            known = self._mirror.get(image.id)
            if known.status is Status.COMPLETE and self._member_id in known.replicas:
                return known.image.sha256 == image.sha256 != ""
        return False

    def best(self, image: Image, without: Collection[str]) -> LiveMember | None:
        """The one to be asked next, other than those; None when there is none."""
        holders = [holder for holder in self.holders(image) if holder.id not in without]
        with self._lock:
            return min(holders, key=self._rank, default=None)

    @contextmanager
    def asking(self, member: LiveMember) -> Iterator[None]:
        """While something is taken from it."""
        with self._lock:
            seen = self._seen.setdefault(member.id, _Seen())
            seen.running += 1
            seen.turn = next(self._turns)
        try:
            yield
        finally:
            with self._lock:
                seen.running -= 1

    def said(self, member: LiveMember, load: str) -> None:
        """What a member says in its answer: how many requests it answers, this one included."""
        if load.isdecimal() and len(load) < 10:  # noqa: PLR2004 - no member answers so many
            with self._lock:
                seen = self._seen.setdefault(member.id, _Seen())
                seen.load, seen.said = max(int(load) - seen.running, 0), time.monotonic()

    def failed(self, member: LiveMember) -> None:
        with self._lock:
            self._seen.setdefault(member.id, _Seen()).failed = time.monotonic()

    def _on_record(self, image: Image) -> set[str]:
        found = set(image.replicas or ())
        with suppress(NotFound):  # too new
            found.update(self._mirror.get(image.id).replicas)
        return found

    def _rank(self, member: LiveMember) -> tuple[bool, int, int]:
        seen, now = self._seen.get(member.id, _Seen()), time.monotonic()
        failed = bool(seen.failed) and now - seen.failed < _FAILED
        load = seen.load if now - seen.said < _SAID else 0
        return failed, seen.running + load, seen.turn
