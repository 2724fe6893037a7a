"""Names that have to be looked up before a source can be asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

UNSHARED = ["unshare", "--mount", "--net", "--propagation", "private"]


@pytest.fixture
def namespaces() -> list[str]:
    """In front of a command, gives it mounts and a network of its own."""
    if os.geteuid() != 0 or subprocess.run([*UNSHARED, "true"], capture_output=True, check=False).returncode:
        pytest.skip("only root may have a name service of its own")
    return UNSHARED


def test_a_name_service_that_does_not_answer(namespaces: list[str], tmp_path: Path) -> None:
    """Who is told to stop meanwhile, by a deletion or a shutdown, does not wait for it: it takes ten seconds."""
    command = [*namespaces, sys.executable, "-W", "error", "-m", "tests.silent_names", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert 1.0 <= float(done.stdout) < 2.0
