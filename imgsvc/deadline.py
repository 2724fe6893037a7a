"""How long somebody waits for an answer: said where the work for it is begun, and kept to by every call that is made
for it and may hang."""

from __future__ import annotations

import contextvars
import math
import time

# A call that comes late still gets so many seconds: it may be the one that would have worked.
_LEAST = 0.1

_latest: contextvars.ContextVar[float] = contextvars.ContextVar("latest", default=math.inf)


def set_deadline(moment: float) -> None:
    """By `time.monotonic`; for the current context."""
    _latest.set(moment)


def time_left(most: float) -> float:
    """Seconds that a call may take: `most`, or less when the deadline is nearer."""
    return max(min(most, _latest.get() - time.monotonic()), _LEAST)
