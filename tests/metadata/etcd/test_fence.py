"""Who lost a transfer to another member can write it no more: neither progress, nor its end, nor that it owns it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial

import pytest

from imgsvc.errors import Conflict, NotFound, Unavailable
from imgsvc.etcd import Etcd, LeaseLost
from imgsvc.etcd_messages import put
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.etcd import EtcdMetadataStore
from imgsvc.metadata.etcd_images import Found
from imgsvc.metadata.image import Image, Status
from imgsvc.metadata.mirror import Carrier
from imgsvc.metadata.store import Member
from imgsvc.settlements import Settlements
from tests.etcd_cluster import EtcdCluster
from tests.lossy_proxy import LossyProxy
from tests.metadata.etcd_store import new_member, open_store
from tests.metadata.helpers import at_once, image
from tests.rooms import wait_until

SOURCE = "http://source.example/x"


class HeldLease:
    """A lease on a real etcd, that ends when a test says so, and is not missed before `renew`: as by a member that is
    paused."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self._lease = etcd.grant(60)
        self._restore: list[Callable[[int], None]] = []

    def lease(self, lost: int | None = None) -> int:
        if lost is not None and lost == self._lease:
            raise Unavailable("there is no other lease yet")
        return self._lease

    def on_new_lease(self, restore: Callable[[int], None]) -> None:
        self._restore.append(restore)

    def end(self) -> None:
        self._etcd.revoke(self._lease)

    def renew(self) -> None:
        lease = self._etcd.grant(60)
        for restore in self._restore:
            restore(lease)
        self._lease = lease


class Host:
    """A member, whose lease the test holds."""

    def __init__(
        self, endpoints: list[str], prefix: str, member: Member | None = None, attempt_timeout: float = 2.0
    ) -> None:
        self.member = member or new_member()
        self.etcd = Etcd(endpoints, attempt_timeout=attempt_timeout)
        self.leases = HeldLease(self.etcd)
        self.store = EtcdMetadataStore(self.etcd, prefix, self.member, self.leases)
        self.settlements = Settlements(MemoryImageStore(), self.store)

    def keys(self, image_id: str) -> Found:
        return self.store._keys.read(image_id)

    def lose(self) -> None:
        """Its lease is over, and it does not know."""
        self.leases.end()

    def close(self) -> None:
        self.store.close()
        self.etcd.close()


@pytest.fixture
def hosts(etcd: EtcdCluster, etcd_prefix: str, opened: ExitStack) -> list[Host]:
    return [opened.enter_context(closing(Host(etcd.endpoints, etcd_prefix))) for _ in range(2)]


def begun(host: Host) -> Image:
    return host.store.update(host.store.create(image(SOURCE)).started(9))


def taken_over(by: Host, image_id: str) -> Image:
    return by.store.update(by.store.get(image_id).requeued())


LATE: dict[str, Callable[[Image], Image]] = {
    "progress": lambda image: image.progressed(5),
    "complete": lambda image: image.completed(9, "ab"),
    "fail": lambda image: image.failed("the line broke"),
    "requeue": lambda image: image.requeued(),
}


class TestAPausedMember:
    @pytest.mark.parametrize("renewed", [True, False], ids=["renewed", "not renewed"])
    @pytest.mark.parametrize("alive", [True, False], ids=["alive", "dead"])
    @pytest.mark.parametrize("late", LATE)
    def test_cannot_overwrite_its_successor(self, hosts: list[Host], late: str, *, alive: bool, renewed: bool) -> None:
        """Whether the successor lives or has died itself: what the first one writes, believes or repeats changes
        nothing, also when it reads the record again, as one does whose write had an unknown outcome."""
        one, two = hosts
        mine = begun(one)
        one.lose()
        theirs = taken_over(two, mine.id)
        if not alive:
            two.lose()
        before = two.keys(mine.id).parts
        if renewed:
            one.leases.renew()
        for write in (one.store.update, one.settlements.write):
            with pytest.raises(Conflict):
                write(LATE[late](mine))
        with pytest.raises(Conflict):
            one.store.expect(mine.id, 1e9)
        assert not one.store.may_own(mine.id)
        one.leases.renew()
        assert two.keys(mine.id).parts == before
        assert two.store.get(mine.id) == theirs
        if not alive:
            two.leases.renew()
        assert two.store.update(theirs.started(9)).status is Status.DOWNLOADING

    def test_is_told_before_it_takes_over_itself(self, hosts: list[Host]) -> None:
        """When the successor has died, and the first one, back again, would take the image over before its own transfer
        has heard that it is lost, that is a conflict; after it, it is one contender of many."""
        one, two = hosts
        mine = begun(one)
        one.lose()
        taken_over(two, mine.id)
        two.lose()
        one.leases.renew()
        with pytest.raises(Conflict):
            one.store.update(one.store.get(mine.id).requeued())
        assert taken_over(one, mine.id).status is Status.PENDING

    @pytest.mark.parametrize("renewed", [True, False], ids=["renewed", "not renewed"])
    @pytest.mark.parametrize("late", LATE)
    def test_goes_on_without_a_successor(self, hosts: list[Host], late: str, *, renewed: bool) -> None:
        """When nobody took it over, it is still its own, and what it expects of others is not forgotten."""
        one, two = hosts
        mine = begun(one)
        one.store.expect(mine.id, 1e9)
        one.lose()
        one.leases.renew()
        if not renewed:
            one.lose()
        else:
            owner = two.keys(mine.id).owner
            assert owner is not None
            assert owner.text == one.member.id
        if not renewed and late in ("progress", "requeue"):
            with pytest.raises((Unavailable, LeaseLost)):
                one.store.update(LATE[late](mine))
            one.leases.renew()
        written = one.store.update(LATE[late](mine))
        found = two.keys(mine.id)
        if written.in_transfer:
            assert found.owner is not None
            assert found.carrier is not None
            assert (found.carrier.member, found.carrier.until) == (one.member.id, 1e9)
        else:
            assert (found.owner, found.carrier) == (None, None)
        assert two.store.get(mine.id) == written

    def test_repeats_a_write_after_its_lease(self, hosts: list[Host]) -> None:
        """A write whose answer was lost, and then the lease: repeated, it is the owner's again."""
        one, two = hosts
        wanted = one.store.create(image(SOURCE)).started(9)
        one.store.update(wanted)
        one.lose()
        one.store._transfers.forget(wanted.id)
        one.leases.renew()
        again = one.store.update(wanted)
        assert two.store.get(wanted.id) == again
        assert two.keys(wanted.id).owner is not None
        one.store.update(again.progressed(3))

    def test_late_requests(self, etcd: EtcdCluster, etcd_prefix: str, hosts: list[Host], opened: ExitStack) -> None:
        """A write of the first one that reaches etcd after the takeover does nothing."""
        proxy = opened.enter_context(closing(LossyProxy(etcd.endpoints[0])))
        one = opened.enter_context(closing(Host([proxy.url, *etcd.endpoints], etcd_prefix, attempt_timeout=0.5)))
        two = hosts[0]
        mine = begun(one)
        proxy.delay(b'"expected_size"')
        mine = one.store.update(mine.progressed(5))
        one.lose()
        taken_over(two, mine.id)
        before = two.keys(mine.id).parts
        proxy.deliver()
        assert two.keys(mine.id).parts == before


class TestANewLease:
    def test_thousands_of_transfers(self, etcd: EtcdCluster, etcd_prefix: str) -> None:
        """However long it takes to own all of them again: the lease is there at once, and is kept meanwhile."""
        with closing(open_store(etcd.endpoints, etcd_prefix, ttl=2)) as store:
            with ThreadPoolExecutor(16) as pool:
                owned = [each.id for each in pool.map(lambda n: store.create(image(f"{SOURCE}/{n}")), range(400))]
            lost = store.membership.lease()
            store.membership.on_new_lease(lambda _: time.sleep(5))
            store.etcd.revoke(lost)
            assert store.membership.lease(lost=lost) != lost
            time.sleep(3)
            assert store.membership.lease_id not in (None, lost)
            wait_until(lambda: all(store.mirror.get(each).owner == store.member.id for each in owned))

    def test_what_was_owned_on_one_that_was_given_up(self, hosts: list[Host]) -> None:
        """An owner's key of ours that is on another lease than the new one would go with that."""
        one, _ = hosts
        mine = begun(one)
        before = one.leases.lease()
        one.leases.renew()
        one.etcd.revoke(before)
        owner = one.keys(mine.id).owner
        assert owner is not None
        assert one.store.update(mine.progressed(1)).size == 1


class TestHolding:
    @pytest.mark.parametrize("change", ["fail", "requeue"])
    def test_what_is_not_complete_any_more(self, hosts: list[Host], change: str) -> None:
        """It may come to have other bytes, of which nobody may say that they are here."""
        one, two = hosts
        complete = one.store.update(begun(one).completed(9, "ab"))
        one.store.update(LATE[change](complete))
        with pytest.raises(Conflict):
            two.store.hold(complete)
        assert two.keys(complete.id).replicas == ()

    def test_a_note_does_not_outlive_the_bytes(self, hosts: list[Host]) -> None:
        """One that is there all the same, when the image is fetched again, is of the bytes before."""
        one, two = hosts
        failed = one.store.update(begun(one).failed("by hand"))
        one.etcd.transact([], [two.store._transfers.holding(failed.id)])
        again = one.store.update(failed.requeued())
        assert one.keys(again.id).replicas == ()


class TestTakingOver:
    def test_contenders(self, etcd: EtcdCluster, etcd_prefix: str, opened: ExitStack) -> None:
        """Of eight that take over at once one does, and the others are told."""
        hosts = [opened.enter_context(closing(Host(etcd.endpoints, etcd_prefix))) for _ in range(8)]
        for _ in range(5):
            lost = begun(hosts[0])
            hosts[0].lose()
            stored = hosts[1].store.get(lost.id)
            outcomes = at_once([partial(host.store.update, stored.requeued()) for host in hosts[1:]])
            assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Conflict"] * 6 + ["Image"]
            winner = hosts[1:][[isinstance(outcome, Image) for outcome in outcomes].index(True)]
            found = winner.keys(lost.id)
            assert found.owner is not None
            assert found.carrier is not None
            assert found.owner.text == found.carrier.member == winner.member.id
            hosts[1].store.delete(lost.id)
            hosts[0].leases.renew()

    def test_not_while_the_owner_lives(self, hosts: list[Host]) -> None:
        """Its key is there: nobody else writes, at whatever revision."""
        one, two = hosts
        mine = begun(one)
        for change in LATE.values():
            with pytest.raises(Conflict):
                two.store.update(change(mine))
        one.store.update(mine.progressed(1))

    def test_an_earlier_process(
        self, etcd: EtcdCluster, etcd_prefix: str, hosts: list[Host], opened: ExitStack
    ) -> None:
        """A member that was started again takes over from its former self at once, and that one is fenced too."""
        one = hosts[0]
        mine = begun(one)
        again = opened.enter_context(closing(Host(etcd.endpoints, etcd_prefix, one.member)))
        before = again.keys(mine.id).owner
        theirs = again.store.update(mine.requeued())
        after = again.keys(mine.id).owner
        assert before is not None
        assert after is not None
        assert before.created < after.created
        with pytest.raises(Conflict):
            one.store.update(mine.progressed(1))
        again.store.update(theirs.started(3))

    def test_a_record_of_before_carriers(self, hosts: list[Host]) -> None:
        """One in transfer that has neither owner nor carrier may be taken over, and its member may go on."""
        one, two = hosts
        for host in (one, two):
            mine = begun(one)
            one.etcd.delete(one.store._layout.carrier(mine.id))
            one.etcd.delete(one.store._layout.owner(mine.id))
            assert host.store.update(mine.progressed(1)).size == 1
            one.store.delete(mine.id)


class TestExpecting:
    def test_its_life(self, hosts: list[Host]) -> None:
        """Noted by the owner alone, kept by its own writes, forgotten with a takeover, gone with the end."""
        one, two = hosts
        mine = begun(one)
        one.store.expect(mine.id, 1234.5)
        with pytest.raises(Conflict):
            two.store.expect(mine.id, 1.0)
        mine = one.store.update(mine.progressed(1))
        assert two.keys(mine.id).carrier is not None
        assert two.keys(mine.id).carrier.until == 1234.5  # type: ignore[union-attr]
        one.lose()
        taken_over(two, mine.id)
        assert two.keys(mine.id).carrier.until == 0  # type: ignore[union-attr]

    def test_a_record_of_before_carriers(self, hosts: list[Host]) -> None:
        """An upload of an earlier version that waits for its member is noted by that one after its start."""
        one, two = hosts
        mine = begun(one)
        one.etcd.delete(one.store._layout.carrier(mine.id))
        one.lose()
        one.store.expect(mine.id, 1234.5)
        assert two.keys(mine.id).carrier == Carrier(one.member.id, one.member.url, 1234.5)

    def test_of_nothing(self, hosts: list[Host]) -> None:
        """An image that is not there, or is not in transfer."""
        one, _ = hosts
        with pytest.raises(NotFound):
            one.store.expect(image().id, 1.0)
        done = one.store.update(begun(one).completed(1, "ab"))
        with pytest.raises(Conflict):
            one.store.expect(done.id, 1.0)
        assert one.keys(done.id).carrier is None

    def test_nonsense_of_another_program(self, hosts: list[Host]) -> None:
        """A carrier that is none is none."""
        one, two = hosts
        mine = begun(one)
        for text in ("", "[]", '{"member": 3}', '{"member": "a", "url": "b", "until": "c"}'):
            one.etcd.transact([], [put(one.store._layout.carrier(mine.id), text)])
            assert two.keys(mine.id).carrier is None
        one.store.update(mine.progressed(1))


class TestDroppingCopies:
    def held(self, hosts: list[Host]) -> Image:
        held = hosts[0].store.update(begun(hosts[0]).completed(1, "ab"))
        hosts[1].store.hold(held)
        return held

    def test_two_at_once(self, hosts: list[Host]) -> None:
        """Each relies on the other; one may."""
        one, two = hosts
        for _ in range(10):
            held = self.held(hosts)
            outcomes = at_once(
                [
                    partial(one.store.drop_copy, held.id, [two.member.id]),
                    partial(two.store.drop_copy, held.id, [one.member.id]),
                ]
            )
            assert sorted(map(bool, outcomes)) == [False, True]
            left = one.store.get(held.id).replicas
            assert left == ((two if outcomes[0] else one).member.id,)
            one.store.delete(held.id)

    def test_what_is_to_be_kept_is_not(self, hosts: list[Host]) -> None:
        """Nobody else, somebody who is not on record, or nobody but ourselves."""
        one, two = hosts
        held = self.held(hosts)
        for keep in ([], [one.member.id], [two.member.id, new_member().id]):
            assert not one.store.drop_copy(held.id, keep)
        assert one.store.get(held.id).replicas == tuple(sorted([one.member.id, two.member.id]))
        assert one.store.drop_copy(held.id, [one.member.id, two.member.id])
        one.store.delete(held.id)
        assert not one.store.drop_copy(held.id, [two.member.id])
        assert one.keys(held.id).parts == {}

    def test_a_lost_answer(self, etcd: EtcdCluster, etcd_prefix: str, hosts: list[Host], opened: ExitStack) -> None:
        """A drop that was carried out, and whose answer was lost, is one."""
        proxy = opened.enter_context(closing(LossyProxy(etcd.endpoints[0])))
        one = opened.enter_context(closing(Host([proxy.url, *etcd.endpoints], etcd_prefix, attempt_timeout=0.5)))
        held = hosts[0].store.update(begun(hosts[0]).completed(1, "ab"))
        one.store.hold(held)
        proxy.lose_answers()
        assert one.store.drop_copy(held.id, [hosts[0].member.id])
        assert hosts[0].store.get(held.id).replicas == (hosts[0].member.id,)

    def test_a_late_one(self, etcd: EtcdCluster, etcd_prefix: str, hosts: list[Host], opened: ExitStack) -> None:
        """One that is delivered when the copy has come back does not take away its new note."""
        proxy = opened.enter_context(closing(LossyProxy(etcd.endpoints[0])))
        one = opened.enter_context(closing(Host([proxy.url, *etcd.endpoints], etcd_prefix, attempt_timeout=0.5)))
        held = hosts[0].store.update(begun(hosts[0]).completed(1, "ab"))
        one.store.hold(held)
        proxy.delay(f"/replicas/{hosts[0].member.id}".encode())
        assert one.store.drop_copy(held.id, [hosts[0].member.id])
        one.store.hold(held)
        proxy.deliver()
        time.sleep(0.5)
        assert one.member.id in (hosts[0].store.get(held.id).replicas or ())
