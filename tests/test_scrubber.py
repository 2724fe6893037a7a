"""When a pass in the background begins, and how it goes on after a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta

import pytest
from structlog.testing import capture_logs

from imgsvc.metadata.image import Status, format_time
from imgsvc.scrubber import Progress, Scrubber
from imgsvc.settings import ScrubSettings
from tests.flaky import FULL
from tests.left_behind import complete
from tests.rooms import Place, Rooms, wait_until
from tests.test_scrub import rot

MONTH = 30 * 86_400.0


@pytest.fixture
def running() -> Iterator[ExitStack]:
    with ExitStack() as running:
        yield running


def start(running: ExitStack, rooms: Rooms, interval: float = MONTH, rate: int = 1 << 40) -> Scrubber:
    settings = ScrubSettings(interval=interval, bytes_per_second=rate)
    scrubber = running.enter_context(closing(Scrubber(settings, rooms.images, rooms.records)))
    scrubber.start()
    return scrubber


def ago(seconds: float) -> str:
    return format_time(datetime.now(UTC) - timedelta(seconds=seconds))


def noted(rooms: Rooms) -> Progress:
    progress = Progress.of_line(rooms.disk.remembered("scrub"))
    assert progress is not None
    return progress


def wait_done(rooms: Rooms) -> None:
    wait_until(lambda: (last := Progress.of_line(rooms.disk.remembered("scrub"))) is not None and last.done)


def times_read(rooms: Rooms) -> int:
    return rooms.faults.calls.count("open")


def test_the_first_pass(running: ExitStack, rooms: Rooms) -> None:
    """It begins with the first start, and says at its end what it found."""
    whole, damaged = complete(rooms), complete(rooms)
    rot(rooms, damaged)
    with capture_logs() as logged:
        start(running, rooms)
        wait_done(rooms)
        wait_until(lambda: any(line["event"] == "scrub" for line in logged))
    assert rooms.base.get(damaged.id).status is Status.ERROR
    said = next(line for line in logged if line["event"] == "scrub")
    assert (said["images"], said["damaged"], said["unread"], said["bytes"]) == (2, 1, 0, whole.size)
    assert [line["image"] for line in logged if line["log_level"] == "error"] == [damaged.id]


def test_passes_follow_each_other(running: ExitStack, rooms: Rooms) -> None:
    """An interval from beginning to beginning, without a restart."""
    complete(rooms)
    start(running, rooms, interval=0.2)
    began = time.monotonic()
    wait_until(lambda: times_read(rooms) == 4)
    assert 0.5 < time.monotonic() - began < 1.5


@pytest.mark.parametrize(("last", "reads"), [(MONTH - 60, 0), (MONTH + 60, 1), (-3_600, 1)])
def test_a_start_after_a_pass(running: ExitStack, rooms: Rooms, last: float, reads: int) -> None:
    """The next is due an interval after its beginning. A beginning in the future is of a clock that was wrong."""
    complete(rooms)
    rooms.disk.remember("scrub", Progress(ago(last), done=True).to_line())
    start(running, rooms)
    if reads:
        wait_until(lambda: times_read(rooms) == reads)
    else:
        time.sleep(0.3)
        assert times_read(rooms) == 0


@pytest.mark.parametrize("age", [60, MONTH + 60])
def test_a_start_in_the_middle(running: ExitStack, place: Place, rooms: Rooms, age: float) -> None:
    """What the last process had read is not read again, and the pass keeps its beginning; when it has taken longer
    than the interval, the next follows at once."""
    first, second = sorted(complete(rooms).id for _ in range(2))
    for image_id in (first, second):
        rot(rooms, rooms.base.get(image_id))
    rooms.disk.remember("scrub", Progress(ago(age), after=first).to_line())
    after = place.open()
    start(running, after)
    wait_until(lambda: after.base.get(second).status is Status.ERROR)
    if age < MONTH:
        wait_done(after)
        assert noted(after).began < ago(age - 10)
        assert after.base.get(first).status is Status.COMPLETE
    else:
        wait_until(lambda: after.base.get(first).status is Status.ERROR)


def test_stopped_in_the_middle(running: ExitStack, rooms: Rooms) -> None:
    """While it keeps to its rate: at once, and what was read is noted."""
    images = sorted(complete(rooms).id for _ in range(3))
    scrubber = start(running, rooms, rate=100)
    wait_until(lambda: times_read(rooms) == 3)
    began = time.monotonic()
    scrubber.close()
    assert time.monotonic() - began < 1
    assert not scrubber._thread.is_alive()
    assert (noted(rooms).after, noted(rooms).done) == (images[1], False)


def test_progress_is_noted(running: ExitStack, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one that is killed begins near to where it was."""
    monkeypatch.setattr("imgsvc.scrubber._NOTE_INTERVAL", 0.0)
    images = sorted(complete(rooms).id for _ in range(3))
    start(running, rooms, rate=100)
    wait_until(lambda: times_read(rooms) == 2)
    wait_until(lambda: noted(rooms).after == images[0])


@pytest.mark.parametrize(("interval", "rate"), [(0, 1), (1, 0)])
def test_off(running: ExitStack, rooms: Rooms, interval: float, rate: int) -> None:
    scrubber = start(running, rooms, interval, rate)
    assert not scrubber._thread.is_alive()
    scrubber.close()


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"began": "x", "after": "", "done": true}'])
def test_a_note_that_is_none(running: ExitStack, rooms: Rooms, note: str) -> None:
    """A pass begins."""
    complete(rooms)
    rooms.disk.remember("scrub", note)
    start(running, rooms)
    wait_done(rooms)
    assert times_read(rooms) == 1


def test_a_note_that_cannot_be_kept(running: ExitStack, rooms: Rooms) -> None:
    """On a full disk one pass does not follow the other without end."""
    complete(rooms)
    rooms.faults.always("remember", fault=FULL)
    start(running, rooms)
    wait_until(lambda: "remember" in rooms.faults.calls)
    time.sleep(0.2)
    assert rooms.faults.calls.count("remember") == 2  # after the first image, and at the end
    assert times_read(rooms) == 1


def test_a_disk_that_hangs(running: ExitStack, rooms: Rooms) -> None:
    """A shutdown does not wait for it."""
    complete(rooms)
    hangs, goes_on = threading.Event(), threading.Event()

    def plan(_number: int, name: str) -> None:
        if name == "read":
            hangs.set()
            goes_on.wait(10)

    rooms.faults.plan = plan
    scrubber = start(running, rooms)
    assert hangs.wait(5)
    began = time.monotonic()
    scrubber.close()
    assert time.monotonic() - began < 1.5
    goes_on.set()
    wait_until(lambda: not scrubber._thread.is_alive())
