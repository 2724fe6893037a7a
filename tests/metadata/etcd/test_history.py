"""How often it was noted how far the records have come: less of it in etcd is a backup, and nothing else may look so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from imgsvc.etcd import Etcd
from imgsvc.etcd_messages import Page
from tests.etcd_cluster import EtcdCluster
from tests.harness import wait_for
from tests.lossy_proxy import LossyProxy
from tests.metadata.etcd.helpers import Raw
from tests.metadata.etcd_store import OwnedEtcdStore, new_member

HISTORY = "/image-history/"
# Longer than a watch takes to be opened again after one that failed.
_AGAIN_SECONDS = 10


class Interrupted(Etcd):
    """Something happens when it was answered how often that was noted, before who asked looks at the answer."""

    happens: Callable[[], None] | None = None

    def range(self, key: str, *args: Any, **options: Any) -> Page:
        page = super().range(key, *args, **options)
        if HISTORY in key and self.happens is not None:
            happens, self.happens = self.happens, None
            happens()
        return page


@pytest.fixture
def proxy(etcd: EtcdCluster) -> Iterator[LossyProxy]:
    with closing(LossyProxy(etcd.endpoints[0])) as proxy:
        yield proxy


def noted(store: OwnedEtcdStore) -> str:
    """Notes it once more, when that can be done."""
    positions: list[str] = []
    wait_for(lambda: positions.append(store.mark("")) or positions[-1], 5, "the position is known")  # type: ignore[func-returns-value]
    return positions[-1]


def watch_again(store: OwnedEtcdStore) -> None:
    """The watch breaks off, and is opened again."""
    follower = store._follower
    assert follower is not None
    wait_for(lambda: follower._watch is not None, _AGAIN_SECONDS, "a watch")
    watch = follower._watch
    assert watch is not None
    watch.fail()
    wait_for(lambda: follower._watch not in (None, watch), _AGAIN_SECONDS, "the next watch")


def count(raw: Raw, position: str) -> str | None:
    """What etcd has."""
    return raw.all().get(HISTORY + position.split(" ")[3])


@pytest.mark.parametrize("anew", [False, True], ids=["watched again", "read again"])
def test_it_is_noted_at_that_very_moment(etcd: EtcdCluster, etcd_prefix: str, *, anew: bool) -> None:
    """An answer that is older than the newest note says nothing of a backup."""
    connection = Interrupted(etcd.endpoints)
    with closing(OwnedEtcdStore(connection, etcd_prefix, new_member())) as store:
        noted(store)
        identity = store.identity
        note = threading.Thread(target=store.mark, args=("",))

        def happens() -> None:
            note.start()
            note.join(0.5)

        connection.happens = happens
        if anew:
            assert store._follower is not None
            store._follower._start_anew()
            wait_for(lambda: connection.happens is None, _AGAIN_SECONDS, "the question")
        watch_again(store)
        note.join()
        watch_again(store)
        assert store.identity == identity


def test_a_note_that_comes_late(etcd: EtcdCluster, etcd_prefix: str, proxy: LossyProxy, raw: Raw) -> None:
    """It was sent again, to another endpoint, and then came the next one: the first one arrives, and does nothing."""
    connection = Etcd([proxy.url, *etcd.endpoints], attempt_timeout=0.5)
    with closing(OwnedEtcdStore(connection, etcd_prefix, new_member())) as store:
        noted(store)
        identity = store.identity
        proxy.delay(HISTORY.encode())
        noted(store)
        last = noted(store)
        proxy.deliver()
        time.sleep(0.5)
        assert count(raw, last) == last.split(" ")[4]
        watch_again(store)
        assert store.identity == identity


def test_a_note_whose_answer_is_lost(etcd: EtcdCluster, etcd_prefix: str, proxy: LossyProxy, raw: Raw) -> None:
    """It was stored: the repeated one finds it, and goes on from there."""
    connection = Etcd([proxy.url, *etcd.endpoints], attempt_timeout=0.5)
    with closing(OwnedEtcdStore(connection, etcd_prefix, new_member())) as store:
        before = noted(store)
        identity = store.identity
        proxy.lose_answers()
        last = noted(store)
        assert int(last.split(" ")[4]) > int(before.split(" ")[4])
        assert count(raw, last) == last.split(" ")[4]
        watch_again(store)
        assert store.identity == identity


@pytest.mark.parametrize("left", ["", "1", "9" * 5000], ids=["gone", "less", "nonsense"])
def test_etcd_has_less(store: OwnedEtcdStore, raw: Raw, left: str) -> None:
    """As one that was restored under a watch that has not noticed: a note does not hide that, and the records get
    another name, once. Whoever deletes the key by hand has the same, which loses nothing."""
    for _ in range(3):
        last = noted(store)
    identity, key = store.identity, HISTORY + last.split(" ")[3]
    if left:
        raw.put(key, left)
    else:
        raw.delete(key)
    assert store.mark("") == ""
    assert raw.all().get(key, "") == left
    wait_for(lambda: store.identity != identity, _AGAIN_SECONDS, "another name")
    identity = store.identity
    again = noted(store)
    assert int(again.split(" ")[4]) > int(last.split(" ")[4])
    assert count(raw, again) == again.split(" ")[4]
    watch_again(store)
    assert store.identity == identity


def test_two_that_go_on_from_one_position(store: OwnedEtcdStore, etcd: EtcdCluster, etcd_prefix: str, raw: Raw) -> None:
    """As a copy of a directory and what it was copied from: neither lowers what the other has noted."""
    position = noted(store)
    connection = Etcd(etcd.endpoints)
    with closing(OwnedEtcdStore(connection, etcd_prefix, new_member(), position=position)) as other:
        identity = store.identity
        for each in (other, store, store, other, store):
            last = noted(each)
            assert count(raw, last) == last.split(" ")[4]
        for each in (other, store):
            watch_again(each)
        assert (store.identity, other.identity) == (identity, identity)
