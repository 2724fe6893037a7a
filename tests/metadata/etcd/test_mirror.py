"""Every member has what etcd has: at once what it wrote itself, soon what others did, and through all outages what was
there last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest

from imgsvc.errors import NotFound, Unavailable
from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import Layout
from imgsvc.etcd_messages import Changes, put
from imgsvc.metadata.image import Image, new_id
from imgsvc.metadata.store import MetadataStore
from tests.etcd_cluster import EtcdCluster
from tests.harness import wait_for
from tests.metadata.etcd.test_watch import Listener, created_and_deleted, endpoint_in_use
from tests.metadata.etcd_store import OwnedEtcdStore, new_member, open_store
from tests.metadata.helpers import image, listed

# In which a change reaches another member, whatever single member of etcd is gone, and an outage is known.
SOON = 2.0
OUTAGE = 2.5

Harm = Callable[[EtcdCluster, int], None]


@pytest.fixture
def cluster(etcd_cluster: EtcdCluster) -> EtcdCluster:
    """Of three, to which tests do things."""
    return etcd_cluster


def ids(store: MetadataStore) -> set[str]:
    return {Image.from_json(document).id for page in store.list() for document in page}


@contextmanager
def lagging(store: OwnedEtcdStore) -> Iterator[None]:
    """Its watch has come, and is not read, until the end."""
    follower = store._follower
    assert follower is not None
    may_go_on, apply = threading.Event(), follower._apply

    def wait_and_apply(news: Changes) -> None:
        may_go_on.wait()
        apply(news)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follower, "_apply", wait_and_apply)
        try:
            yield
        finally:
            may_go_on.set()


class TestOwnWrites:
    def test_are_seen_at_once(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """In lists and looks at the same member, however late the watch is; and what it tells then undoes nothing."""
        kept, gone = store.create(image()), store.create(image())
        wait_for(lambda: ids(other) == {kept.id, gone.id}, SOON, "both at the other")
        with lagging(store):
            assert listed(store) == sorted([kept, gone], key=lambda image: image.id)
            for size in range(1, 4):
                kept = store.update(kept.progressed(size))
                assert kept in listed(store)
            kept = store.update(kept.completed(3, "ab"))
            assert kept.replicas == (store.member.id,)
            store.delete(gone.id)
            added = store.create(image())
            other.hold(kept)
            for _ in range(2):
                held = store.get(kept.id)
                assert listed(store) == sorted([held, added], key=lambda image: image.id)
                store.release(kept.id)
        before = sorted([store.get(kept.id), added], key=lambda image: image.id)
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert listed(store) == before
        assert store.mirror._ahead == {}
        assert store.mirror.is_deleted(gone.id)

    def test_owners_and_carriers(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """All members know who transfers what, until when to wait for it, and who held it when that was lost."""
        begun = store.create(image())
        store.expect(begun.id, 55.5)
        wait_for(lambda: ids(other) == {begun.id}, SOON, "the record")
        wait_for(lambda: other.mirror.get(begun.id).carrier == store.mirror.get(begun.id).carrier, SOON, "the note")
        known = other.mirror.get(begun.id)
        assert known.owner == store.member.id
        assert known.carrier is not None
        assert (known.carrier.member, known.carrier.url, known.carrier.until) == (
            store.member.id,
            store.member.url,
            55.5,
        )
        store.close()
        wait_for(lambda: other.mirror.get(begun.id).owner is None, SOON, "the owner has gone")
        assert other.mirror.get(begun.id).carrier == known.carrier
        assert store.member.id not in other.mirror.members()
        assert other.mirror.gone_for(store.member.id) < SOON
        assert other.member.id in other.mirror.members()


class TestOutages:
    def gone(self, cluster: EtcdCluster, harm: Harm, store: OwnedEtcdStore) -> float:
        """Seconds from the loss of all members of etcd to the first answer that says so."""
        for i in range(3):
            harm(cluster, i)
        began = time.monotonic()
        wait_for(lambda: store.stale is not None, OUTAGE, "word of the outage")
        return time.monotonic() - began

    @pytest.mark.parametrize("harm", [EtcdCluster.kill, EtcdCluster.stop], ids=["killed", "frozen"])
    def test_all_of_etcd(self, etcd_cluster: EtcdCluster, etcd_prefix: str, opened: ExitStack, harm: Harm) -> None:
        """Lists and looks go on, say how old they are and take no time; writes do not; afterwards all is as before."""
        connection = Etcd(etcd_cluster.endpoints, timeout=1.0)
        store = opened.enter_context(closing(OwnedEtcdStore(connection, etcd_prefix, new_member())))
        kept, deleted = store.create(image()), created_and_deleted(store)
        assert store.look(kept.id) == (kept, None)
        for i in range(3):
            harm(etcd_cluster, i)
        began = time.monotonic()
        found, age = store.look(kept.id)  # which nobody has noticed yet
        assert time.monotonic() - began < 1
        assert found == kept
        assert age is not None
        assert age < OUTAGE
        began = time.monotonic()
        for _ in range(20):
            assert store.look(kept.id)[1] is not None
            assert ids(store) == {kept.id}
        assert time.monotonic() - began < 0.5
        assert store.stale is not None
        with pytest.raises(NotFound):
            store.look(deleted)
        for unknown in (new_id(), new_id()):
            with pytest.raises(Unavailable):
                store.look(unknown)
        with pytest.raises(NotFound):
            store.look("no id")
        with pytest.raises(Unavailable):
            store.update(kept.started(5))
        etcd_cluster.restore()
        wait_for(lambda: store.stale is None, 10, "word that it is back")
        # Of a lease that was lost meanwhile this knows nothing.
        wait_for(lambda: store.look(kept.id)[1] is None, SOON, "a fresh look")
        assert store.look(kept.id)[0].revision >= kept.revision

    @pytest.mark.parametrize("harm", [EtcdCluster.kill, EtcdCluster.stop], ids=["killed", "frozen"])
    def test_it_is_noticed(self, etcd_cluster: EtcdCluster, store: OwnedEtcdStore, harm: Harm) -> None:
        """Within two seconds, without anybody asking for anything; one that freezes gives no sign of it."""
        wait_for(lambda: store.stale is None, 10, "the beginning")
        assert self.gone(etcd_cluster, harm, store) < OUTAGE

    @pytest.mark.parametrize("harm", [EtcdCluster.kill, EtcdCluster.stop], ids=["killed", "frozen"])
    @pytest.mark.parametrize("whom", ["the watched one", "the leader"])
    def test_one_member_of_etcd(
        self, etcd_cluster: EtcdCluster, store: OwnedEtcdStore, other: OwnedEtcdStore, harm: Harm, whom: str
    ) -> None:
        """What others do is seen soon all the same: changes, and what is new and gone."""
        kept, gone = other.create(image()), other.create(image())
        wait_for(lambda: ids(store) == {kept.id, gone.id}, SOON, "both")
        victim = etcd_cluster.leader() if whom == "the leader" else endpoint_in_use(etcd_cluster, store)
        harm(etcd_cluster, victim)
        other.delete(gone.id)
        current, added = other.update(kept.progressed(4)), other.create(image())
        wait_for(lambda: ids(store) == {kept.id, added.id}, SOON, "what happened")
        wait_for(lambda: store.mirror.get(kept.id).revision == current.revision, SOON, "the change")
        wait_for(lambda: store.stale is None, SOON, "word that all is well")

    def test_a_compaction_meanwhile(
        self, etcd_cluster: EtcdCluster, store: OwnedEtcdStore, other: OwnedEtcdStore, etcd_prefix: str
    ) -> None:
        """What happened while nothing could be heard, and was then compacted away, is there all the same; and so is
        what this member wrote itself."""
        kept, gone = other.create(image()), other.create(image())
        own = store.create(image())
        wait_for(lambda: ids(store) == {kept.id, gone.id, own.id}, SOON, "all three")
        listener = Listener()
        listener.follow(store)
        with lagging(store):
            other.delete(gone.id)
            current, added = other.update(kept.progressed(4)), other.create(image())
            late = store.create(image())
            etcd_cluster.call("/v3/kv/compaction", {"revision": other.etcd.range("x").revision}, 1)
            assert store._follower is not None
            with store._follower._lock:
                store._follower._at = 1  # as if it had been away for as long
            store._follower._end_watch()
        wait_for(lambda: ids(store) == {kept.id, own.id, added.id, late.id}, 5, "what happened")
        assert store.mirror.get(kept.id).revision == current.revision
        listener.wait_for("gap")

    def test_etcd_set_up_anew(self, opened: ExitStack) -> None:
        """With the same command line, and nothing in it: then there is nothing, and what comes is seen."""
        cluster = opened.enter_context(closing(EtcdCluster()))
        store = opened.enter_context(closing(open_store(cluster.endpoints, "/anew")))
        listener = Listener()
        listener.follow(store)
        identity = store.identity
        for _ in range(10):
            store.create(image())
        wait_for(lambda: store.stale is None and len(ids(store)) == 10, SOON, "all ten")
        cluster.kill(0)
        cluster.wipe(0)
        cluster.start(0)
        cluster.wait_healthy()
        wait_for(lambda: ids(store) == set(), 10, "nothing")
        listener.wait_for("gap")
        assert not [news for news in listener.told if news != "gap"]
        added = store.create(image())
        assert ids(store) == {added.id}
        assert store.identity != identity
        with closing(open_store(cluster.endpoints, "/anew")) as other:
            later = other.create(image())
        wait_for(lambda: ids(store) == {added.id, later.id}, SOON, "what another wrote")


class TestQuickly:
    def test_changes_are_seen_soon(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """Within a second for certain, and mostly at once."""
        took = []
        for _ in range(20):
            created = other.create(image())
            began = time.monotonic()
            wait_for(lambda created=created: created.id in ids(store), SOON, "it")  # type: ignore[misc]
            took.append(time.monotonic() - began)
        assert sorted(took)[10] < 0.2
        assert max(took) < 1

    def test_idling_is_cheap(self, store: OwnedEtcdStore) -> None:
        """Nothing happens in etcd: a second of that costs little, however many images there are."""
        listed(store)
        before = time.process_time()
        time.sleep(1)
        assert time.process_time() - before < 0.1

    def test_other_keys_do_not_matter(self, store: OwnedEtcdStore) -> None:
        """What others write elsewhere moves etcd's revision, and makes neither outages nor watches."""
        follower = store._follower
        assert follower is not None
        wait_for(lambda: store.stale is None and follower._watch is not None, 10, "the beginning")
        watch = follower._watch
        until = time.monotonic() + 2
        while time.monotonic() < until:
            store.etcd.transact([], [put("/elsewhere", "x")])
            assert store.stale is None
            time.sleep(0.05)
        assert follower._watch is watch


def test_what_was_asked_before_there_was_a_name(etcd: EtcdCluster, etcd_prefix: str) -> None:
    """An answer that was on its way while these records got their name and were read is none of another etcd: nothing
    is read again, or forgotten."""
    with closing(Etcd(etcd.endpoints)) as connection:
        late = connection.range(Layout(etcd_prefix).records)
    assert not late.items
    with closing(open_store(etcd.endpoints, etcd_prefix)) as store:
        follower = store._follower
        assert follower is not None
        wait_for(lambda: follower._watch is not None, 10, "the beginning")
        watch = follower._watch
        follower._judge(late, 0)
        assert follower._at is not None
        assert follower._watch is watch


def test_a_position_names_the_records(etcd: EtcdCluster, etcd_prefix: str) -> None:
    """Also the first one of all, of records that nobody has named before: without the name, these records would not be
    known again after a restore."""
    with closing(open_store(etcd.endpoints, etcd_prefix)) as store:
        wait_for(lambda: store.mark(""), 5, "the position is known")
        cluster, name, *_ = store.mark("").split(" ")
        assert store.identity == f"etcd:{cluster}:{name}{etcd_prefix}"
        last = store.mark("")
        assert store.mark(last) == last
