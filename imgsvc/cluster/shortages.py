"""The images that have fewer copies than wanted, and when it is this member's turn to make one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from imgsvc.cluster.presence import Presence
from imgsvc.cluster.rendezvous import place, ranked
from imgsvc.metadata.image import Status
from imgsvc.metadata.mirror import Known, LiveMember

# Images, of a few hundred bytes each; others are seen when these have become fewer.
_MOST = 100_000
# Seconds after which one that makes copies, and never this one, is not waited for.
_LONGEST = 3_600.0
# Seconds before a copy that failed is tried again, twice as long each time.
_FIRST_RETRY = 1.0
_LAST_RETRY = 60.0


@dataclass(slots=True)
class Shortage:
    """Of one image. Times are by `time.monotonic`: `since` when it was seen first, `due` when somebody last said that
    it is this member's turn, `not_before` when it may try again."""

    since: float
    replicas: tuple[str, ...]
    seen: int = 0
    due: float = math.inf
    failures: int = 0
    not_before: float = 0.0


class Shortages:
    """For one caller at a time.

    Turns: of the members that are live and hold no copy, the first in the image's order are to make those that are
    missing, at once. Each time that one of these has shown nothing for an image's `patience`, the next one's turn comes
    as well. Who has finished any copy meanwhile is busy, and waited for anew, but not for longer than an hour. So there
    are more copies than wanted only where one takes longer than the patience, and then one more for each time; and
    where one member was busy for over an hour, as many as others had under way at the end.
    """

    def __init__(
        self, me: str, wanted: int, patience: Callable[[int], float], fits: Callable[[LiveMember, int], bool]
    ) -> None:
        """`patience` is in seconds for an image of a size in bytes; `fits` says whether a member has room for it."""
        self._me = me
        self._wanted = wanted
        self._patience = patience
        self._fits = fits
        self._known: dict[str, Shortage] = {}
        # When each member last finished a copy of an image that lacked it.
        self._progress: dict[str, float] = {}
        self._round = 0

    def __len__(self) -> int:
        return len(self._known)

    def get(self, image_id: str) -> Shortage | None:
        return self._known.get(image_id)

    def lacks(self, known: Known, presence: Presence) -> bool:
        """Whether copies are missing. Two microseconds: it is asked for every image there is."""
        return known.status is Status.COMPLETE and presence.counting(known.replicas) < self._wanted

    def look(self, known: Known, presence: Presence) -> Shortage | None:
        """What is known of the image's shortage, with `due` as it is now, infinite when it is not this member's
        business; None when there is none, or nobody to copy from, or too many others have one."""
        shortage = self._known.get(known.id)
        if shortage is not None:
            self._note_progress(shortage, known.replicas)
        if not self.lacks(known, presence) or not presence.living(known.replicas):
            self.forget(known.id)
            return None
        if shortage is None:
            # Those which this member has are none of its business, but for what they tell of others.
            if len(self._known) >= (_MOST // 2 if self._me in known.replicas else _MOST):
                return None
            shortage = self._known[known.id] = Shortage(time.monotonic(), known.replicas)
        shortage.seen = self._round
        shortage.due = math.inf if self._me in known.replicas else self._turn(known, shortage, presence)
        return shortage

    def forget(self, image_id: str) -> None:
        self._known.pop(image_id, None)

    def tried(self, image_id: str) -> int:
        """This member has tried to make a copy. Where the image still lacks it, it failed, and is tried again later;
        returns how often in a row."""
        shortage = self._known.get(image_id)
        if shortage is None:
            return 0
        shortage.not_before = time.monotonic() + min(math.ldexp(_FIRST_RETRY, shortage.failures), _LAST_RETRY)
        shortage.failures = min(shortage.failures + 1, 10)
        return shortage.failures

    def forgive(self) -> None:
        """What failed may be tried again at once: much may have changed."""
        for shortage in self._known.values():
            shortage.failures, shortage.not_before = 0, 0.0

    def begin_round(self) -> None:
        """All images that lack copies are about to be looked at."""
        self._round += 1

    def end_round(self, live: Collection[str]) -> None:
        """They have been: what was not looked at is no more. Of members only the live ones are remembered."""
        for image_id in [image_id for image_id, shortage in self._known.items() if shortage.seen < self._round]:
            del self._known[image_id]
        self._progress = {member: when for member, when in self._progress.items() if member in live}

    def _note_progress(self, shortage: Shortage, replicas: tuple[str, ...]) -> None:
        for member in set(replicas).difference(shortage.replicas):
            self._progress[member] = time.monotonic()
        shortage.replicas = replicas

    def _turn(self, known: Known, shortage: Shortage, presence: Presence) -> float:
        """When this member may begin, or is to look again.

        A handful of digests for most; one for every live member only when those before this one have had their time.
        """
        patience = self._patience(known.size)
        now = time.monotonic()
        waited = now - shortage.since
        passed = int(waited / patience)
        missing = self._wanted - presence.counting(known.replicas)
        others = self._candidates(known, presence)
        before = missing + passed if others is None else place(known.id, self._me, others, missing + passed)
        if before >= missing + passed:
            if now < shortage.due < math.inf:
                return shortage.due  # when it is looked at anyway
            # Less and less often: there may be very many that nobody can copy.
            return shortage.since + max((passed + 1) * patience, waited * 1.1)
        turn = shortage.since
        if before >= missing:
            everyone = ranked(known.id, self._candidates(known, presence) or ())
            for member in everyone[: before - missing + 1]:
                busy = min(self._progress.get(member, 0.0), shortage.since + _LONGEST)
                turn = max(turn, busy) + patience
        return max(turn, shortage.not_before)

    def _candidates(self, known: Known, presence: Presence) -> Iterator[str] | None:
        """The live members without a copy that have room for one, by what they say of themselves; all, when none has:
        some may find that it can make room. None when this member is not among them."""
        without = (member for member in presence.live.values() if member.id not in known.replicas)
        if any(self._fits(member, known.size) for member in without):
            if not self._fits(presence.live[self._me], known.size):
                return None
            return (
                member.id
                for member in presence.live.values()
                if member.id not in known.replicas and self._fits(member, known.size)
            )
        return (member for member in presence.live if member not in known.replicas)
