"""Who counts, at one moment, among the members that are on record as holding an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from imgsvc.metadata.mirror import LiveMember, Mirror


def has_room(reserve: Callable[[int], int], member: LiveMember, size: int) -> bool:
    """Whether so many bytes fit at a member, by what it last said of itself. `reserve` says how many bytes of a disk
    of a given size stay free."""
    return member.free is None or member.free - size >= reserve(member.total or 0)


class Presence:
    """`live` are the members that are there, by id; it is for a short time, as who is there changes.

    One that has gone less than `delay` seconds ago counts as well: it may be back soon, with all that it holds.
    """

    def __init__(self, mirror: Mirror, delay: float) -> None:
        self.live = mirror.members()
        # Seconds until one that is away and still counts will not count any more; infinite when there is none.
        self.changes_in = math.inf
        self._mirror = mirror
        self._delay = delay
        self._away: dict[str, bool] = {}

    def counting(self, members: Iterable[str]) -> int:
        """How many of the members count. Quick, for it is asked for every image."""
        live, away = self.live, self._away
        count = 0
        for member in members:
            if member in live or (away[member] if member in away else self._counts(member)):
                count += 1
        return count

    def living(self, members: Iterable[str]) -> list[str]:
        """Those that are there now."""
        return [member for member in members if member in self.live]

    def _counts(self, member: str) -> bool:
        left = self._delay - self._mirror.gone_for(member)
        counts = self._away[member] = left > 0
        if counts:
            self.changes_in = min(self.changes_in, left)
        return counts
