"""Records come to their final state, at once or when the stores allow it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from imgsvc.errors import Conflict, ImgsvcError, Incomplete, NoSpace, NotFound, Unavailable
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from tests.flaky import FULL, LOST, UNKNOWN, Fault
from tests.images.helpers import put
from tests.rooms import Rooms

GONE = Incomplete("the sender went away")


def downloading(rooms: Rooms) -> Image:
    """In transfer, claimed, at a revision that is known."""
    image = Image(id=new_id(), type=ImageType.KVM).started(5)
    rooms.disk.claim(image.id)
    return rooms.base.create(image)


def stored(rooms: Rooms) -> Image:
    """As `downloading`, with its bytes on the disk."""
    image = downloading(rooms)
    put(rooms.disk, image.id, b"bytes")
    return image


class TestWrite:
    def test_over_the_revision_that_is_known(self, rooms: Rooms) -> None:
        """The usual way costs one call."""
        image = rooms.settlements.write(downloading(rooms).progressed(3))
        assert rooms.base.get(image.id) == image
        assert rooms.faults.calls == ["update"]

    def test_over_a_write_that_was_not_known_to_succeed(self, rooms: Rooms) -> None:
        """What one's own lost answer had changed is written over."""
        image = downloading(rooms)
        rooms.base.update(image.progressed(3))
        assert rooms.settlements.write(image.progressed(4)).size == 4
        assert rooms.base.get(image.id).size == 4

    def test_over_a_write_that_arrives_late(self, rooms: Rooms) -> None:
        """One's own earlier write may be on its way still, and change the record between the look at it and the next
        write; that is no reason to leave the record in transfer for ever."""
        image = downloading(rooms)
        known = rooms.base.update(image.progressed(3))
        rooms.faults.at("update", 2, lambda: rooms.base.update(known.progressed(4)))
        assert rooms.settlements.write(image.progressed(5)).size == 5
        assert rooms.base.get(image.id).size == 5

    @pytest.mark.parametrize("end", [lambda i: i.failed("theirs"), lambda i: i.completed(5, "ab")])
    def test_not_over_a_final_state(self, rooms: Rooms, end: Callable[[Image], Image]) -> None:
        """Whoever ended it: an end stays."""
        image = downloading(rooms)
        final = rooms.base.update(end(image))
        with pytest.raises(Conflict):
            rooms.settlements.write(image.progressed(4))
        assert rooms.base.get(image.id) == final

    def test_no_record_comes_back(self, rooms: Rooms) -> None:
        """A deleted one is not made again."""
        image = downloading(rooms)
        rooms.base.delete(image.id)
        with pytest.raises(NotFound):
            rooms.settlements.write(image.progressed(4))
        assert rooms.listed() == {}


class TestComplete:
    def test_at_once(self, rooms: Rooms) -> None:
        """Nothing waits afterwards."""
        image = rooms.settlements.complete(stored(rooms), 5, "ab")
        assert (image.status, image.size, image.sha256) == (Status.COMPLETE, 5, "ab")
        assert rooms.base.get(image.id) == image
        assert not rooms.settlements.waiting(image.id)

    @pytest.mark.parametrize("fault", [LOST, UNKNOWN, FULL], ids=["lost", "unknown", "full"])
    def test_later(self, rooms: Rooms, fault: Fault) -> None:
        """The caller is told that the record must follow; it does, and the bytes stay."""
        image = stored(rooms)
        rooms.faults.next("update", fault)
        with pytest.raises(type(fault.error)):
            rooms.settlements.complete(image, 5, "ab")
        assert rooms.settlements.waiting(image.id)
        rooms.settlements.retry()
        assert not rooms.settlements.waiting(image.id)
        assert rooms.base.get(image.id).status is Status.COMPLETE
        assert list(rooms.disk.ids()) == [image.id]

    def test_deleted(self, rooms: Rooms) -> None:
        """The caller is told, and the bytes go."""
        image = stored(rooms)
        rooms.base.delete(image.id)
        with pytest.raises(Conflict, match="deleted"):
            rooms.settlements.complete(image, 5, "ab")
        rooms.check_settled()
        assert not rooms.settlements.waiting(image.id)

    def test_deleted_while_it_waits(self, rooms: Rooms) -> None:
        """Then the bytes go as soon as that is known, also when the disk is slow to let them."""
        image = stored(rooms)
        rooms.faults.next("update", LOST)
        with pytest.raises(Unavailable):
            rooms.settlements.complete(image, 5, "ab")
        rooms.base.delete(image.id)
        rooms.faults.next("delete", LOST)
        rooms.settlements.retry()
        assert rooms.settlements.waiting(image.id)
        rooms.settlements.retry()
        rooms.check_settled()


class TestFail:
    def test_at_once(self, rooms: Rooms) -> None:
        """The record says why, and the claim goes."""
        image = rooms.settlements.fail(downloading(rooms).progressed(3), GONE)
        assert (image.status, image.error, image.size) == (Status.ERROR, str(GONE), 0)
        assert rooms.base.get(image.id) == image
        rooms.check_settled()

    @pytest.mark.parametrize("call", ["update", "unclaim"])
    @pytest.mark.parametrize("fault", [LOST, UNKNOWN, FULL], ids=["lost", "unknown", "full"])
    def test_later(self, rooms: Rooms, call: str, fault: Fault) -> None:
        """It never raises; the claim stays until the record is final, whichever store was away."""
        image = downloading(rooms)
        rooms.faults.next(call, fault)
        assert rooms.settlements.fail(image, GONE).error == str(GONE)
        assert rooms.settlements.waiting(image.id)
        assert not rooms.base.get(image.id).in_transfer or rooms.claims()
        rooms.settlements.retry()
        assert rooms.base.get(image.id).error == str(GONE)
        rooms.check_settled()

    def test_what_somebody_else_ended(self, rooms: Rooms) -> None:
        """Their word stays, and the claim goes all the same."""
        image = downloading(rooms)
        theirs = rooms.base.update(image.failed("theirs"))
        rooms.settlements.fail(image, GONE)
        assert rooms.base.get(image.id) == theirs
        rooms.check_settled()

    def test_deleted(self, rooms: Rooms) -> None:
        """No record comes back, and the claim goes."""
        image = downloading(rooms)
        rooms.base.delete(image.id)
        rooms.settlements.fail(image, GONE)
        assert rooms.listed() == {}
        rooms.check_settled()


class TestDiscard:
    @pytest.mark.parametrize("created", [True, False])
    def test_whether_or_not_it_was_created(self, rooms: Rooms, *, created: bool) -> None:
        """Record and claim go with the next retry, and not before: the caller does not wait for the store."""
        image = downloading(rooms)
        if not created:
            rooms.base.delete(image.id)
        rooms.settlements.discard(image.id)
        assert rooms.faults.calls == []
        rooms.settlements.retry()
        assert rooms.listed() == {}
        rooms.check_settled()


class TestRetry:
    def fails(self, error: Exception) -> Callable[[], None]:
        def step() -> None:
            raise error

        return step

    @pytest.mark.parametrize("error", [Conflict("no"), NotFound("no")])
    def test_only_what_may_work_later_waits(self, rooms: Rooms, error: Exception) -> None:
        """Anything else is the caller's concern alone."""
        with pytest.raises(type(error)):
            rooms.settlements.settle("one", self.fails(error))
        assert not rooms.settlements.waiting("one")

    def test_a_mistake_of_ours_waits(self, rooms: Rooms) -> None:
        """What it was to settle is not forgotten for it."""
        with pytest.raises(ZeroDivisionError):
            rooms.settlements.settle("one", self.fails(ZeroDivisionError()))
        assert rooms.settlements.waiting("one")

    @pytest.mark.parametrize("error", [Unavailable("later"), NoSpace("later")])
    def test_a_step_that_never_works_does_not_hold_up_the_others(self, rooms: Rooms, error: ImgsvcError) -> None:
        """One image whose record nobody can write is nobody else's trouble."""
        with pytest.raises(type(error)):
            rooms.settlements.settle("one", self.fails(error))
        images = [downloading(rooms) for _ in range(3)]
        rooms.faults.always("update")
        for image in images:
            rooms.settlements.fail(image, GONE)
        rooms.faults.heal()
        for _ in range(2):
            rooms.settlements.retry()
        assert {image.status for image in rooms.listed().values()} == {Status.ERROR}
        assert rooms.settlements.waiting("one")

    def test_an_outage_is_asked_about_once(self, rooms: Rooms) -> None:
        """Not once for each image that waits: each question may take seconds."""
        rooms.faults.always("update")
        for _ in range(3):
            rooms.settlements.fail(downloading(rooms), GONE)
        asked = len(rooms.faults.calls)
        rooms.settlements.retry()
        assert len(rooms.faults.calls) == asked + 1

    def test_what_begins_to_wait_meanwhile_is_kept(self, rooms: Rooms) -> None:
        """A retried step may set things going whose own end must wait: that one is not taken for the first."""
        image = downloading(rooms)
        steps = iter([Unavailable("later")])

        def queue_again() -> None:
            for error in steps:
                raise error
            rooms.faults.next("update", LOST)
            rooms.settlements.fail(image, GONE)

        with pytest.raises(Unavailable):
            rooms.settlements.settle(image.id, queue_again)
        rooms.settlements.retry()
        assert rooms.settlements.waiting(image.id)
        rooms.settlements.retry()
        rooms.check_settled()
