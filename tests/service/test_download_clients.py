"""Programs that others wrote, which download in parts: curl, wget, aria2 and qemu."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Service, wait_for
from tests.service.conftest import MIB

CONTENT = os.urandom(24 * MIB)
# Of the blocks that qemu reads remotely; its package has this driver in one of its own.
CURL_DRIVER = "block-curl.so"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("clients")) as service:
        yield service


def run(program: str, *arguments: str | Path, package: str | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program} (Debian's {package or program})")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


def url(service: Service, image_id: str) -> str:
    return f"{service.url}/images/{image_id}/download"


def logged(service: Service, image_id: str) -> list[tuple[int, int]]:
    """Status and bytes of the downloads of an image so far."""
    lines = service.events("request", path=f"/images/{image_id}/download")
    return [(line["status"], line["bytes"]) for line in lines]


def cut_off(service: Service, image_id: str, file: Path) -> int:
    """Has curl killed in the middle of a download; returns the bytes that it has stored."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    command = ["curl", "-sS", "--limit-rate", "8M", "-o", str(file), url(service, image_id)]
    with subprocess.Popen(command) as curl:
        wait_for(lambda: file.exists() and file.stat().st_size > MIB, 10, "curl has stored a part")
        curl.kill()
    wait_for(lambda: len(logged(service, image_id)) == 1, 5, "the service knows that curl is gone")
    have = file.stat().st_size
    assert MIB < have < len(CONTENT)
    return have


RESUMING = [("curl", "-sS", "-f", "-C", "-", "-o"), ("wget", "-q", "-c", "-O")]


@pytest.mark.parametrize("command", RESUMING, ids=lambda command: command[0])
def test_goes_on_with_a_download(service: Service, tmp_path: Path, command: tuple[str, ...]) -> None:
    """What was cut off is gone on with, and only what is missing sent; once it is whole, nothing is."""
    image, file = service.upload(CONTENT), tmp_path / "file"
    have = cut_off(service, image["id"], file)
    done = run(*command, file, url(service, image["id"]))
    assert done.returncode == 0, done
    assert file.read_bytes() == CONTENT
    wait_for(lambda: len(logged(service, image["id"])) == 2, 5, "the rest is logged")
    assert logged(service, image["id"])[1] == (206, len(CONTENT) - have)
    # With -f some versions of curl fail on the 416 by which a server says that there is no more.
    again = run(*(word for word in command if word != "-f"), file, url(service, image["id"]))
    assert again.returncode == 0, again
    assert file.read_bytes() == CONTENT
    wait_for(lambda: len(logged(service, image["id"])) == 3, 5, "the last request is logged")
    assert logged(service, image["id"])[2][0] == 416


@pytest.mark.parametrize("command", RESUMING, ids=lambda command: command[0])
def test_an_image_that_is_gone(service: Service, tmp_path: Path, command: tuple[str, ...]) -> None:
    """A client that goes on with a deleted image is told, and what it has stays as it is."""
    image, file = service.upload(CONTENT[:MIB]), tmp_path / "file"
    file.write_bytes(CONTENT[:1000])
    assert service.delete(image["id"]).status == 200
    done = run(*command, file, url(service, image["id"]))
    assert done.returncode != 0
    assert file.read_bytes() == CONTENT[:1000]


def test_over_many_connections(service: Service, tmp_path: Path) -> None:
    """aria2 gets its pieces side by side, and each request is logged with what it got."""
    image = service.upload(CONTENT)
    options = ["-x8", "-s8", "-k1M", "--max-overall-download-limit=48M", "-q", "--no-conf", "--file-allocation=none"]
    digest = f"--checksum=sha-256={image['sha256']}"
    done = run("aria2c", *options, digest, "-d", tmp_path, "-o", "file", url(service, image["id"]), package="aria2")
    assert done.returncode == 0, done
    assert (tmp_path / "file").read_bytes() == CONTENT
    wait_for(lambda: sum(size for _, size in logged(service, image["id"])) >= len(CONTENT), 5, "all is logged")
    lines = service.events("request", path=f"/images/{image['id']}/download")
    parts = [line for line in lines if line["status"] == 206]
    assert len(parts) > 1, lines
    assert most_at_once(lines) > 1, lines


def most_at_once(lines: list[dict[str, Any]]) -> int:
    """How many of these requests were being answered at the same time; a line is written when its request ends."""
    ends: list[tuple[float, float]] = [
        (datetime.fromisoformat(line["timestamp"]).timestamp(), line["duration"]) for line in lines
    ]
    return max(sum(end - duration <= moment <= end for end, duration in ends) for moment, _ in ends)


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A disk of 64 MiB in qcow2, with data here and there."""
    file = tmp_path / "guest.qcow2"
    assert run("qemu-img", "create", "-q", "-f", "qcow2", file, "64M", package="qemu-utils").returncode == 0
    writes = ["-c", "write -q -P 0x5a 0 1M", "-c", "write -q -P 0xa5 33M 3M", "-c", "write -q -P 1 67108352 512"]
    assert run("qemu-io", *writes, file, package="qemu-utils").returncode == 0
    return file


def test_qemu_reads_a_disk_where_it_is(service: Service, guest: Path, tmp_path: Path) -> None:
    """`qemu-img info` and `convert` work on the URL, and find what is in the file."""
    if not any(Path("/usr/lib").glob(f"*/qemu/{CURL_DRIVER}")):
        pytest.skip("qemu cannot read from HTTP here (Debian's qemu-block-extra)")
    image = service.upload(guest.read_bytes())
    info = run("qemu-img", "info", "--output=json", url(service, image["id"]))
    assert info.returncode == 0, info
    found = json.loads(info.stdout)
    assert (found["format"], found["virtual-size"]) == ("qcow2", 64 * MIB)
    here, there = tmp_path / "here.raw", tmp_path / "there.raw"
    for source, raw in ((guest, here), (url(service, image["id"]), there)):
        done = run("qemu-img", "convert", "-O", "raw", source, raw)
        assert done.returncode == 0, done
    assert here.read_bytes() == there.read_bytes()
    assert there.read_bytes()[33 * MIB] == 0xA5
    assert 206 in [status for status, _ in logged(service, image["id"])]
