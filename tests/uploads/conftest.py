"""Where a service with uploads runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.rooms import DiskPlace, Place


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Place]:
    with closing(DiskPlace(tmp_path)) as place:
        yield place
