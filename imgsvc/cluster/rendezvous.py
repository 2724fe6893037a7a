"""Which members should hold an image: each member works it out alone, and all find the same.

Rendezvous hashing: every pair of an image and a member has a digest, and the members with the highest come first. So
the order of no image changes but by the very member that joins or leaves, and every member has an equal share of what
one that is lost was first for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def ranked(image_id: str, members: Iterable[str]) -> list[str]:
    """The members, the one that should hold the image first. A microsecond for each."""
    return sorted(members, key=lambda member: _weight(image_id, member), reverse=True)


def place(image_id: str, member: str, others: Iterable[str], limit: int) -> int:
    """How many of the others come before the member, counted no further than `limit`.

    With few that may, and many members, most find out after a handful of digests that enough come before them: it is a
    microsecond for each, and about `limit` times the logarithm of their number on average.
    """
    own, before = _weight(image_id, member), 0
    for other in others:
        if before >= limit:
            break
        if other != member and _weight(image_id, other) > own:
            before += 1
    return before


def _weight(image_id: str, member: str) -> tuple[bytes, str]:
    return hashlib.blake2b(f"{image_id}/{member}".encode(errors="surrogatepass"), digest_size=8).digest(), member
