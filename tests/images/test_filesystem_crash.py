"""The file system store, killed at random moments."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from imgsvc.images.filesystem import FilesystemImageStore
from tests.images.helpers import content, content_of, size_of


def write_until_killed(directory: Path, seconds: float) -> tuple[set[str], set[str]]:
    """The ids that the process said it had claimed, and those that it said it had committed, before kill -9."""
    command = [sys.executable, "-m", "tests.images.crash_writer", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline()]
        time.sleep(seconds)
        process.kill()
        said += process.stdout
    assert process.returncode == -9
    claimed = {line.split()[1] for line in said if line.startswith("claimed ")}
    committed = {line.split()[1] for line in said if line.startswith("committed ")}
    assert claimed
    return claimed, committed


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=[pytest.mark.release, pytest.mark.timeout(600)])])
def test_kill_at_random_moments(tmp_path: Path, kills: int) -> None:
    """Whatever was committed is there and whole; whatever else was claimed is unfinished, and nothing is both."""
    directory = tmp_path / "images"
    member = ""
    interrupted = 0
    before: set[str] = set()
    for _ in range(kills):
        claimed, committed = write_until_killed(directory, random.uniform(0, 0.2))
        with closing(FilesystemImageStore(directory)) as store:
            assert member in ("", store.member)
            member = store.member
            stored, unfinished = set(store.ids()), set(store.unfinished())
            assert committed | before <= stored
            assert claimed <= stored | unfinished
            assert not stored & unfinished
            for image_id in stored - before:
                assert content(store, image_id) == content_of(image_id, size_of(image_id))
            for image_id in unfinished:
                store.unclaim(image_id)
            assert list(store.unfinished()) == []
            interrupted += len(unfinished)
            before = stored
    assert interrupted, "no kill hit an image in the making, so nothing was tested"
