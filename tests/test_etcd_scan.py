"""Reading more keys than one page takes, from a real etcd."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

from imgsvc.etcd import Compacted, Etcd
from imgsvc.etcd_layout import end_of
from imgsvc.etcd_messages import Page, delete, put
from imgsvc.etcd_scan import scan
from imgsvc.metadata.image import new_id
from tests.etcd_cluster import EtcdCluster

# Beside what the cuts are made for: nothing, their own names, what is outside of all of them, and what is no UTF-8.
ODD = ["", "\0", "!", "0", "00", "01", "fe", "ff", "ff\0", "fg", "zz", "é", "\U0001f600", "\udcff", "\udc80x"]


class Counting(Etcd):
    """The bounds of each range that was asked for."""

    def __init__(self, machines: Sequence[str]) -> None:
        super().__init__(machines)
        self.asked: list[tuple[str, str]] = []

    def range(self, key: str, end: str = "", **options: Any) -> Page:
        self.asked.append((key, end))
        return super().range(key, end, **options)


@pytest.fixture
def counting(etcd: EtcdCluster) -> Iterator[Counting]:
    with closing(Counting(etcd.endpoints)) as connection:
        yield connection


def fill(etcd: Etcd, start: str, count: int) -> None:
    names = [*ODD, *(new_id() for _ in range(count - len(ODD)))]
    for batch in itertools.zip_longest(*[iter(names)] * 100):
        etcd.transact(
            [], [put(start + name, name.encode(errors="replace").hex()) for name in batch if name is not None]
        )


@pytest.mark.parametrize("count", [len(ODD), 1_000, 1_001, 2_500])
def test_all_keys_in_order(counting: Counting, etcd_prefix: str, count: int) -> None:
    """Each once, and none of a neighbour."""
    start = f"{etcd_prefix}/i/"
    fill(counting, start, count)
    for neighbour in (f"{etcd_prefix}/i", f"{etcd_prefix}/i0", f"{etcd_prefix}/h/x"):
        counting.transact([], [put(neighbour, "")])
    there = counting.range(start, end_of(start)).items
    assert len(there) == count
    assert list(scan(counting, start)) == there
    assert [item.key for item in scan(counting, start, keys_only=True)] == [item.key for item in there]


def test_a_page_is_one_question(counting: Counting, etcd_prefix: str) -> None:
    fill(counting, etcd_prefix, 1_000)
    counting.asked.clear()
    assert sum(1 for _ in scan(counting, etcd_prefix)) == 1_000
    assert counting.asked == [(etcd_prefix, end_of(etcd_prefix))]


def test_more_are_asked_for_in_small_ranges(counting: Counting, etcd_prefix: str) -> None:
    """For etcd counts, with each page, all that is left of its range."""
    fill(counting, etcd_prefix, 2_500)
    counting.asked.clear()
    assert sum(1 for _ in scan(counting, etcd_prefix)) == 2_500
    (_, *asked) = counting.asked
    # The first page ends at two fifths of the ids, which are random: some 154 cuts are left, give or take three.
    assert 120 < len(asked) <= 200
    assert max(counting_of(counting, *bounds) for bounds in asked[:-1]) < 40


def test_as_at_the_first_page(counting: Counting, etcd_prefix: str) -> None:
    fill(counting, etcd_prefix, 2_500)
    before = counting.range(etcd_prefix, end_of(etcd_prefix))
    found = scan(counting, etcd_prefix)
    first = next(found)
    counting.transact([], [delete(before.items[-1].key), put(f"{etcd_prefix}fz", "new")])
    assert [first, *found] == before.items
    assert list(scan(counting, etcd_prefix, revision=before.revision)) == before.items


def test_compacted_meanwhile(etcd: EtcdCluster, counting: Counting, etcd_prefix: str) -> None:
    """Said; or, for who can do with that, all that was there throughout."""
    fill(counting, etcd_prefix, 2_500)
    before = counting.range(etcd_prefix, end_of(etcd_prefix)).items
    strict, torn = scan(counting, etcd_prefix), scan(counting, etcd_prefix, may_tear=True)
    begun = [next(strict), next(torn)]
    now = counting.transact([], [put(f"{etcd_prefix}fz", "new")]).revision
    etcd.call("/v3/kv/compaction", {"revision": now, "physical": True})
    with pytest.raises(Compacted):
        list(strict)
    assert [item for item in [begun[1], *torn] if item.text != "new"] == before


def counting_of(etcd: Etcd, key: str, end: str) -> int:
    return len(etcd.range(key, end, keys_only=True).items)
