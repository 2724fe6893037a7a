"""Single images in etcd: all keys of one are read at once, and whatever is written ends with reading them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import Layout, end_of
from imgsvc.etcd_messages import Comparison, KeyValue, Operation, Outcome, Page, created_at, put, read
from imgsvc.etcd_scan import scan
from imgsvc.metadata.etcd_images import Found
from imgsvc.metadata.mirror import Mirror


@dataclass(frozen=True, slots=True)
class Transacted:
    """What a transaction did, and all keys of the image after it."""

    outcome: Outcome
    found: Found

    @property
    def succeeded(self) -> bool:
        return self.outcome.succeeded


def named_records(etcd: Etcd, layout: Layout, timeout: float | None = None) -> Page:
    """The key that names these records, which is made where there is none, as it was read."""
    while not (page := etcd.range(layout.records, timeout=timeout)).items:
        etcd.transact([created_at(layout.records, 0)], [put(layout.records, str(uuid.uuid4()))], timeout=timeout)
    return page


class ImageKeys:
    """What is found goes to the mirror, if there is one, so that this member sees at once what it has written."""

    def __init__(self, etcd: Etcd, layout: Layout, mirror: Mirror | None) -> None:
        self._etcd = etcd
        self._layout = layout
        self._mirror = mirror

    def read(self, image_id: str, timeout: float | None = None) -> Found:
        start = self._layout.image(image_id)
        page = self._etcd.range(start, end_of(start), timeout=timeout)
        return self._found(image_id, page.items, page.revision)

    def transact(
        self,
        image_id: str,
        comparisons: Sequence[Comparison],
        success: Sequence[Operation],
        failure: Sequence[Operation] = (),
        *,
        timeout: float | None = None,
    ) -> Transacted:
        """As `Etcd.transact`; `outcome.found` begins with what the given operations found."""
        start = self._layout.image(image_id)
        everything = read(start, end_of(start))
        outcome = self._etcd.transact(comparisons, [*success, everything], [*failure, everything], timeout=timeout)
        return Transacted(outcome, self._found(image_id, outcome.found[-1], outcome.revision))

    def delete(self, image_id: str, key: str, end: str = "") -> Sequence[KeyValue]:
        """Deletes a key of the image, or more of them, also in a cluster that is full."""
        deleted = self._etcd.delete(key, end)
        if self._mirror is not None:
            self.read(image_id)
        return deleted

    def scan(self, start: str, *, keys_only: bool = False) -> Iterator[KeyValue]:
        """Every key that begins with `start`, in order: as they were at the beginning, or, when etcd compacted that away
        meanwhile, the rest as it is then."""
        return scan(self._etcd, start, keys_only=keys_only, may_tear=True)

    def _found(self, image_id: str, items: Sequence[KeyValue], revision: int) -> Found:
        found = Found(image_id, {self._layout.split(item.key)[1]: item for item in items}, revision)
        if self._mirror is not None:
            self._mirror.note(image_id, found.known, revision)
        return found
