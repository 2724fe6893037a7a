"""What the README shows of a cluster is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster_of_three import ClusterOfThree
from tests.harness import wait_for
from tests.test_docs import README, Example

# As the README calls them.
SETTINGS: dict[str, object] = {"cluster_replicas": 2}
NAMES = ("one", "three", "two")
_BLOCK = re.compile(r"^ *```sh cluster\n((?:.*\n)*?) *```\n *```text\n((?:.*\n)*?) *```\n", re.MULTILINE)


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl here")
def test_the_example(cluster: ClusterOfThree, tmp_path: Path) -> None:
    """An upload at one, and downloads at all: what is printed is what stands there."""
    (block,) = _BLOCK.findall(README)
    script, output = block
    for member, number, name in zip(cluster.members, (1, 3, 2), NAMES, strict=True):
        script = script.replace(f"http://10.0.0.{number}:20000", member.url)
        script = script.replace(f"10.0.0.{number}", f"{member.address}:{member.port}")
        output = output.replace(f"http://10.0.0.{number}:20000", member.url).replace(f'"{name}"', f'"{member.id}"')
    for member in cluster.members:
        wait_for(lambda member=member: len(member.get("/members").json()) == 3, 5, "all know all")  # type: ignore[misc]
    (tmp_path / "guest.img").write_bytes(os.urandom(1 << 20))
    done = subprocess.run(
        cluster.outside.command("bash", "-eu", "-o", "pipefail", "-c", script.replace("$host:20000", "$host")),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Example(script, output).is_answered_by(done.stdout), done.stdout
