"""Resumable uploads survive the service: kills, stops, full disks, and what the disk lost."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from functools import partial
from pathlib import Path

import pytest

from tests.client import Connection
from tests.etcd_cluster import EtcdCluster
from tests.harness import wait_for
from tests.mounts import Mount
from tests.service.conftest import Settings, StartService
from tests.service.crash import end_lease
from tests.service.test_disk_full import DISK, fill, small_disk
from tests.service.tus.helpers import assert_whole
from tests.tus import Tus, checksum, id_of

MIB = 1 << 20
CONTENT = os.urandom(6 * MIB + 17)

__all__ = ["small_disk"]


@pytest.fixture
def tus(start_service: StartService) -> Tus:
    """With a service of the test's own."""
    return Tus(start_service())


@pytest.fixture
def anywhere(start_service: StartService, records: Settings) -> Tus:
    """The same, once with each metadata store."""
    return Tus(start_service(**records))


def restarted(tus: Tus) -> None:
    tus.service.kill()
    tus.service.start()


def bytes_of(tus: Tus, path: str) -> Path:
    return tus.service.images_dir / ".incoming" / id_of(path)


def notes_of(tus: Tus, path: str) -> Path:
    return tus.service.images_dir / ".incoming" / f"{id_of(path)}.notes"


def beyond(tus: Tus, path: str, offset: int) -> bool:
    return tus.offset(path) > offset


def test_killed_between_requests(anywhere: Tus) -> None:
    """The offset is the one that was answered last, to the byte, after each of several kills."""
    path = anywhere.create(len(CONTENT), comment="of a test", sha256=hashlib.sha256(CONTENT).hexdigest())
    given = anywhere.head(path).headers["Upload-Metadata"]
    at = 0
    for size in (0, 1, 2 * MIB + 1):
        anywhere.bring(path, at, CONTENT[at : at + size])
        at += size
        restarted(anywhere)
        assert anywhere.offset(path) == at
        assert anywhere.head(path).headers["Upload-Metadata"] == given
        image = anywhere.service.image(id_of(path))
        assert (image["status"], image["size"], image["comment"]) == ("downloading", at, "of a test")
    anywhere.bring(path, at, CONTENT[at:])
    assert_whole(anywhere, path, CONTENT)
    restarted(anywhere)
    assert_whole(anywhere, path, CONTENT)


def test_killed_in_a_request(tus: Tus) -> None:
    """No byte less is there than was told, no wrong one, and about a second of them is lost at most."""
    path = tus.create(len(CONTENT))
    at = 0
    chance = random.Random(7)
    for _ in range(2):
        with Connection(tus.service.port) as connection:
            tus.begin(connection, path, at, len(CONTENT) - at)
            connection.send(CONTENT[at : at + MIB + chance.randrange(MIB // 2)])
            wait_for(partial(beyond, tus, path, at + MIB // 2), 5, "bytes are there")
            told = tus.offset(path)
            restarted(tus)
        assert tus.offset(path) >= told
        at = tus.offset(path)
    tus.bring(path, at, CONTENT[at:])
    assert_whole(tus, path, CONTENT)


def test_killed_in_a_request_with_a_checksum(tus: Tus) -> None:
    """Nothing that was not found right is there afterwards."""
    path = tus.create(len(CONTENT))
    tus.bring(path, 0, CONTENT[:MIB], checksum("sha256", CONTENT[:MIB]))
    with Connection(tus.service.port) as connection:
        said = checksum("sha256", CONTENT[MIB:])["Upload-Checksum"]
        tus.begin(connection, path, MIB, len(CONTENT) - MIB, f"Upload-Checksum: {said}")
        connection.send(CONTENT[MIB : 4 * MIB])
        wait_for(lambda: bytes_of(tus, path).stat().st_size > 3 * MIB, 5, "bytes are on the disk")
        time.sleep(1.2)  # longer than between two checkpoints
        assert tus.offset(path) == MIB
        restarted(tus)
    assert tus.offset(path) == MIB
    tus.bring(path, MIB, CONTENT[MIB:], checksum("sha1", CONTENT[MIB:]))
    assert_whole(tus, path, CONTENT)


def test_stopped_in_a_request(start_service: StartService) -> None:
    """The request gets shutdownTimeout to end, and then 503; the upload goes on at the next start."""
    service = start_service(shutdown_timeout=1)
    tus = Tus(service)
    path, idle = tus.create(len(CONTENT)), tus.create(5)
    tus.bring(idle, 0, b"12")
    with Connection(service.port) as connection:
        tus.begin(connection, path, 0, len(CONTENT))
        connection.send(CONTENT[:1000])
        wait_for(lambda: tus.offset(path) == 1000, 5, "the bytes are there")
        connection.send(CONTENT[1000:2000])
        began = time.monotonic()
        assert service.terminate() == 0
        assert 0.9 < time.monotonic() - began < 4
        answer = connection.answer()
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    service.start()
    assert (tus.offset(path), tus.offset(idle)) == (2000, 2)
    tus.bring(path, 2000, CONTENT[2000:])
    tus.bring(idle, 2, b"345")
    assert_whole(tus, path, CONTENT)
    assert_whole(tus, idle, b"12345")


@pytest.mark.parametrize("wanted", ["", "right", "wrong"])
def test_killed_before_the_record_is_complete(tus: Tus, wanted: str) -> None:
    """All bytes are under their name, and no answer was sent: they are verified, and the image is complete, unless the
    digest is not the one that was announced."""
    digests = {"right": hashlib.sha256(CONTENT).hexdigest(), "wrong": "ab" * 32}
    path = tus.create(len(CONTENT), **({"sha256": digests[wanted]} if wanted else {}))
    tus.bring(path, 0, CONTENT[:-1])
    tus.service.kill()
    with bytes_of(tus, path).open("ab") as file:
        file.write(CONTENT[-1:])
    bytes_of(tus, path).rename(tus.service.images_dir / id_of(path))
    tus.service.start()
    image = tus.service.wait_status(id_of(path), "complete", "error")
    if wanted == "wrong":
        assert (image["status"], image["size"]) == ("error", 0)
        assert digests[wanted] in image["error"]
        wait_for(lambda: tus.service.stored() == tus.service.incoming() == set(), 2, "nothing is left")
        assert tus.head(path).status == 410
    else:
        assert_whole(tus, path, CONTENT)
        assert tus.service.incoming() == set()


def test_what_the_disk_lost(tus: Tus) -> None:
    """After a loss of power the upload goes on behind the last checkpoint that is right; without notes it is over."""
    cut, spoilt, noteless, empty = (tus.create(len(CONTENT)) for _ in range(4))
    for path in (cut, spoilt, noteless, empty):
        for at in range(0, 3 * MIB, MIB):
            tus.bring(path, at, CONTENT[at : at + MIB])
    tus.service.kill()
    os.truncate(bytes_of(tus, cut), 2 * MIB + 5)
    with bytes_of(tus, spoilt).open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(1000))
    os.truncate(bytes_of(tus, empty), 0)
    notes_of(tus, noteless).unlink()
    tus.service.start()
    assert tus.service.image(id_of(noteless))["status"] == "error"
    assert tus.head(noteless).status == 410
    for path, at in ((cut, 2 * MIB), (spoilt, MIB), (empty, 0)):
        assert tus.offset(path) == at
        restarted(tus)
        assert tus.offset(path) == at
        tus.bring(path, at, CONTENT[at:])
        assert_whole(tus, path, CONTENT)
    assert tus.service.incoming() == set()


def test_a_restart_while_bytes_are_verified(start_service: StartService) -> None:
    """Until they are, 503 says to come again; a kill or a stop in the middle of it costs nothing, nor does a DELETE."""
    service = start_service()
    tus = Tus(service)
    size = 256 * MIB
    path, other = tus.create(size + 1), tus.create(size + 1)
    service.terminate()
    for each in (path, other):
        leave_zeros(tus, each, size, "a6d72ac7690f53be6ae46ba88506bd97302a093f7108472bd9efc3cefda06484")
    for end in (service.kill, service.terminate):
        service.start()
        answers = [tus.head(path), tus.head(other)]  # one may be ready by now, if this machine is slow
        assert [answer.headers["Retry-After"] for answer in answers if answer.status == 503][-1:] == ["1"]
        assert {service.image(id_of(each))["status"] for each in (path, other)} == {"downloading"}
        end()
    service.start()
    assert tus.terminate(other).status == 204
    assert tus.head(other).status == tus.patch(other, size, b"1").status == 404
    assert tus.offset(path) == size
    assert tus.head(other).status == 404
    tus.bring(path, size, b"1")
    digest = "93dd2398e910cae2b562049d27989c4ac847d5373e71e1c26a953dfa907bdaa6"
    assert (service.image(id_of(path))["status"], service.image(id_of(path))["sha256"]) == ("complete", digest)
    assert service.incoming() == set()


def leave_zeros(tus: Tus, path: str, size: int, sha256: str) -> None:
    """As if so many had come; they are a hole in the file."""
    os.truncate(bytes_of(tus, path), size)
    with notes_of(tus, path).open("r+") as notes:
        mark = json.loads(notes.read().splitlines()[1])["mark"]  # each has an empty line before it
        notes.write(json.dumps({"size": size, "sha256": sha256, "mark": mark, "at": time.time()}) + "\n")


class TestFullDisk:
    def test_it_can_go_on(self, small_disk: Path, start_service: StartService) -> None:
        """What does not fit is 507; what came is kept, and goes on when there is room, be it after a kill."""
        tus = Tus(start_service(small_disk / "data"))
        content = os.urandom(20 * MIB)
        path = tus.create(len(content))
        with Connection(tus.service.port) as connection:
            tus.begin(connection, path, 0, len(content))
            connection.send(content[: 5 * MIB])
            wait_for(partial(beyond, tus, path, 5 * MIB - 1), 5, "the bytes are there")
            fill(small_disk / "filler")
            connection.send(content[5 * MIB : 6 * MIB])
            answer = connection.answer()
            assert (answer.status, answer.json()["code"]) == (507, 507)
        assert tus.offset(path) == 5 * MIB
        assert tus.patch(path, 5 * MIB, content[5 * MIB :]).status == 507
        assert tus.service.image_files() == []
        (small_disk / "filler").unlink()
        restarted(tus)
        tus.bring(path, tus.offset(path), content[5 * MIB :])
        assert_whole(tus, path, content)

    def test_announcements(self, small_disk: Path, start_service: StartService) -> None:
        """An upload to which nobody brings bytes keeps no room from others."""
        tus = Tus(start_service(small_disk / "data"))
        idle = tus.create(30 * MIB)
        with Connection(tus.service.port) as connection:
            running = tus.create(30 * MIB)
            tus.begin(connection, running, 0, 30 * MIB)
            connection.send(b"1")
            wait_for(lambda: tus.offset(running) == 1, 5, "bytes are there")
            assert tus.post(30 * MIB).status == 507
            assert tus.patch(idle, 0, b"1").status == 507
        wait_for(lambda: tus.service.image_files() == [], 5, "the request is over")
        assert tus.patch(idle, 0, b"1").status == 204

    def test_the_store_of_bytes_fails(self, mount: Mount, start_service: StartService, tmp_path: Path) -> None:
        """A disk that takes nothing any more in the middle of a block: what was noted before is kept."""
        directory = tmp_path / "disk"
        directory.mkdir()
        mount("-t", "tmpfs", "-o", f"size={DISK}", "imgsvc-test", directory)
        tus = Tus(start_service(tmp_path / "data", image_store_config_dir=directory / "images", disk_reserve="0"))
        content = os.urandom(4 * MIB)
        path = tus.create(4 * MIB)
        tus.bring(path, 0, content[:1000])
        fill(directory / "filler")
        answer = tus.patch(path, 1000, iter([content[1000:MIB], content[MIB:]]))
        assert answer.status == 507
        at = tus.offset(path)
        (directory / "filler").unlink()
        restarted(tus)
        assert tus.offset(path) == at
        tus.bring(path, at, content[at:])
        assert_whole(tus, path, content)


class TestHosts:
    @pytest.fixture
    def hosts(self, new_host: StartService) -> tuple[Tus, Tus]:
        return Tus(new_host()), Tus(new_host())

    def test_at_another_host(self, hosts: tuple[Tus, Tus]) -> None:
        """It is 503 there, and once it is complete, it is so everywhere; a DELETE there ends it here."""
        one, other = hosts
        path, doomed = one.create(5), one.create(5)
        for each in (path, doomed):
            one.bring(each, 0, b"12")
            assert other.head(each).status == 503
            refused = other.patch(each, 2, b"345")
            assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
            assert f"http://127.0.0.1:{one.service.port}" in refused.message
        assert other.terminate(doomed).status == 204
        wait_for(lambda: id_of(doomed) not in one.service.incoming(), 6, "its bytes are gone")
        assert one.head(doomed).status == 404
        one.bring(path, 2, b"345")
        assert other.offset(path) == 5

    def test_gone_for_longer_than_the_lease(self, hosts: tuple[Tus, Tus], etcd: EtcdCluster) -> None:
        """Nobody is on record as its owner any more: what is on the disk tells."""
        one, other = hosts
        path = one.create(5)
        one.bring(path, 0, b"12")
        one.service.kill()
        end_lease(etcd, one.service)
        restarted(other)
        assert other.head(path).status == 503
        one.service.start()
        assert one.offset(path) == 2
        one.bring(path, 2, b"345")
        assert_whole(one, path, b"12345")
