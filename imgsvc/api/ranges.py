"""Which part of an image a request is for (RFC 9110, section 14)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# A name of a unit is not sensitive to case; nothing may stand around the equals sign.
_BYTES = re.compile(r"bytes=(.*)", re.IGNORECASE)
_SPEC = re.compile(r"([0-9]*)-([0-9]*)")
# Longer numbers are behind the end of anything, and int() refuses some.
_DIGITS = 18
_BEHIND_ALL = 10**_DIGITS


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes from `first` to `last`, which is one of them."""

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def content_range(self, size: int) -> str:
        """Of a representation of `size` bytes."""
        return f"bytes {self.first}-{self.last}/{size}"


class Unsatisfiable(Exception):
    """The request is for ranges, and none of them has a byte in it."""


def requested_range(field: str, size: int) -> ByteRange | None:
    """What the Range field asks for of `size` bytes; None when the answer is the whole.

    That is when the field is invalid or has another unit, when several ranges of it have bytes, which may be answered
    so (section 14.2), and for the end of what has no bytes: that can be satisfied (section 14.1.2), and there is no
    Content-Range that would say so. Raises Unsatisfiable.
    """
    unit = _BYTES.fullmatch(field.strip(" \t"))
    if unit is None:
        return None
    specs = [text for part in unit[1].split(",") if (text := part.strip(" \t"))]
    try:
        found = list(_satisfiable(specs, size))
    except ValueError:
        return None
    if specs and not found:
        raise Unsatisfiable
    return found[0] if len(found) == 1 and size else None


def _satisfiable(specs: list[str], size: int) -> Iterator[ByteRange]:
    """Raises ValueError when one of them is invalid, for then all are to be ignored."""
    for spec in specs:
        match = _SPEC.fullmatch(spec)
        if match is None or spec == "-":
            raise ValueError(spec)
        if not match[1]:
            if suffix := _number(match[2]):
                yield ByteRange(max(size - suffix, 0), size - 1)
            continue
        first, last = _number(match[1]), _number(match[2]) if match[2] else _BEHIND_ALL
        if last < first:
            raise ValueError(spec)
        if first < size:
            yield ByteRange(first, min(last, size - 1))


def _number(digits: str) -> int:
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) <= _DIGITS else _BEHIND_ALL
