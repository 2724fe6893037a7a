"""What a member says of itself: how often, and what becomes of two that say it under one name."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import pytest

from imgsvc.cluster import member_key
from imgsvc.cluster.membership import Membership
from imgsvc.cluster.this_member import ThisMember
from imgsvc.errors import Unavailable
from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import Layout
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import new_id
from imgsvc.metadata.mirror import LiveMember
from tests.cluster.test_membership import TTL, eventually
from tests.etcd_cluster import EtcdCluster
from tests.images.helpers import put as put_image
from tests.metadata.etcd_store import OwnedEtcdStore, new_member


class TestTheKey:
    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(member_key, "_LOOK_SECONDS", 0.05)

    @pytest.fixture
    def connection(self, etcd: EtcdCluster) -> Iterator[Etcd]:
        with closing(Etcd(etcd.endpoints)) as connection:
            yield connection

    def test_somebody_deletes_it(self, connection: Etcd, etcd_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is put back, on the same lease."""
        monkeypatch.setattr(member_key, "_TELL_SECONDS", 0.2)
        this = ThisMember(new_member(), MemoryImageStore())
        key = Layout(etcd_prefix).member(this.id)
        with closing(Membership(connection, etcd_prefix, this, seat="here", ttl=TTL)) as held:
            first = held.lease()
            connection.delete(key)
            eventually(lambda: bool(connection.range(key).items))
            assert held.lease_id == first

    def test_a_mirror_shows_that_somebody_deletes_it(
        self, connection: Etcd, etcd_prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is put back long before the next look would be."""
        monkeypatch.setattr(member_key, "_LOOK_SECONDS", 60.0)
        member = new_member()
        key = Layout(etcd_prefix).member(member.id)

        def created() -> list[int]:
            return [item.created for item in connection.range(key).items]

        with closing(OwnedEtcdStore(connection, etcd_prefix, member)) as store:
            store.membership.take_place(MemoryImageStore(), store.mirror)
            store.membership.stay_in(store.mirror)
            for _ in range(3):
                before = created()
                connection.delete(key)
                eventually(lambda before=before: created() not in ([], before))  # type: ignore[misc]
                eventually(lambda: member.id in store.mirror.members())

    def test_how_often_it_is_written(self, connection: Etcd, etcd_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """At once when much has changed, within a minute when little has, and never when nothing has."""
        images = MemoryImageStore()
        images.mark("these")
        this = ThisMember(new_member(), images)
        key = Layout(etcd_prefix).member(this.id)

        def written() -> int:
            return connection.range(key).items[0].modified

        def said() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(connection.range(key).items[0].value)
            return found

        with closing(Membership(connection, etcd_prefix, this, seat="here")) as held:
            held.lease()
            # On a busy machine the first word of it may come before the disk was looked at.
            eventually(lambda: said()["free"] is not None)
            before = written()
            put_image(images, new_id(), b"little")
            time.sleep(0.5)
            assert written() == before
            with images._lock:  # at once: a look in the middle of it would be told, too
                put_image(images, new_id(), bytes(8 << 20))
            eventually(lambda: written() > before)
            assert (said()["images"], said()["free"]) == (2, images.space().free)
            before = written()
            monkeypatch.setattr(member_key, "_TELL_SECONDS", 0.1)
            time.sleep(0.5)
            assert written() == before
            put_image(images, new_id(), b"little")
            eventually(lambda: written() > before)

    @pytest.mark.parametrize(
        ("changed", "much"),
        [
            ({}, False),
            ({"free": 460}, False),
            ({"free": 440}, True),
            ({"free": 560}, True),
            ({"free": None}, True),
            ({"total": 1100}, True),
            ({"images": 1099}, False),
            ({"images": 1101}, True),
            ({"images": 890}, True),
        ],
        ids=str,
    )
    def test_what_is_much(self, changed: dict[str, Any], much: bool) -> None:
        told = LiveMember("a", "", free=500, total=1000, images=1000)
        assert member_key.differs_much(told, replace(told, **changed)) == much


class TestOfTheSameName:
    """Two with one id, in different places."""

    @pytest.fixture
    def two(self, etcd: EtcdCluster, etcd_prefix: str) -> Iterator[tuple[Membership, Membership, Etcd]]:
        member = new_member("first")
        with ExitStack() as opened:
            connection = opened.enter_context(closing(Etcd(etcd.endpoints)))

            def start(seat: str) -> Membership:
                this = ThisMember(member, MemoryImageStore())
                held = Membership(connection, etcd_prefix, this, seat=seat, ttl=TTL)
                return opened.enter_context(closing(held))

            first = start("one")
            first.lease()
            yield first, start("other"), connection

    def test_the_second_waits(self, two: tuple[Membership, Membership, Etcd]) -> None:
        """It says for whom, and has the id when the first has left."""
        first, second, _ = two
        with pytest.raises(Unavailable, match=r"in use at http://first\.example:20000, on host"):
            second.lease()
        time.sleep(TTL)
        assert second.lease_id is None
        assert first.lease_id is not None
        first.close()
        eventually(lambda: second.lease_id is not None)

    @pytest.mark.release
    def test_the_first_comes_back(self, two: tuple[Membership, Membership, Etcd]) -> None:
        """One that lost its lease to the other claims nothing from then on, until that one leaves."""
        first, second, connection = two
        lost = first.lease()
        connection.revoke(lost)
        eventually(lambda: (first.lease_id is None) != (second.lease_id is None))
        winner, loser = (first, second) if second.lease_id is None else (second, first)
        time.sleep(1.5 * TTL)
        assert loser.lease_id is None
        assert winner.lease_id is not None
        winner.close()
        eventually(lambda: loser.lease_id is not None)
