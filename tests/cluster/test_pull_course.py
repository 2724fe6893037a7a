"""How far a pull has come, as those hear it who follow."""

from __future__ import annotations

import pytest

from imgsvc.cluster.course import HELD_BACK, Course
from imgsvc.errors import Unavailable

SIZE = 10 * HELD_BACK


class Woken:
    """Counts."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def test_woken_once_by_its_byte() -> None:
    """Not by one before it, and not again."""
    course, early, late = Course(SIZE), Woken(), Woken()
    course.wait("early", 0, None, early)
    course.wait("late", HELD_BACK, None, late)
    course.advance(HELD_BACK)
    assert (early.times, late.times, course.arrived(0)) == (1, 0, HELD_BACK)
    course.advance(1)
    course.verify()
    assert (early.times, late.times, course.arrived(0)) == (1, 1, SIZE)


def test_what_is_there_wakes_at_once() -> None:
    course, woken = Course(SIZE), Woken()
    course.advance(HELD_BACK)
    course.wait("follower", HELD_BACK - 1, None, woken)
    assert woken.times == 1


def test_who_leaves_is_forgotten() -> None:
    course, woken = Course(SIZE), Woken()
    course.wait("follower", 0, None, woken)
    assert course.followed
    course.forget("follower")
    course.verify()
    assert (woken.times, course.followed) == (0, False)


def test_who_has_enough_for_now_follows() -> None:
    """Until it leaves."""
    course = Course(SIZE)
    course.wait("slow", 0, None, Woken())
    course.advance(2 * HELD_BACK)
    assert course.followed
    course.forget("slow")
    assert not course.followed


def test_the_last_bytes_are_held_back() -> None:
    """Though all have come."""
    course = Course(SIZE)
    course.advance(SIZE)
    assert course.arrived(0) == SIZE - HELD_BACK
    course.verify()
    assert course.arrived(0) == SIZE


def test_a_turn_wakes_everybody() -> None:
    """Also who hears of it only when it begins to wait."""
    course, early, late = Course(SIZE), Woken(), Woken()
    course.advance(2 * HELD_BACK)
    read_of = course.attempt
    course.wait("early", 9 * HELD_BACK, read_of, early)
    course.begin_anew()
    course.wait("late", 9 * HELD_BACK, read_of, late)
    assert (early.times, late.times) == (1, 1)
    with pytest.raises(Unavailable):
        course.require(read_of)
    assert course.arrived(0) == 0


def test_an_end_is_for_all() -> None:
    """The first one that was given, and none after all is right or goes on without a copy."""
    failed, whole, passed_on = Course(SIZE), Course(SIZE), Course(SIZE)
    whole.verify()
    passed_on.pass_on("digest")
    for course in (failed, whole, passed_on):
        course.fail(Unavailable("first"))
        course.fail(Unavailable("second"))
    with pytest.raises(Unavailable, match="first"):
        failed.arrived(0)
    failed.pass_on("digest")
    assert failed.passed_on is None
    assert (whole.arrived(0), passed_on.arrived(0)) == (SIZE, 0)
