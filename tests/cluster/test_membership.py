"""A member's lease, against a real etcd: kept while the process lives, gone when it dies, and replaced when lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from imgsvc import __version__
from imgsvc.cluster import membership
from imgsvc.cluster.membership import LEASE_SECONDS, Membership
from imgsvc.cluster.this_member import ThisMember
from imgsvc.errors import Unavailable
from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import Layout
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import parse_time
from tests.etcd_cluster import EtcdCluster
from tests.harness import freeze
from tests.metadata.etcd_store import OwnedEtcdStore, new_member, open_store
from tests.metadata.helpers import entry, image

TTL = 2

# What another process does: creates an image, says which, and waits to be killed.
DYING_MEMBER = """
import sys, time
from imgsvc.metadata.image import Image, ImageType, new_id
from tests.harness import freeze
from tests.images.helpers import put as put_image
from tests.metadata.etcd_store import open_store
store = open_store(sys.argv[1].split(","), sys.argv[2], ttl=int(sys.argv[3]))
held = store.update(store.create(Image(new_id(), ImageType.KVM)).completed(1, "ab"))
pending = store.create(Image(new_id(), ImageType.KVM))
print(store.member.id, held.id, pending.id, file=sys.stderr, flush=True)
time.sleep(60)
"""


@pytest.fixture
def store(etcd_cluster: EtcdCluster, etcd_prefix: str) -> Iterator[OwnedEtcdStore]:
    with closing(open_store(etcd_cluster.endpoints, etcd_prefix, ttl=TTL)) as store:
        store.membership.lease()
        yield store


@pytest.fixture
def observer(etcd_cluster: EtcdCluster, etcd_prefix: str) -> Iterator[OwnedEtcdStore]:
    """Another member."""
    with closing(open_store(etcd_cluster.endpoints, etcd_prefix)) as observer:
        yield observer


def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def members(observer: OwnedEtcdStore) -> dict[str, dict[str, object]]:
    """What members say of themselves, by id; the observer apart."""
    start = observer._layout.members
    items = observer.etcd.range(start, start[:-1] + "0").items
    said = {item.key.removeprefix(start): json.loads(item.value) for item in items}
    said.pop(observer.member.id, None)
    return said


class TestDeath:
    def test_kill(self, etcd_cluster: EtcdCluster, etcd_prefix: str, observer: OwnedEtcdStore) -> None:
        """Of a process that was killed, what it owned is soon nobody's, and what it held stays on record."""
        arguments = [",".join(etcd_cluster.endpoints), etcd_prefix, str(TTL)]
        process = subprocess.Popen(
            [sys.executable, "-c", DYING_MEMBER, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
        with process:
            assert process.stderr is not None
            member, held, pending = process.stderr.readline().split()
            assert entry(observer, pending).owner == member
            assert set(members(observer)) == {member}
            process.kill()
        eventually(lambda: entry(observer, pending).owner is None)
        eventually(lambda: members(observer) == {})
        assert len(observer.holders(held)) == 1

    def test_close(self, store: OwnedEtcdStore, observer: OwnedEtcdStore) -> None:
        """A member that closes is gone at once, and may close again."""
        pending = store.create(image())
        store.close()
        store.membership.close()
        assert entry(observer, pending.id).owner is None
        assert members(observer) == {}
        assert store.membership.lease_id is None

    def test_after_close(self, store: OwnedEtcdStore) -> None:
        """A member without lease is not ready, and creates nothing; it says so at once."""
        store.membership.close()
        start = time.monotonic()
        with pytest.raises(Unavailable, match="lease"):
            store.ping()
        with pytest.raises(Unavailable, match="lease"):
            store.create(image())
        assert time.monotonic() - start < 1

    def test_close_in_an_outage(self, etcd_cluster: EtcdCluster, store: OwnedEtcdStore) -> None:
        """When etcd does not answer, closing does not wait for it for long."""
        for i in range(3):
            etcd_cluster.stop(i)
        start = time.monotonic()
        store.close()
        assert time.monotonic() - start < 8


class TestLoss:
    def test_a_lease_that_etcd_has_dropped(self, store: OwnedEtcdStore, observer: OwnedEtcdStore) -> None:
        """A write that finds its lease gone gets a new one and succeeds; the other images are owned again."""
        one, two = store.create(image()), store.create(image())
        lost = store.membership.lease_id
        assert lost is not None
        observer.etcd.revoke(lost)
        assert entry(observer, one.id).owner in (None, store.member.id)  # its own thread may have been quicker
        store.update(one.started(5))
        assert store.membership.lease_id not in (None, lost)
        assert entry(observer, one.id).owner == entry(observer, two.id).owner == store.member.id
        assert set(members(observer)) == {store.member.id}

    def test_what_changed_meanwhile(self, store: OwnedEtcdStore, observer: OwnedEtcdStore) -> None:
        """What another member changed, finished or deleted is not owned again."""
        taken, finished, deleted = (store.create(image()) for _ in range(3))
        lost = store.membership.lease_id
        assert lost is not None
        for each in (taken, finished):
            observer.etcd.delete(observer._layout.owner(each.id))
        observer.update(taken.started(1))
        observer.update(finished.failed("it was"))
        observer.delete(deleted.id)
        observer.etcd.revoke(lost)
        eventually(lambda: store.membership.lease_id not in (None, lost))
        assert entry(observer, taken.id).owner == observer.member.id
        assert entry(observer, finished.id).owner is None
        start = observer._layout.image(deleted.id)
        assert observer.etcd.range(start, start[:-1] + "0").items == []

    def test_a_long_outage(self, etcd_cluster: EtcdCluster, store: OwnedEtcdStore, observer: OwnedEtcdStore) -> None:
        """A lease that could not be kept is not relied on; when etcd is back there is one, and all is owned again."""
        pending = store.create(image())
        for i in range(3):
            etcd_cluster.stop(i)
        # The last renewal was asked for before this, and etcd counts from when it heard of it.
        silent = time.monotonic()
        store.membership.lease()
        time.sleep(silent + TTL - time.monotonic())
        assert store.membership.lease_id is None
        start = time.monotonic()
        with pytest.raises(Unavailable, match="lease"):
            store.create(image())
        assert time.monotonic() - start < 3
        etcd_cluster.restore()
        eventually(lambda: store.membership.lease_id is not None)
        eventually(lambda: entry(observer, pending.id).owner == store.member.id)
        store.create(image())


# Answers each line with the lease that it trusts in at that moment.
FROZEN_MEMBER = """
import sys
from tests.harness import freeze
from tests.images.helpers import put as put_image
from tests.metadata.etcd_store import open_store
store = open_store(sys.argv[1].split(","), sys.argv[2], ttl=int(sys.argv[3]))
store.membership.lease()
print(store.member.id, file=sys.stderr, flush=True)
for line in sys.stdin:
    print(store.membership.lease_id, file=sys.stderr, flush=True)
"""


@contextmanager
def child(program: str, etcd_cluster: EtcdCluster, etcd_prefix: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process over the same etcd, which speaks on its standard error; killed in the end."""
    arguments = [",".join(etcd_cluster.endpoints), etcd_prefix, str(TTL)]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def trusted(process: subprocess.Popen[bytes]) -> str:
    """The lease that a frozen or running member trusts in, as soon as it is asked and runs."""
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(b"?\n")
    process.stdin.flush()
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
    return process.stderr.readline().decode().strip()


class TestPauses:
    def test_a_frozen_process(self, etcd_cluster: EtcdCluster, etcd_prefix: str, observer: OwnedEtcdStore) -> None:
        """Whoever was stopped for longer than its lease does not trust in it for a moment when it goes on, and has a new
        one soon."""
        with child(FROZEN_MEMBER, etcd_cluster, etcd_prefix) as process:
            assert process.stderr is not None
            member = process.stderr.readline().decode().strip()
            first = trusted(process)
            assert first.isdecimal()
            freeze(process)
            eventually(lambda: members(observer) == {})
            assert trusted(process) != first
            eventually(lambda: trusted(process).isdecimal())
            assert set(members(observer)) == {member}

    def test_a_machine_that_slept(self, observer: OwnedEtcdStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a clock that counts that time: nothing is trusted right after it, and nobody waits for the next renewal."""
        first = observer.membership.lease()
        assert abs(membership._now() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1
        now = membership._now
        monkeypatch.setattr(membership, "_now", lambda: now() + 3600)
        assert observer.membership.lease_id is None
        start = time.monotonic()
        assert observer.membership.lease() == first
        assert time.monotonic() - start < 1.5

    @pytest.mark.release
    def test_the_leader_is_frozen(self, etcd_cluster: EtcdCluster, observer: OwnedEtcdStore) -> None:
        """One of three that answers nothing, even the leader, costs no lease of the usual length."""
        first = observer.membership.lease()
        etcd_cluster.stop(etcd_cluster.leader())
        end = time.monotonic() + 2 * LEASE_SECONDS
        while time.monotonic() < end:
            assert observer.membership.lease_id == first
            time.sleep(0.05)

    def test_a_disk_that_hangs(self, etcd: EtcdCluster, etcd_prefix: str) -> None:
        """It keeps nobody from having a lease, nor from renewing it; what it says follows when it can."""
        gate = threading.Event()
        member, images = new_member(), MemoryImageStore()
        this = ThisMember(member, images)
        with pytest.MonkeyPatch.context() as patched, closing(Etcd(etcd.endpoints)) as connection:
            patched.setattr(images, "count", lambda: gate.wait(20) and 7)
            with closing(Membership(connection, etcd_prefix, this, seat="here", ttl=TTL)) as held:
                first = held.lease()
                time.sleep(1.5 * TTL)
                assert held.lease_id == first
                key = Layout(etcd_prefix).member(member.id)
                assert json.loads(connection.range(key).items[0].value)["free"] is None
                gate.set()
                eventually(lambda: json.loads(connection.range(key).items[0].value)["images"] == 7)


class TestLife:
    def test_it_is_kept(self, store: OwnedEtcdStore) -> None:
        """A lease outlives its time as long as the process runs."""
        first = store.membership.lease_id
        assert first is not None
        end = time.monotonic() + 2 * TTL
        while time.monotonic() < end:
            assert store.membership.lease_id == first
            time.sleep(0.05)
        store.etcd.keep_alive(first)

    def test_a_member_of_etcd_is_killed(self, etcd_cluster: EtcdCluster, observer: OwnedEtcdStore) -> None:
        """One of three gone, even the leader, costs no lease of the usual length."""
        first = observer.membership.lease()
        etcd_cluster.kill(etcd_cluster.leader())
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert observer.membership.lease_id == first
            time.sleep(0.05)

    def test_what_it_says(self, store: OwnedEtcdStore, observer: OwnedEtcdStore) -> None:
        """Where a member is, what it runs, what it holds and can take, and since when."""
        said = members(observer)[store.member.id]
        started = said.pop("started")
        assert said == {
            "url": store.member.url,
            "version": __version__,
            "free": 64 << 20,
            "total": 64 << 20,
            "images": 0,
            "host": socket.gethostname(),
            "seat": store.member.site,
        }
        assert isinstance(started, str)
        assert parse_time(started) is not None

    def test_a_disk_in_trouble(self, etcd: EtcdCluster, etcd_prefix: str) -> None:
        """A member whose disk cannot tell its space is a member still."""
        member, images = new_member(), MemoryImageStore()
        images.close()
        with closing(Etcd(etcd.endpoints)) as connection:
            membership = Membership(connection, etcd_prefix, ThisMember(member, images), seat="here")
            with closing(membership):
                membership.lease()
                (item,) = connection.range(Layout(etcd_prefix).member(member.id)).items
                assert json.loads(item.value)["free"] is None
