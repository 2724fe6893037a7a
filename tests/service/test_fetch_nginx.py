"""A fetch from the server that most sources are."""

from __future__ import annotations

import hashlib
import random
from contextlib import closing
from pathlib import Path

import pytest

from tests.bench.programs import Nginx, program_path
from tests.service.conftest import StartService

MIB = 1 << 20


@pytest.mark.skipif(program_path("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("connections", [1, 4, 16])
def test_large(start_service: StartService, tmp_path: Path, connections: int) -> None:
    """200 MiB, over one connection or several, come as they are, in bounded memory."""
    root = tmp_path / "www"
    root.mkdir()
    piece = random.Random(5).randbytes(8 * MIB)
    digest = hashlib.sha256()
    with (root / "image").open("wb") as file:
        for number in range(25):
            block = number.to_bytes(8, "big") + piece[8:]
            digest.update(block)
            file.write(block)
    service = start_service(fetch_connections=connections)
    before = service.memory()
    with closing(Nginx(tmp_path / "nginx", root)) as nginx:
        image = service.wait_status(service.fetch(f"{nginx.url}/image")["id"], "complete", "error", timeout=60)
    assert (image["status"], image["size"], image["sha256"]) == ("complete", 200 * MIB, digest.hexdigest())
    # A piece for each connection, and what is on its way through.
    assert service.memory("VmHWM") - before < (connections * 8 + 48) * MIB
