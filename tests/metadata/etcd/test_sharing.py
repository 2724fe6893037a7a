"""What members that share their records in etcd may do to one image, and what they know of each other."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from functools import partial

import pytest

from imgsvc.errors import Conflict, NotFound, SourceTaken
from imgsvc.metadata.image import Image, Status, new_id
from imgsvc.metadata.store import Entry, Member
from tests.etcd_cluster import EtcdCluster
from tests.harness import wait_for
from tests.metadata.etcd.helpers import SOURCE, Raw
from tests.metadata.etcd_store import OwnedEtcdStore, open_store
from tests.metadata.helpers import at_once, entry, image, listed


class TestSharing:
    def test_creates_of_one_source_at_two_members(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """Of 32 creates of one source at two members one makes an image, and the others are told which."""
        outcomes = at_once([partial(each.create, image(SOURCE)) for each in [store, other] * 16])
        (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Image)]
        assert all(outcome.image == winner for outcome in outcomes if isinstance(outcome, SourceTaken))
        assert listed(store) == [winner]
        wait_for(lambda: listed(other) == [winner], 5, "the same list at the other")

    def test_equal_updates_of_two_members(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """Two members that fetch a failed image again write the same record; one of them may."""
        failed = store.update(store.create(image(SOURCE)).failed("no route"))
        outcomes = at_once([partial(each.update, failed.requeued()) for each in (store, other)])
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Conflict", "Image"]
        winner = store if isinstance(outcomes[0], Image) else other
        assert entry(store, failed.id).owner == winner.member.id

    def test_a_transfer_of_another_member(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """Nobody but its owner writes its record; but anybody may delete it."""
        created = store.create(image())
        for change in (created.started(5), created.completed(5, "ab"), created.failed("by hand"), created.requeued()):
            with pytest.raises(Conflict):
                other.update(change)
        assert entry(other, created.id) == Entry(created, store.member.id, here=False)
        store.update(created.started(5))
        other.delete(created.id)
        with pytest.raises(NotFound):
            store.update(created.started(5))

    def test_holders(self, store: OwnedEtcdStore, other: OwnedEtcdStore, raw: Raw) -> None:
        """Another member is named with its address: the present one if it runs, else that of its note."""
        held = store.update(store.create(image()).completed(1, "ab"))
        other.hold(held)
        gone = new_id()
        raw.put(f"/images/{held.id}/replicas/{gone}", '{"url": "http://gone.example"}')
        unknown = new_id()
        raw.put(f"/images/{held.id}/replicas/{unknown}", "nonsense")
        running = other.member.id
        raw.put(f"/images/{held.id}/replicas/{running}", '{"url": "http://old.example"}')
        assert sorted(store.holders(held.id)) == sorted(
            [
                f"{running} at http://other.example:20000",
                f"{gone} at http://gone.example",
                f"{unknown} at an unknown address",
            ]
        )
        assert f"{store.member.id} at http://one.example:20000" in other.holders(held.id)

    def test_one_copy_of_two_is_lost(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """The image stays, and the other's note; when that one is lost as well, the image is."""
        held = store.update(store.create(image()).completed(1, "ab"))
        other.hold(held)
        failed = held.failed("it rotted")
        assert not store.lose_copy(failed, lambda: True)
        assert not store.lose_copy(failed, lambda: True)
        assert store.get(held.id) == dataclasses.replace(held, replicas=(other.member.id,))
        assert other.lose_copy(failed, lambda: True)
        assert (store.get(held.id).status, store.get(held.id).replicas) == (Status.ERROR, ())

    def test_copies_that_come_and_go_while_one_is_lost(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """What is compared are the notes as they are when it is written."""
        held = store.update(store.create(image()).completed(1, "ab"))
        changes = iter([partial(other.hold, held), partial(other.release, held.id), partial(other.hold, held)])

        def meanwhile() -> bool:
            next(changes, lambda: None)()
            return True

        assert not store.lose_copy(held.failed("it rotted"), meanwhile)
        assert store.get(held.id) == dataclasses.replace(held, replicas=(other.member.id,))

    @pytest.mark.parametrize("others", [False, True])
    def test_a_copy_that_comes_back_while_it_is_lost(
        self, store: OwnedEtcdStore, other: OwnedEtcdStore, *, others: bool
    ) -> None:
        """Its new note stays."""
        held = store.update(store.create(image()).completed(1, "ab"))
        if others:
            other.hold(held)
        looks: list[None] = []

        def is_gone() -> bool:
            """At the first look it is; then it comes."""
            looks.append(None)
            store.hold(held)
            return len(looks) == 1

        with pytest.raises(Conflict):
            store.lose_copy(held.failed("it rotted"), is_gone)
        assert store.get(held.id).revision == held.revision
        assert store.member.id in (store.get(held.id).replicas or ())

    def test_a_predecessor(self, etcd: EtcdCluster, etcd_prefix: str, store: OwnedEtcdStore, member: Member) -> None:
        """A member whose directory may have lost its marker is told what was held there before. Nothing more, as another
        host may have the same name and path: who has another id is another."""
        held = store.update(store.create(image()).completed(1, "ab"))
        successor = dataclasses.replace(member, id=new_id())
        elsewhere = dataclasses.replace(successor, site="two.example:/images")
        with closing(open_store(etcd.endpoints, etcd_prefix, successor)) as successor_store:
            assert entry(successor_store, held.id) == Entry(held, owner=None, here=False, was_here=True)
            assert len(successor_store.holders(held.id)) == 1
        with closing(open_store(etcd.endpoints, etcd_prefix, elsewhere)) as elsewhere_store:
            assert entry(elsewhere_store, held.id) == Entry(held, owner=None, here=False)
            assert len(elsewhere_store.holders(held.id)) == 1
