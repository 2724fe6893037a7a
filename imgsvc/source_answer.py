"""What a source says of its bytes, as headers have it."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import quote

from imgsvc.errors import FetchFailed
from imgsvc.metadata.image import UNKNOWN_SIZE

_LENGTH = re.compile(r"[0-9]{1,18}")
# A weak one stands for bytes that may differ (RFC 9110, section 8.8.3).
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"')
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Version:
    """One state of a source's bytes: where they are found, redirects followed; their strong ETag, "" without one; their
    number, or UNKNOWN_SIZE. Bytes of two versions never make one image."""

    url: str
    etag: str = ""
    length: int = UNKNOWN_SIZE


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes `first` to `last`, or to the end, of the version with this ETag."""

    first: int
    last: int | None
    etag: str

    @property
    def fields(self) -> list[str]:
        """The headers that ask for it, or for the whole when the version is another (RFC 9110, section 13.1.5)."""
        last = "" if self.last is None else self.last
        return [f"Range: bytes={self.first}-{last}", f"If-Range: {self.etag}"]


class Answer:
    """The headers of one answer, taken in one by one. `length` is that of the body, or UNKNOWN_SIZE; `range` the first
    byte, the last, and the number of all; `retry_after` seconds."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.length = UNKNOWN_SIZE
        self.location = ""
        self.etag = ""
        self.range: tuple[int, int, int] | None = None
        self.takes_ranges = True
        self.retry_after: float | None = None
        self._chunked = False

    def take(self, header: str) -> None:
        """Raises FetchFailed when the length makes no sense."""
        name, _, value = header.partition(":")
        value = value.strip()
        match name.strip().lower():
            case "location":
                # Sources that send bytes beyond ASCII here mean them as they are.
                self.location = quote(value, safe=string.punctuation, encoding="latin-1")
            case "transfer-encoding":
                # It overrides a length (RFC 9112, section 6.3).
                self._chunked = True
                self.length = UNKNOWN_SIZE
            case "content-length" if not self._chunked:
                if not _LENGTH.fullmatch(value) or self.length not in (UNKNOWN_SIZE, int(value)):
                    raise FetchFailed("the source sent a Content-Length that makes no sense")
                self.length = int(value)
            case "etag":
                self.etag = value if _STRONG_ETAG.fullmatch(value) else ""
            case "content-range" if match := _CONTENT_RANGE.fullmatch(value):
                self.range = (int(match[1]), int(match[2]), int(match[3]))
            case "accept-ranges":
                self.takes_ranges = value.lower() != "none"
            case "retry-after":
                self.retry_after = _seconds_until(value)

    def is_part(self, part: Part, length: int) -> bool:
        """Whether the body is this part of the version, of `length` bytes in all or UNKNOWN_SIZE, as far as headers
        tell. A 206 has to repeat the ETag (RFC 9110, section 15.3.7); one that does not may be of any version."""
        if self.range is None or self.etag != part.etag:
            return False
        first, last, total = self.range
        wanted = (part.first, total - 1 if part.last is None else part.last)
        whole = length in (UNKNOWN_SIZE, total) and first <= last < total
        return whole and (first, last) == wanted and self.length in (UNKNOWN_SIZE, last - first + 1)


def _seconds_until(moment: str) -> float | None:
    """From a Retry-After header (RFC 9110, section 10.2.3); None when it is none."""
    if _LENGTH.fullmatch(moment):
        return float(moment)
    try:
        date = parsedate_to_datetime(moment)
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None
    return max(seconds, 0.0)
