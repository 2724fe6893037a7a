"""Whatever step of a transfer fails, with or without effect, and whoever deletes the image meanwhile: once the stores
answer again, or the process has started again, nothing is half."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgsvc.errors import ImgsvcError, Incomplete, NoSpace, Unavailable
from imgsvc.metadata.image import Image, ImageType, Status
from imgsvc.transfer import Transfer
from tests.flaky import FAULTS, LOST, Fault, Killed
from tests.rooms import DiskPlace, MemoryPlace, Place, Rooms, feed_and_finish, report_now

BODY = b"first, last"
SOURCE = "http://source.example/image"


class Owner:
    """Drives one transfer as a request or a fetch thread does. `done` is what `finish` gave."""

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms
        self.done: Image | None = None

    def upload(self) -> None:
        with suppress(ImgsvcError):
            self._drive(self.rooms.upload(len(BODY)))

    def upload_that_breaks_off(self) -> None:
        with suppress(ImgsvcError):
            self._drive(self.rooms.upload(len(BODY)), ends=False)

    def fetch(self) -> None:
        with suppress(ImgsvcError):
            self._fetch(self.rooms.service.fetch(SOURCE, ImageType.KVM, ""), ends=True)

    def fetch_that_fails(self) -> None:
        with suppress(ImgsvcError):
            self._fetch(self.rooms.service.fetch(SOURCE, ImageType.KVM, ""), ends=False)

    def _fetch(self, image: Image, *, ends: bool) -> None:
        try:
            transfer = self.rooms.transfers.fetch(image)
        except ImgsvcError as error:
            self.rooms.settlements.fail(image, error)
        else:
            self._drive(transfer, ends=ends)

    def _drive(self, transfer: Transfer, *, ends: bool = True) -> None:
        try:
            if transfer.image.source:
                transfer.start(len(BODY))
            for part in (BODY[:5], BODY[5:]):
                transfer.feed(part)
                with suppress(Unavailable, NoSpace):
                    report_now(transfer)
            if not ends:
                raise Incomplete("the sender went away")
            self.done = transfer.finish()
        except ImgsvcError as error:
            transfer.abort(error)


WAYS = [Owner.upload, Owner.upload_that_breaks_off, Owner.fetch, Owner.fetch_that_fails]
Way = Callable[[Owner], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Place]:
    with closing(DiskPlace(tmp_path)) as place:
        yield place


def calls_of(way: Way) -> list[str]:
    """The calls that a transfer makes when nothing fails."""
    rooms = opened(MemoryPlace())
    way(Owner(rooms))
    return rooms.faults.calls


def opened(place: Place) -> Rooms:
    rooms = place.open()
    if rooms.disk.fresh:
        rooms.disk.mark(rooms.base.identity)
    return rooms


def single_faults() -> Iterator[object]:
    for way in WAYS:
        for step, call in enumerate(calls_of(way)):
            for fault in FAULTS.get(call, ()):
                name = f"{way.__name__}-{step}-{call}-{type(fault.error).__name__}-{fault.applied}"
                yield pytest.param(way, step, fault, id=name)


def steps() -> Iterator[object]:
    for way in WAYS:
        for step, call in enumerate(calls_of(way)):
            yield pytest.param(way, step, id=f"{way.__name__}-{step}-{call}")


def recover(rooms: Rooms) -> None:
    """The stores answer, and the threads that retry and fetch have had their turn."""
    rooms.faults.heal()
    rooms.settlements.retry()
    for image_id in rooms.take_turns():
        image = rooms.listed().get(image_id)
        if image is not None and image.status is Status.PENDING:
            transfer = rooms.transfers.fetch(image)
            transfer.start(5)
            feed_and_finish(transfer)


def check(rooms: Rooms, owner: Owner, *, deleted: bool = False) -> None:
    rooms.check_settled()
    if owner.done is not None and not deleted:
        assert rooms.listed()[owner.done.id] == owner.done
    assert not any(rooms.transfers.is_known(image_id) for image_id in rooms.listed())


@pytest.mark.parametrize(("way", "step", "fault"), list(single_faults()))
def test_each_step_may_fail(disk: Place, way: Way, step: int, fault: Fault) -> None:
    """In each way that its store may fail."""
    rooms = opened(disk)
    rooms.faults.plan = lambda number, _call: fault if number == step else None
    owner = Owner(rooms)
    way(owner)
    assert len(rooms.faults.calls) > step
    recover(rooms)
    check(rooms, owner)


@pytest.mark.parametrize("by_us", [True, False], ids=["here", "elsewhere"])
@pytest.mark.parametrize(("way", "step"), list(steps()))
def test_each_gap_may_see_a_deletion(way: Way, step: int, by_us: bool) -> None:
    """By a request to this host, or by another that shares the records: no bytes stay, and no record comes back."""
    rooms = opened(MemoryPlace())
    deletion = Deletion(rooms, step, by_us=by_us)
    rooms.faults.plan = deletion.plan
    owner = Owner(rooms)
    way(owner)
    recover(rooms)
    deletion.follow()
    check(rooms, owner, deleted=True)
    assert deletion.image is None or rooms.listed() == {}


class Deletion:
    """Deletes the one image, if it is there, right before the call of this number."""

    def __init__(self, rooms: Rooms, step: int | None, *, by_us: bool) -> None:
        self._rooms = rooms
        self._step = step
        self._by_us = by_us
        self.image: Image | None = None

    def plan(self, number: int, _call: str) -> None:
        if number != self._step:
            return
        for image in self._rooms.listed().values():
            usual, self._rooms.faults.plan = self._rooms.faults.plan, lambda _number, _call: None
            self.image = (self._rooms.service if self._by_us else self._rooms.base).delete(image.id)
            self._rooms.faults.plan = usual

    def follow(self) -> None:
        """As a store tells of what another member deleted. Only a whole image needs it; a transfer finds out itself."""
        if self.image is not None and self.image.status is Status.COMPLETE:
            self._rooms.service.drop(self.image.id)


@settings(max_examples=400, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    faults=st.dictionaries(st.integers(0, 25), st.integers(0, 2), max_size=6),
    outage=st.none() | st.integers(0, 20),
    deleted=st.none() | st.integers(0, 25),
    by_us=st.booleans(),
)
def test_any_of_it_together(
    way: Way, faults: dict[int, int], outage: int | None, deleted: int | None, *, by_us: bool
) -> None:
    """Several faults, an outage and a deletion in one transfer."""
    rooms = opened(MemoryPlace())
    deletion = Deletion(rooms, deleted, by_us=by_us)

    def plan(number: int, call: str) -> Fault | None:
        deletion.plan(number, call)
        possible = FAULTS.get(call, ())
        if possible and number in faults:
            return possible[faults[number] % len(possible)]
        return LOST if possible and outage is not None and number > outage else None

    rooms.faults.plan = plan
    owner = Owner(rooms)
    way(owner)
    recover(rooms)
    deletion.follow()
    check(rooms, owner, deleted=deletion.image is not None)
    assert deletion.image is None or rooms.listed() == {}


@pytest.mark.parametrize("applied", [True, False], ids=["after", "before"])
@pytest.mark.parametrize(("way", "step"), list(steps()))
def test_each_step_may_be_the_last(disk: Place, way: Way, step: int, applied: bool) -> None:
    """The process dies there: the next start settles an upload, and fetches what was to be fetched."""
    rooms = opened(disk)
    rooms.faults.kill(step, applied=applied)
    owner = Owner(rooms)
    with pytest.raises(Killed):
        way(owner)
    rooms.let_go()
    after = disk.open()
    after.maintenance.start_sweep()
    after.verify_uploads()
    for image in after.listed().values():
        if image.status is Status.PENDING:
            assert after.claims() == {image.id}
            Owner(after)._fetch(image, ends=True)
    check(after, owner)
