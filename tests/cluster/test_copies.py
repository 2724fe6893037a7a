"""Copies that other members, or damage, ask for: one for an image, few at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from structlog.testing import capture_logs

from imgsvc.cluster import copies
from imgsvc.cluster.copies import Copies
from imgsvc.errors import NotComplete, NotFound, Unavailable
from imgsvc.metadata.image import Image, ImageType, new_id
from imgsvc.throttle import Throttle
from tests.rooms import wait_until


class Copier:
    """Copies what it is told to, when the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.copied: list[str] = []
        self.held: set[str] = set()
        self.busy = 0
        self.failure: Exception | None = None

    def copy(self, image: Image, throttle: Throttle | None = None) -> None:
        self.copied.append(image.id)
        self.busy += 1
        self.gate.wait(10)
        self.busy -= 1
        if self.failure is not None:
            raise self.failure


def whole(image_id: str) -> Image:
    return Image(image_id, ImageType.KVM).completed(1, "ab")


@pytest.fixture
def copier() -> Iterator[Copier]:
    copier = Copier()
    yield copier
    copier.gate.set()


@pytest.fixture
def asked(copier: Copier) -> Iterator[Copies]:
    with closing(Copies(copier, whole, copier.held.__contains__)) as asked:
        yield asked
        copier.gate.set()


def test_one_for_all_who_ask(copier: Copier, asked: Copies) -> None:
    """And a new one when it is over: what was copied may be gone again."""
    image_id = new_id()
    ends = [asked.begin(image_id) for _ in range(10)]
    copier.gate.set()
    assert [end.result(5) for end in ends] == [None] * 10
    assert copier.copied == [image_id]
    wait_until(lambda: not asked._running)
    asked.begin(image_id).result(5)
    assert copier.copied == [image_id] * 2


def test_what_is_held(copier: Copier, asked: Copies) -> None:
    """Then there is nothing to do."""
    image_id = new_id()
    copier.held.add(image_id)
    asked.begin(image_id).result(5)
    assert copier.copied == []


def test_few_at_a_time(copier: Copier, asked: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait, and there is an end to how many may."""
    monkeypatch.setattr(copies, "_MOST", 10)
    ends = [asked.begin(new_id()) for _ in range(10)]
    with pytest.raises(Unavailable, match="too many"):
        asked.begin(new_id())
    wait_until(lambda: copier.busy == 4)
    copier.gate.set()
    for end in ends:
        end.result(5)
    assert len(copier.copied) == 10


def test_failures(copier: Copier, asked: Copies) -> None:
    """Who asked is told; the next one who asks has it tried again."""
    image_id = new_id()
    copier.failure = Unavailable("nobody has it")
    copier.gate.set()
    with pytest.raises(Unavailable, match="nobody"):
        asked.begin(image_id).result(5)
    wait_until(lambda: not asked._running)
    copier.failure = None
    asked.begin(image_id).result(5)


def test_what_is_not_complete(copier: Copier) -> None:
    """It is not copied."""
    pending = Copies(copier, lambda image_id: Image(image_id, ImageType.KVM), copier.held.__contains__)
    with closing(pending), pytest.raises(NotComplete):
        pending.begin(new_id()).result(5)
    assert copier.copied == []


@pytest.mark.parametrize(
    ("failure", "level"), [(None, "info"), (NotFound("it was deleted"), "warning"), (ValueError("ours"), "error")]
)
def test_mending(copier: Copier, asked: Copies, failure: Exception | None, level: str) -> None:
    """Nobody waits for it; the log says what came of it."""
    copier.failure = failure
    copier.gate.set()
    with capture_logs() as logged:
        asked.mend(new_id())
        wait_until(lambda: any(line["log_level"] == level for line in logged))


def test_the_end(copier: Copier) -> None:
    """What waits is dropped, and nothing is begun any more."""
    asked = Copies(copier, whole, copier.held.__contains__)
    ends = [asked.begin(new_id()) for _ in range(6)]
    wait_until(lambda: copier.busy == 4)
    threading.Timer(1.0, copier.gate.set).start()
    asked.close()
    assert [end.cancelled() for end in ends] == [False] * 4 + [True] * 2
    with pytest.raises(Unavailable, match="stopping"):
        asked.begin(new_id())
    asked.mend(new_id())
