"""Reads all keys that begin alike, page by page."""

from __future__ import annotations

from collections.abc import Iterator

from imgsvc.etcd import Compacted, Etcd
from imgsvc.etcd_layout import end_of
from imgsvc.etcd_messages import KeyValue, Page

_PAGE = 1_000
# Where to cut a range: ids and digests begin with two digits of hex that are as good as random.
_CUTS = tuple(f"{number:02x}" for number in range(1, 256))


def scan(
    etcd: Etcd,
    start: str,
    *,
    revision: int = 0,
    keys_only: bool = False,
    timeout: float | None = None,
    may_tear: bool = False,
) -> Iterator[KeyValue]:
    """Every key that begins with `start`, in order: as they were at `revision`, or, without one, at the first page.
    Raises Compacted when etcd no longer has that; if it `may_tear`, the rest is then as it is.

    With each page etcd counts all that is left of its range, whatever the limit, so that the time would go with the
    square of the number of keys. What is more than one page is therefore read as 256 ranges.
    """
    at = revision

    def page(key: str, bound: str) -> Page:
        nonlocal at
        try:
            found = etcd.range(key, bound, limit=_PAGE, revision=at, keys_only=keys_only, timeout=timeout)
        except Compacted:
            if not may_tear:
                raise
            found = etcd.range(key, bound, limit=_PAGE, keys_only=keys_only, timeout=timeout)
            at = 0
        at = at or found.revision
        return found

    end = end_of(start)
    first = page(start, end)
    yield from first.items
    if not first.more:
        return
    key = _after(first)
    for bound in (*(start + cut for cut in _CUTS), end):
        while key < bound:
            found = page(key, bound)
            yield from found.items
            key = _after(found) if found.more else bound


def _after(page: Page) -> str:
    """The first key that a page may have left out."""
    return page.items[-1].key + "\0"
