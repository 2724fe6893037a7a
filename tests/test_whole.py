"""Whole images, read at a pace."""

from __future__ import annotations

import hashlib
import time
from contextlib import closing

import pytest

from imgsvc.errors import Stopping
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import new_id
from imgsvc.whole import Pace, digest_of
from tests.images.helpers import BLOCK, content_of, put


@pytest.mark.parametrize("size", [0, 1, BLOCK, 2 * BLOCK + 5])
def test_digest(size: int) -> None:
    """Of all bytes, and each of them is told of."""
    store, image_id = MemoryImageStore(), new_id()
    store.mark("records")
    body = content_of(image_id, size)
    put(store, image_id, body)
    told: list[int] = []
    with closing(store.open(image_id)) as reader:
        assert digest_of(reader, told.append) == hashlib.sha256(body).hexdigest()
    assert sum(told) == size


def test_a_reading_that_is_ended() -> None:
    """By whoever is told of the blocks."""
    store, image_id = MemoryImageStore(), new_id()
    store.mark("records")
    put(store, image_id, bytes(3 * BLOCK))
    told: list[int] = []

    def between(count: int) -> None:
        told.append(count)
        raise Stopping("enough")

    with closing(store.open(image_id)) as reader, pytest.raises(Stopping):
        digest_of(reader, between)
    assert told == [BLOCK]


def test_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is late by less than a second is made up for; a long pause is not."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = Pace(10)
    assert pace.delay(5) == pytest.approx(0.5)
    assert pace.delay(5) == pytest.approx(1.0)
    now = 101.5
    assert pace.delay(5) == pytest.approx(0.0)
    assert pace.delay(5) == pytest.approx(0.5)
    now = 1_000.0
    assert pace.delay(10) == pytest.approx(0.0)
    assert pace.delay(10) == pytest.approx(1.0)
    assert Pace(0).delay(1 << 40) == 0
