"""Bits that rot on the disk, found by `imgsvc scrub` and by the service itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness import Service, wait_for
from tests.service.conftest import MIB, StartService
from tests.source import Source

DAMAGED = "image damaged"


def command(service: Service, *flags: str) -> list[str]:
    return [sys.executable, "-m", "imgsvc", "scrub", "--data-dir", str(service.data_dir), *flags]


def scrub(service: Service, *flags: str) -> tuple[int, list[str]]:
    """The exit status and what was printed."""
    done = subprocess.run(
        command(service, *flags), env=service._environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def flip(service: Service, image_id: str, offset: int = 700_000) -> bytes:
    """One bit; returns the bytes as they are now."""
    path = service.images_dir / image_id
    body = bytearray(path.read_bytes())
    body[offset] ^= 4
    path.write_bytes(body)
    return bytes(body)


def check_aside(service: Service, image_id: str, rotten: bytes) -> None:
    """It is refused, its record says why, and its bytes are kept. What another process wrote may take a second."""
    answer = service.download(image_id)
    assert (answer.status, answer.message) == (404, "incomplete image")
    image = service.wait_status(image_id, "error", timeout=1.0)
    assert image["error"].startswith("the image is damaged: its sha256 is ")
    assert image["error"].endswith("; its bytes are in quarantine")
    assert (service.images_dir / ".quarantine" / image_id).read_bytes() == rotten
    assert image_id not in service.stored()


def summary(matching: int, size: int, damaged: int = 0) -> str:
    return f"{matching} images of {size} bytes match, {damaged} do not, 0 cannot be read, 0 are left out"


@pytest.mark.parametrize("beside", [True, False], ids=["beside the service", "alone"])
def test_the_command(start_service: StartService, source: Source, beside: bool) -> None:
    """It finds a flipped bit, and sets that image aside and no other; afterwards the source is fetched again by a
    POST, and another start finds all as it was."""
    service = start_service()
    body, other = os.urandom(MIB), service.upload(os.urandom(3 * MIB))
    url = source.serve("/guest", body)
    image = service.wait_status(service.fetch(url)["id"], "complete")
    assert scrub(service) == (0, [summary(2, 4 * MIB)])
    if not beside:
        service.close()
    rotten = flip(service, image["id"])
    status, (finding, last) = scrub(service)
    assert (status, last) == (1, summary(1, 3 * MIB, damaged=1))
    assert finding.startswith(f"{image['id']}: its sha256 is ")
    assert image["sha256"] in finding
    if not beside:
        service.start()
    check_aside(service, image["id"], rotten)
    assert service.image(other["id"]) == other
    service.fetch(url)
    assert service.wait_status(image["id"], "complete")["sha256"] == image["sha256"]
    assert service.download(image["id"]).body == body
    service.close()
    service.start()
    assert scrub(service) == (0, [summary(2, 4 * MIB)])
    assert service.delete(image["id"]).status == 200
    assert [path.name for path in (service.images_dir / ".quarantine").iterdir()] == [image["id"]]


def test_a_copy_of_which_there_is_another(new_host: StartService) -> None:
    """The host whose copy is damaged lets go of it; the image stays complete, and comes from the other host. When the
    copies of both are damaged, it is lost."""
    one, other = new_host(), new_host()
    body = os.urandom(MIB)
    image = one.upload(body)
    other.close()
    (other.images_dir / image["id"]).write_bytes(body)
    other.start()
    wait_for(lambda: len(one.image(image["id"])["replicas"]) == 2, 10, "the copy is found right")
    rotten = flip(one, image["id"])
    status, (finding, _) = scrub(one)
    assert (status, finding.split(":")[0]) == (1, image["id"])
    (left,) = other.image(image["id"])["replicas"]
    assert left not in image["replicas"]
    assert other.image(image["id"]) == {**image, "replicas": [left]}
    assert other.download(image["id"]).body == one.download(image["id"]).body == body
    wait_for(lambda: len(one.image(image["id"])["replicas"]) == 2, 10, "it has been brought back")
    assert (one.images_dir / ".quarantine" / image["id"]).read_bytes() == rotten
    for host in (one, other):
        flip(host, image["id"])
        assert scrub(host)[0] == 1
    assert one.image(image["id"])["status"] == "error"


def test_in_the_background(start_service: StartService) -> None:
    """The service finds it by itself, says so once with level error, and serves the others."""
    service = start_service(scrub_interval=0.5)
    image, other = service.upload(os.urandom(MIB)), service.upload(b"other")
    rotten = flip(service, image["id"])
    service.expect_errors(DAMAGED)
    service.wait_status(image["id"], "error")
    check_aside(service, image["id"], rotten)
    assert service.download(other["id"]).body == b"other"
    passes = len(service.events("scrub"))
    wait_for(lambda: len(service.events("scrub")) > passes + 1, 5, "passes follow")
    assert [line["image"] for line in service.events(DAMAGED)] == [image["id"]]


def test_a_file_that_was_cut(start_service: StartService) -> None:
    """It is set aside like one that is wrong, and a running service needs no restart for that."""
    service = start_service()
    image = service.upload(os.urandom(MIB))
    os.truncate(service.images_dir / image["id"], MIB - 1)
    assert scrub(service)[0] == 1
    assert f"its file has {MIB - 1} bytes, and the image {MIB}" in service.image(image["id"])["error"]


def test_the_rate(start_service: StartService) -> None:
    """It counts the bytes of all images together: 100 MB at 80 MB/s take more than a second."""
    service = start_service()
    for size in (60_000_000, 40_000_000):
        service.upload(os.urandom(size))
    began = time.monotonic()
    assert scrub(service, "--bytes-per-second", "80000000") == (0, [summary(2, 100_000_000)])
    assert 1.25 < time.monotonic() - began < 5


def test_a_service_that_is_stopped_in_the_middle(start_service: StartService) -> None:
    """It ends at once, and the next start goes on with the image that it had come to."""
    service = start_service(scrub_bytes_per_second=0)
    first, second = sorted(service.upload(os.urandom(2 * MIB))["id"] for _ in range(2))
    service.close()
    service.settings |= {"scrub_bytes_per_second": 2 * MIB}
    service.start()
    wait_for(lambda: is_open(service, second), 15, "it reads the second image")
    began = time.monotonic()
    service.close()
    assert time.monotonic() - began < 2
    flip(service, first)
    rotten = flip(service, second)
    service.settings |= {"scrub_bytes_per_second": 1 << 30}
    service.start()
    service.expect_errors(DAMAGED)
    service.wait_status(second, "error")
    check_aside(service, second, rotten)
    wait_for(lambda: service.events("scrub"), 5, "the pass is over")
    assert service.image(first)["status"] == "complete"


def test_an_image_that_is_deleted_while_it_is_read(start_service: StartService) -> None:
    """Its space comes back long before it would have been read."""
    service = start_service(scrub_bytes_per_second=1_000, scrub_interval=0.2)
    image = service.upload(os.urandom(2 * MIB))
    wait_for(service.image_files, 10, "it is read")
    assert service.delete(image["id"]).status == 200
    wait_for(lambda: service.image_files() == [], 10, "it is closed")


def test_a_command_that_is_ended(start_service: StartService) -> None:
    """By a signal, between two blocks, with a summary of what it had done."""
    service = start_service()
    service.upload(os.urandom(2 * MIB))
    with ExitStack() as ends:
        running = ends.enter_context(
            subprocess.Popen(
                command(service, "--bytes-per-second", "1000"),
                env=service._environment(),
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        ends.callback(running.kill)
        wait_for(lambda: opened_images(running.pid), 10, "it reads")
        running.send_signal(signal.SIGTERM)
        assert running.wait(2) == 1
        assert running.stdout is not None
        assert running.stdout.read() == f"{summary(0, 0)}; stopped before the end\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bytes-per-second", "-1"], "--bytes-per-second must be a number of bytes, 0 or more, not '-1'"),
        (["--bytes-per-second", "fast"], "--bytes-per-second must be a number of bytes, 0 or more, not 'fast'"),
        (["-l", "loud"], "--log-level must be "),
        (["-c", "absent.toml"], "the config file absent.toml cannot be read: "),
        ([], "there are no records in "),
    ],
)
def test_a_wrong_setting(tmp_path: Path, flags: list[str], said: str) -> None:
    """One sentence and exit status 2; nothing is made where there was no service."""
    service = Service(tmp_path / "data")
    done = subprocess.run(
        command(service, *flags), env=service._environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"imgsvc: {said}")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.release
def test_records_that_are_away(start_service: StartService) -> None:
    """A command that cannot begin says why and ends, so that no timer waits for it for ever."""
    service = start_service()
    service.upload(b"whole")
    service.settings |= {
        "metadata_store_type": "etcd",
        "metadata_store_config_machines": ["http://127.0.0.1:1"],
    }
    done = subprocess.run(
        command(service), env=service._environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("imgsvc: etcd at 127.0.0.1:1 gave no answer")


def is_open(service: Service, image_id: str) -> bool:
    return any(image_id in name for name in service.image_files())


def opened_images(pid: int) -> list[str]:
    names = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    return [name for name in names if "/images/" in name]
