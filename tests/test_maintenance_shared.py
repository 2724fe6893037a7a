"""The start sweep among other members, and when the stores fail in the middle of it."""

from __future__ import annotations

import hashlib
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from imgsvc.errors import ConfigError, NoSpace, Unavailable
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import Status, new_id
from imgsvc.metadata.memory import MemoryMetadataStore
from imgsvc.metadata.store import Member
from tests.flaky import FAULTS, FULL, LOST, Fault, Killed
from tests.images.helpers import content, put
from tests.left_behind import BODY, committed, complete, interrupted
from tests.rooms import SITE, Rooms
from tests.shared_records import OTHER, SharedRecords


@pytest.fixture
def records(images: MemoryImageStore) -> SharedRecords:
    return SharedRecords(Member(images.member, SITE, "http://one.example:20000"))


@pytest.fixture
def images() -> MemoryImageStore:
    return MemoryImageStore()


@pytest.fixture
def rooms(images: MemoryImageStore, records: SharedRecords) -> Rooms:
    images.mark(records.identity)
    return Rooms(images, records)


class TestOwners:
    @pytest.mark.parametrize("leave", [interrupted, committed])
    def test_ours(self, rooms: Rooms, leave: Callable[[Rooms], object]) -> None:
        """What this member was transferring is settled."""
        leave(rooms)
        rooms.maintenance.start_sweep()
        rooms.check_settled()

    @pytest.mark.parametrize("leave", [interrupted, committed])
    def test_ours_without_an_owner(
        self, rooms: Rooms, records: SharedRecords, leave: Callable[[Rooms], object]
    ) -> None:
        """Once its lease is over nobody owns it: then what is on the disk tells."""
        leave(rooms)
        records.owners.clear()
        rooms.maintenance.start_sweep()
        rooms.check_settled()

    def test_ours_without_a_trace(self, rooms: Rooms, records: SharedRecords) -> None:
        """A record that says it is ours is enough."""
        image = interrupted(rooms)
        rooms.disk.unclaim(image.id)
        rooms.maintenance.start_sweep()
        assert records.get(image.id).status is Status.ERROR

    @pytest.mark.parametrize("owner", [OTHER.id, None], ids=["another's", "nobody's"])
    def test_not_ours(self, rooms: Rooms, records: SharedRecords, owner: str | None) -> None:
        """What another member is transferring, or one that is away, is not touched."""
        image = interrupted(rooms, b"some")
        rooms.disk.unclaim(image.id)
        records.owners.clear()
        if owner is not None:
            records.owners[image.id] = owner
        before = records.get(image.id)
        rooms.maintenance.start_sweep()
        assert records.get(image.id) == before
        assert rooms.claims() == set()

    def test_taken_over_by_another(self, rooms: Rooms, records: SharedRecords) -> None:
        """What we had begun and another member owns now is theirs; our half goes."""
        image = interrupted(rooms, b"some")
        records.owners[image.id] = OTHER.id
        rooms.maintenance.start_sweep()
        assert records.get(image.id).status is Status.DOWNLOADING
        assert rooms.claims() == set()


@pytest.mark.parametrize("source", ["", "http://source.example/1"], ids=["an upload", "a fetch"])
class TestMeanwhile:
    """The record is written between the look at it and its end: by a request of the last run that comes late, or by
    somebody else."""

    def test_complete(self, rooms: Rooms, records: SharedRecords, source: str) -> None:
        """The last run's last step arrives: then the image is whole, and its bytes stay."""
        image = committed(rooms, source)
        digest = hashlib.sha256(content(rooms.disk, image.id)).hexdigest()
        rooms.faults.at("update", 1, lambda: records.update(image.completed(5, digest)))
        rooms.maintenance.start_sweep()
        assert records.get(image.id).status is Status.COMPLETE
        rooms.check_settled()
        assert rooms.take_turns() == []

    def test_complete_and_nobody_answers(self, rooms: Rooms, records: SharedRecords, source: str) -> None:
        """The same, when it cannot be found out then: the bytes stay until that is known."""
        image = committed(rooms, source)
        digest = hashlib.sha256(content(rooms.disk, image.id)).hexdigest()

        def plan(_number: int, call: str) -> Fault | None:
            if call == "update" and records.get(image.id).in_transfer:
                records.update(image.completed(5, digest))
            return LOST if call == "get" else None

        rooms.faults.plan = plan
        assert not swept(rooms)
        rooms.faults.heal()
        assert swept(rooms)
        assert records.get(image.id).status is Status.COMPLETE
        rooms.check_settled()

    def test_progress(self, rooms: Rooms, records: SharedRecords, source: str) -> None:
        """A report of the last run arrives: it is settled all the same."""
        image = committed(rooms, source)
        rooms.faults.at("update", 1, lambda: records.update(image.progressed(4)))
        rooms.maintenance.start_sweep()
        assert records.get(image.id).status is (Status.PENDING if source else Status.ERROR)
        assert list(rooms.disk.ids()) == []
        assert rooms.claims() == set(rooms.take_turns()) == ({image.id} if source else set())

    def test_deleted(self, rooms: Rooms, records: SharedRecords, source: str) -> None:
        image = committed(rooms, source)
        rooms.faults.at("update", 1, lambda: records.delete(image.id))
        rooms.maintenance.start_sweep()
        rooms.check_settled()

    def test_failed(self, rooms: Rooms, records: SharedRecords, source: str) -> None:
        image = committed(rooms, source)
        rooms.faults.at("update", 1, lambda: records.update(image.progressed(0).failed("by another")))
        rooms.maintenance.start_sweep()
        assert records.get(image.id).error == "by another"
        rooms.check_settled()

    def test_taken_over(self, rooms: Rooms, records: SharedRecords, source: str) -> None:
        """What another member brings in by now may be other bytes."""
        image = committed(rooms, source)

        def take_over() -> None:
            records.update(image.started(7))
            records.owners[image.id] = OTHER.id

        rooms.faults.at("update", 1, take_over)
        rooms.maintenance.start_sweep()
        assert records.get(image.id).expected_size == 7
        assert (list(rooms.disk.ids()), rooms.claims(), rooms.take_turns()) == ([], set(), [])


@pytest.mark.parametrize("source", ["", "http://source.example/1"], ids=["an upload", "a fetch"])
def test_bytes_make_room_for_the_record(images: MemoryImageStore, source: str) -> None:
    """Records that nobody shares may be on the disk that the bytes have filled: these go then, and the next sweep does
    not need them to know whose transfer it was."""
    records = MemoryMetadataStore(Member(images.member, SITE, ""))
    images.mark(records.identity)
    rooms = Rooms(images, records)
    image = committed(rooms, source)
    rooms.faults.plan = lambda _number, call: FULL if call in ("update", "claim") and list(images.ids()) else None
    assert swept(rooms) or swept(rooms)
    assert records.get(image.id).status is (Status.PENDING if source else Status.ERROR)
    assert rooms.claims() == set(rooms.take_turns()) == ({image.id} if source else set())


class TestHolders:
    def test_bytes_that_the_record_does_not_know_of(self, rooms: Rooms, records: SharedRecords) -> None:
        """A directory that was brought here, as from the Go program, holds its images from now on."""
        image = complete(rooms, sha256="")
        records.holding.clear()
        rooms.maintenance.start_sweep()
        assert records.holding == {image.id: {rooms.disk.member}}

    def test_elsewhere(self, rooms: Rooms, records: SharedRecords) -> None:
        """An image that only another member holds is none of our business."""
        image = complete(rooms)
        rooms.disk.delete(image.id)
        records.holding = {image.id: {OTHER.id}}
        rooms.maintenance.start_sweep()
        assert records.get(image.id) == image
        assert records.holding == {image.id: {OTHER.id}}

    def test_nobody_is_on_record(self, rooms: Rooms, records: SharedRecords) -> None:
        """An image of which no member says that it holds it may be on one that has yet to start: it stays."""
        image = complete(rooms)
        rooms.disk.delete(image.id)
        records.holding.clear()
        rooms.maintenance.start_sweep()
        assert records.get(image.id) == image

    def test_lost_here_and_held_elsewhere(self, rooms: Rooms, records: SharedRecords) -> None:
        """It stays complete, and this member says no longer that it holds it."""
        image = complete(rooms)
        records.holding[image.id].add(OTHER.id)
        rooms.disk.delete(image.id)
        rooms.maintenance.start_sweep()
        assert records.get(image.id) == image
        assert records.holding == {image.id: {OTHER.id}}

    def test_lost_here_and_there_at_once(self, rooms: Rooms, records: SharedRecords) -> None:
        """Two members that find their copies lost do not each rely on the other's."""
        image = complete(rooms)
        records.holding[image.id].add(OTHER.id)
        rooms.disk.delete(image.id)
        rooms.faults.at("lose_copy", 1, lambda: records.holding[image.id].discard(OTHER.id))
        rooms.maintenance.start_sweep()
        assert records.get(image.id).status is Status.ERROR

    def test_lost_here_and_held_by_nobody(self, rooms: Rooms, records: SharedRecords) -> None:
        """Then it is lost."""
        image = complete(rooms)
        rooms.disk.delete(image.id)
        rooms.maintenance.start_sweep()
        assert records.get(image.id).status is Status.ERROR

    @pytest.mark.parametrize("held", [True, False], ids=["lost here", "brought here"])
    def test_deleted_by_another_meanwhile(self, rooms: Rooms, records: SharedRecords, *, held: bool) -> None:
        """A record that goes in the middle of the sweep does not stop the start."""
        image = complete(rooms, sha256=None if held else "")
        if held:
            rooms.disk.delete(image.id)
        else:
            records.holding.clear()

        def plan(_number: int, call: str) -> None:
            if call in ("hold", "lose_copy"):
                records.delete(image.id)

        rooms.faults.plan = plan
        rooms.maintenance.start_sweep()
        rooms.faults.heal()
        rooms.maintenance.reconcile()
        rooms.check_settled()


class TestUnmounted:
    @pytest.fixture
    def elsewhere(self, tmp_path: Path) -> Iterator[FilesystemImageStore]:
        with closing(FilesystemImageStore(tmp_path / "empty")) as store:
            yield store

    def test_refused_for_what_is_here(self, rooms: Rooms, elsewhere: FilesystemImageStore) -> None:
        """One image that this host is on record as holding is enough."""
        complete(rooms)
        with pytest.raises(ConfigError):
            Rooms(elsewhere, rooms.base).maintenance.start_sweep()

    def test_not_refused_for_what_is_elsewhere(
        self, rooms: Rooms, records: SharedRecords, elsewhere: FilesystemImageStore
    ) -> None:
        """A new member begins with an empty directory, whatever the others hold."""
        image = complete(rooms)
        records.holding = {image.id: {OTHER.id}}
        Rooms(elsewhere, rooms.base).maintenance.start_sweep()
        assert elsewhere.marked_for == records.identity


class Everything:
    """One of each thing that a sweep may find, with the same ids each time, so that each time it takes the same steps."""

    def __init__(self) -> None:
        numbers = random.Random("everything")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=numbers.getrandbits(128), version=4))
            self._leave()

    def _leave(self) -> None:
        images = MemoryImageStore()
        self.records = SharedRecords(Member(images.member, SITE, ""))
        images.mark(self.records.identity)
        rooms = Rooms(images, self.records)
        self.upload, self.committed = interrupted(rooms, b"some"), committed(rooms)
        self.fetch = interrupted(rooms, b"some", source="http://source.example/1")
        self.committed_fetch = committed(rooms, source="http://source.example/2")
        self.whole, self.lost, self.moved = (complete(rooms) for _ in range(3))
        self.brought = complete(rooms, sha256="")
        images.delete(self.lost.id)
        images.delete(self.moved.id)
        self.records.holding[self.moved.id].add(OTHER.id)
        self.records.holding[self.brought.id].clear()
        put(images, new_id(), BODY)
        images.claim(new_id())
        self.rooms = Rooms(images, self.records)

    def restart(self) -> None:
        self.rooms.let_go()
        self.rooms = Rooms(self.rooms.disk, self.records)

    def check(self) -> None:
        """All of it is settled."""
        self.check_records()
        assert set(self.rooms.disk.ids()) == {self.whole.id, self.brought.id}
        assert content(self.rooms.disk, self.brought.id) == BODY

    def check_records(self) -> None:
        for image in (self.upload, self.committed, self.lost):
            assert self.records.get(image.id).status is Status.ERROR
        for image in (self.whole, self.moved, self.brought):
            assert self.records.get(image.id) == image
        fetches = {self.fetch.id, self.committed_fetch.id}
        assert {self.records.get(image_id).status for image_id in fetches} == {Status.PENDING}
        assert self.rooms.claims() == fetches
        member = self.rooms.disk.member
        assert self.records.holding[self.brought.id] == {member}
        assert self.records.holding[self.moved.id] == {OTHER.id}
        assert set(self.rooms.take_turns()) == fetches  # a fetch that is no longer pending is skipped


def swept(rooms: Rooms) -> bool:
    """As a start has it: after these errors it tries again."""
    try:
        rooms.maintenance.start_sweep()
    except (Unavailable, NoSpace):
        return False
    return True


def sweep_calls() -> list[str]:
    everything = Everything()
    everything.rooms.maintenance.start_sweep()
    return everything.rooms.faults.calls


STEPS = list(enumerate(sweep_calls()))


def test_everything_at_once() -> None:
    """One sweep settles all, and a second one finds nothing to do but the fetches."""
    everything = Everything()
    assert swept(everything.rooms)
    everything.check()
    everything.restart()
    assert swept(everything.rooms)
    everything.check()


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        pytest.param(step, fault, id=f"{step}-{call}-{type(fault.error).__name__}-{fault.applied}")
        for step, call in STEPS
        for fault in FAULTS.get(call, ())
    ],
)
def test_a_step_that_fails(step: int, fault: Fault) -> None:
    """The sweep is run again, and then all is settled as if nothing had happened."""
    everything = Everything()
    everything.rooms.faults.plan = lambda number, _call: fault if number == step else None
    assert swept(everything.rooms) or swept(everything.rooms)
    everything.check_records()
    # Bytes without a record that could not be removed wait for the next start.
    everything.restart()
    assert swept(everything.rooms)
    everything.check()


@pytest.mark.parametrize("applied", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("step", [step for step, _ in STEPS])
def test_a_step_that_is_the_last(step: int, *, applied: bool) -> None:
    """The process dies in the sweep, also when nobody is on record as the owner: the next sweep settles all."""
    everything = Everything()
    everything.records.owners.clear()
    everything.rooms.faults.kill(step, applied=applied)
    with pytest.raises(Killed):
        everything.rooms.maintenance.start_sweep()
    everything.restart()
    everything.records.owners.clear()
    everything.rooms.maintenance.start_sweep()
    everything.check()
