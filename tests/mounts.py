"""Small file systems of their own, for tests that fill them, take them away or forbid writing to them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

Mount = Callable[..., None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """As `mounting`."""
    with mounting() as mount:
        yield mount


@contextmanager
def mounting() -> Iterator[Mount]:
    """`mount(*arguments, directory)` as the command of that name, undone in the end; skips where mounting is not
    allowed."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    with ExitStack() as mounted:

        def call(*arguments: str | Path) -> None:
            done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
            mounted.callback(subprocess.run, ["umount", "--lazy", arguments[-1]], capture_output=True, check=False)

        yield call


@pytest.fixture
def tmpfs(mount: Mount, tmp_path: Path) -> Path:
    """A file system of 8 MiB."""
    directory = tmp_path / "tmpfs"
    directory.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "imgsvc-test", directory)
    return directory
