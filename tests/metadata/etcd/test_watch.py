"""Deletions by other members are heard of, through whatever happens to etcd."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing

import pytest

from imgsvc.errors import Unavailable
from imgsvc.etcd import Etcd
from imgsvc.metadata.etcd import EtcdMetadataStore
from imgsvc.metadata.store import MetadataStore
from tests.etcd_cluster import EtcdCluster
from tests.harness import wait_for
from tests.metadata.etcd_store import OwnedEtcdStore, new_member, open_store
from tests.metadata.helpers import image

PROMISED_SECONDS = 5


class Listener:
    """What a follower of deletions was told, in order; a gap is "gap"."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._news = threading.Condition()

    def follow(self, store: MetadataStore) -> None:
        store.follow_deletions(self.hear, lambda: self.hear("gap"))

    def hear(self, news: str) -> None:
        with self._news:
            self.told.append(news)
            self._news.notify_all()

    def wait_for(self, news: str, seconds: float = PROMISED_SECONDS) -> None:
        with self._news:
            assert self._news.wait_for(lambda: news in self.told, seconds), f"{news} not in {self.told}"


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def cluster(etcd_cluster: EtcdCluster) -> EtcdCluster:
    """Of three, to which tests do things."""
    return etcd_cluster


def created_and_deleted(store: MetadataStore) -> str:
    created = store.create(image())
    store.delete(created.id)
    return created.id


def endpoint_in_use(cluster: EtcdCluster, store: OwnedEtcdStore) -> int:
    """Which member the store talks to."""
    return [url.endswith(store.etcd._endpoint().address) for url in cluster.endpoints].index(True)


class TestOutages:
    def test_a_killed_member(
        self, etcd_cluster: EtcdCluster, store: OwnedEtcdStore, other: OwnedEtcdStore, listener: Listener
    ) -> None:
        """The member that is watched is killed, and a record deleted at once: it is told, once, and nothing missed."""
        listener.follow(store)
        first = created_and_deleted(other)
        listener.wait_for(first)
        doomed = other.create(image())
        etcd_cluster.kill(endpoint_in_use(etcd_cluster, store))
        other.delete(doomed.id)
        listener.wait_for(doomed.id)
        time.sleep(1)
        assert listener.told == [first, doomed.id]

    def test_a_frozen_member(
        self, etcd_cluster: EtcdCluster, store: OwnedEtcdStore, other: OwnedEtcdStore, listener: Listener
    ) -> None:
        """The member that is watched freezes, which no connection shows: what is deleted then is told all the same."""
        listener.follow(store)
        listener.wait_for(created_and_deleted(other))
        doomed = other.create(image())
        etcd_cluster.stop(endpoint_in_use(etcd_cluster, store))
        other.delete(doomed.id)
        listener.wait_for(doomed.id)
        assert "gap" not in listener.told

    def test_a_restart_of_the_whole_cluster(
        self, etcd_cluster: EtcdCluster, store: OwnedEtcdStore, other: OwnedEtcdStore, listener: Listener
    ) -> None:
        """After an outage of all of etcd, deletions are told as before."""
        listener.follow(store)
        for i in range(3):
            etcd_cluster.kill(i)
        time.sleep(1)
        etcd_cluster.restore()
        for _ in range(2):
            listener.wait_for(created_and_deleted(other))
        assert "gap" not in listener.told

    @pytest.mark.parametrize("outage", [EtcdCluster.kill, EtcdCluster.stop], ids=["killed", "frozen"])
    def test_waiting_is_cheap(
        self,
        etcd_cluster: EtcdCluster,
        store: OwnedEtcdStore,
        listener: Listener,
        outage: Callable[[EtcdCluster, int], None],
    ) -> None:
        """Three seconds without etcd cost less than a quarter of a second of CPU, and `close` ends them promptly."""
        listener.follow(store)
        for i in range(3):
            outage(etcd_cluster, i)
        before = time.process_time()
        time.sleep(3)
        assert time.process_time() - before < 0.25
        start = time.monotonic()
        store.close()
        assert time.monotonic() - start < 5
        assert listener.told == []

    def test_an_outage_at_the_start(
        self, etcd_cluster: EtcdCluster, etcd_prefix: str, other: OwnedEtcdStore, listener: Listener
    ) -> None:
        """Who begins to follow while etcd is away is told of a gap when it is back, and of deletions after that."""
        for i in range(3):
            etcd_cluster.kill(i)
        with closing(open_store(etcd_cluster.endpoints, etcd_prefix)) as store:
            listener.follow(store)
            etcd_cluster.restore()
            listener.wait_for("gap")
            deleted = created_and_deleted(other)
            listener.wait_for(deleted)
        assert listener.told == ["gap", deleted]

    def test_a_gap_that_could_not_be_made_up(self, etcd_cluster: EtcdCluster, etcd_prefix: str) -> None:
        """Who compares bytes and records meets the next outage: the gap is told until that has worked."""
        failures, told = iter([Unavailable("again"), Unavailable("and again")]), threading.Event()

        def gap() -> None:
            if (failure := next(failures, None)) is not None:
                raise failure
            told.set()

        for i in range(3):
            etcd_cluster.kill(i)
        with closing(open_store(etcd_cluster.endpoints, etcd_prefix)) as store:
            store.follow_deletions(lambda _image_id: None, gap)
            etcd_cluster.restore()
            assert told.wait(PROMISED_SECONDS + 2)


def test_a_compaction(etcd_cluster: EtcdCluster, other: OwnedEtcdStore, etcd_prefix: str, listener: Listener) -> None:
    """When etcd drops what was not told yet, a gap is told instead, once; deletions after it are told again."""
    with ExitStack() as stack:
        one_endpoint = Etcd(etcd_cluster.endpoints[:1])
        lagging = stack.enter_context(closing(OwnedEtcdStore(one_endpoint, etcd_prefix, new_member())))
        listener.follow(lagging)
        listener.wait_for(created_and_deleted(other))
        etcd_cluster.stop(0)
        missed = created_and_deleted(other)
        etcd_cluster.call("/v3/kv/compaction", {"revision": other.etcd.range("x").revision}, 1)
        # A watch that is still open could tell the deletion in the moment before the member hears of the compaction.
        wait_for(lambda: lagging.stale is not None, 10, "word that etcd is gone")
        assert lagging._follower is not None
        lagging._follower._end_watch()
        etcd_cluster.cont(0)
        listener.wait_for("gap", 10)
        deleted = created_and_deleted(other)
        listener.wait_for(deleted)
        assert missed not in listener.told
        assert listener.told[1:] == ["gap", deleted]


def test_only_deletions_of_records(store: OwnedEtcdStore, other: OwnedEtcdStore, listener: Listener) -> None:
    """Records that come and change, and owners and holders that go, are no news; a deletion is told to all."""
    current = other.create(image("http://source.example/x"))
    listener.follow(store)
    listener.follow(other)
    current = other.update(other.update(current.started(5)).completed(5, "ab"))
    other.release(current.id)
    other.delete(current.id)
    deleted = [current.id] + [created_and_deleted(store) for _ in range(3)]
    listener.wait_for(deleted[-1])
    time.sleep(0.5)
    assert sorted(listener.told) == sorted(deleted * 2)


def test_none_is_lost_between_two_watches(store: OwnedEtcdStore, other: OwnedEtcdStore, listener: Listener) -> None:
    """A deletion is told exactly once, whenever it comes."""
    listener.follow(store)
    deleted = []
    end = time.monotonic() + 3.5
    while time.monotonic() < end:
        deleted.append(created_and_deleted(other))
    listener.wait_for(deleted[-1])
    assert listener.told == deleted


def test_close(store: OwnedEtcdStore, listener: Listener) -> None:
    """The end does not wait for anything, and after it nothing is told."""
    listener.follow(store)
    time.sleep(0.5)
    start = time.monotonic()
    EtcdMetadataStore.close(store)
    assert time.monotonic() - start < 0.5
    created_and_deleted(store)
    time.sleep(0.5)
    assert listener.told == []


def test_a_listener_that_fails(store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
    """An exception of the listener is its own affair: the next deletion is told."""
    listener = Listener()

    def fail(image_id: str) -> None:
        listener.hear(image_id)
        raise ZeroDivisionError

    store.follow_deletions(fail, lambda: None)
    for _ in range(2):
        listener.wait_for(created_and_deleted(other))
