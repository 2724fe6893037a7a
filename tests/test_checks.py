"""An image that somebody doubts is read again: once, and with no other effect when it is right."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from imgsvc import checks
from imgsvc.checks import Checks
from imgsvc.errors import Unavailable
from imgsvc.metadata.image import Image, Status, new_id
from tests.flaky import LOST
from tests.images.helpers import content
from tests.left_behind import BODY, complete
from tests.rooms import Rooms, wait_until
from tests.test_scrub import check_aside, rot


class Doubted:
    """Checks over the rooms: `damaged` are the ids that it was told of, `not_held` those that are elsewhere."""

    def __init__(self, rooms: Rooms) -> None:
        self.damaged: list[str] = []
        self.not_held: set[str] = set()
        self.checks = Checks(
            rooms.images,
            rooms.records,
            held=lambda image_id: image_id not in self.not_held,
            damaged=self.damaged.append,
        )
        self._rooms = rooms

    def reads(self) -> int:
        return self._rooms.faults.calls.count("open")

    def wait_done(self) -> None:
        wait_until(lambda: not self.checks._waiting)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_RETRY_INTERVAL", "_READ_AGAIN"):
        monkeypatch.setattr(f"imgsvc.scrub.{name}", 0.01)


@pytest.fixture
def doubted(rooms: Rooms) -> Iterator[Doubted]:
    """Not started, so that a test can fill the queue before."""
    doubted = Doubted(rooms)
    with closing(doubted.checks):
        yield doubted


def unchanged(rooms: Rooms, image: Image) -> bool:
    return rooms.base.get(image.id) == image and content(rooms.disk, image.id) == BODY


def test_a_damaged_image(rooms: Rooms, doubted: Doubted) -> None:
    """It is set aside, and who can mend it is told; the others stay as they are."""
    damaged, whole = complete(rooms), complete(rooms)
    rot(rooms, damaged)
    doubted.checks.start()
    doubted.checks.submit(damaged.id)
    wait_until(lambda: doubted.damaged == [damaged.id])
    check_aside(rooms, damaged)
    assert unchanged(rooms, whole)


def test_a_flood_costs_one_read(rooms: Rooms, doubted: Doubted) -> None:
    """A healthy image is read once however many doubt it, also right afterwards, and stays."""
    image = complete(rooms)
    for _ in range(5_000):
        doubted.checks.submit(image.id)
    doubted.checks.start()
    doubted.wait_done()
    for _ in range(5_000):
        doubted.checks.submit(image.id)
    time.sleep(0.2)
    assert doubted.reads() == 1
    assert unchanged(rooms, image)
    assert doubted.damaged == []


def test_doubted_again_later(rooms: Rooms, doubted: Doubted, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was right a while ago may have rotted since: it is read again as soon as that may be, and what is doubted
    meanwhile does not wait for it."""
    monkeypatch.setattr(checks, "_RIGHT_FOR", 1.0)
    image, other = complete(rooms), complete(rooms)
    doubted.checks.start()
    doubted.checks.submit(image.id)
    doubted.wait_done()
    rot(rooms, image)
    doubted.checks.submit(image.id)
    rot(rooms, other)
    doubted.checks.submit(other.id)
    wait_until(lambda: doubted.damaged == [other.id])
    wait_until(lambda: doubted.damaged == [other.id, image.id])


def test_one_at_a_time(rooms: Rooms, doubted: Doubted) -> None:
    """Many that are doubted do not take the disk from everybody else."""
    images = [complete(rooms) for _ in range(20)]
    for image in images:
        doubted.checks.submit(image.id)
    before = threading.active_count()
    doubted.checks.start()
    assert threading.active_count() == before + 1
    doubted.wait_done()
    assert doubted.reads() == len(images)


def test_too_many(rooms: Rooms, doubted: Doubted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue has an end, of which who asks is told."""
    monkeypatch.setattr(checks, "_MOST_WAITING", 3)
    for _ in range(3):
        doubted.checks.submit(new_id())
    with pytest.raises(Unavailable, match="too many"):
        doubted.checks.submit(new_id())


def test_what_is_not_held(rooms: Rooms, doubted: Doubted) -> None:
    """Nobody can have the record of an image condemned whose bytes this member does not answer for."""
    image = complete(rooms)
    rooms.disk.delete(image.id)
    doubted.not_held.add(image.id)
    doubted.checks.submit(image.id)
    assert not doubted.checks._waiting
    assert rooms.base.get(image.id).status is Status.COMPLETE


def test_ids_of_nothing(rooms: Rooms, doubted: Doubted) -> None:
    """One that was deleted meanwhile ends nothing."""
    image = complete(rooms)
    doubted.checks.submit(new_id())
    doubted.checks.submit(image.id)
    doubted.checks.start()
    doubted.wait_done()
    assert doubted.reads() == 1


def test_records_that_do_not_answer(rooms: Rooms, doubted: Doubted) -> None:
    """The check waits for them."""
    damaged = complete(rooms)
    rot(rooms, damaged)
    rooms.faults.next("get", LOST, times=2)
    doubted.checks.start()
    doubted.checks.submit(damaged.id)
    wait_until(lambda: doubted.damaged == [damaged.id])
    check_aside(rooms, damaged)


def test_the_end(rooms: Rooms, doubted: Doubted) -> None:
    """A check that waits does not hold up the service's stop."""
    rooms.faults.always("get")
    doubted.checks.submit(complete(rooms).id)
    doubted.checks.start()
    doubted.checks.close()
    assert not doubted.checks._thread.is_alive()
