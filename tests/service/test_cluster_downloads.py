"""Downloads at members that have not the bytes: real members, some of which die, freeze, rot or are full."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from imgsvc.etcd_layout import Layout
from tests.client import Answer, Connection
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service, wait_for
from tests.mounts import Mount
from tests.service.conftest import Settings, StartService, on_etcd
from tests.service.test_disk_full import fill
from tests.source import Resource, Source

MIB = 1 << 20
PATIENCE = 1.0
_NONE = Resource(status=500)
CLUSTER: Settings = {"cluster_peer_timeout": PATIENCE, "cluster_secret": "known to members"}


@pytest.fixture(scope="module")
def _three_hosts(etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Service]]:
    with ExitStack() as running:
        hosts = [Service(tmp_path_factory.mktemp("host"), **on_etcd(etcd, "/test-three"), **CLUSTER) for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(running.enter_context, hosts))
        yield hosts


@pytest.fixture
def hosts(_three_hosts: list[Service]) -> Iterator[list[Service]]:
    """Three members that other tests of this module use too; their logs must stay clean."""
    yield _three_hosts
    for host in _three_hosts:
        host.check_log()


def pulls(host: Service, image: dict[str, Any]) -> list[dict[str, Any]]:
    return host.events("pull", image=image["id"])


def path(image: dict[str, Any]) -> str:
    return f"/images/{image['id']}/download"


def wait_held(host: Service, image: dict[str, Any], count: int) -> None:
    """Until so many are on record as holding it."""
    wait_for(lambda: len(host.image(image["id"])["replicas"]) == count, 5, f"{count} hold it")


class Pretender:
    """A member that etcd knows of, and that answers as a test likes; it holds what it is told to."""

    def __init__(self, etcd: EtcdCluster, prefix: str, source: Source) -> None:
        self._etcd, self._layout, self._source = etcd, Layout(prefix), source
        self._put(self._layout.member("pretender"), {"url": source.url})

    def hold(self, image: dict[str, Any], resource: Resource, *, again: bool = True) -> Resource:
        """It alone; unless it does so `again`, it gives bytes once."""
        resource.etag = f'"{image["sha256"]}"'
        self._source.serve(path(image), lambda asked: resource.answer_to(asked) if again or not asked.number else _NONE)
        for member in image["replicas"]:
            self._etcd.call("/v3/kv/deleterange", {"key": _base64(self._layout.replica(image["id"], member))})
        self._put(self._layout.replica(image["id"], "pretender"), {"url": self._source.url})
        return resource

    def leave(self) -> None:
        self._etcd.call("/v3/kv/deleterange", {"key": _base64(self._layout.member("pretender"))})

    def _put(self, key: str, value: object) -> None:
        self._etcd.call("/v3/kv/put", {"key": _base64(key), "value": _base64(json.dumps(value))})


@pytest.fixture
def pretender(hosts: list[Service], etcd: EtcdCluster, source: Source) -> Iterator[Pretender]:
    """Known to `hosts`."""
    pretender = Pretender(etcd, "/test-three", source)
    yield pretender
    pretender.leave()


def held_by_pretender(hosts: list[Service], pretender: Pretender, resource: Resource) -> dict[str, Any]:
    """An image that none of the hosts has, and that it gives once."""
    image = hosts[0].upload(resource.body)
    pretender.hold(image, resource, again=False)
    for host in hosts:
        wait_for(lambda host=host: host.image(image["id"])["replicas"] == ["pretender"], 5, "it is known")  # type: ignore[misc]
    (hosts[0].images_dir / image["id"]).unlink()
    return image


def test_fan_out(hosts: list[Service]) -> None:
    """Many downloads at all members at once: each member takes the bytes once, and then has them."""
    body = os.urandom(24 * MIB + 11)
    image = hosts[0].upload(body)
    with ThreadPoolExecutor(24) as pool:
        answers: list[Answer] = list(pool.map(lambda n: hosts[n % 3].download(image["id"]), range(24)))
    digests = {hashlib.sha256(answer.body).hexdigest() for answer in answers}
    assert digests == {image["sha256"]}
    wait_held(hosts[0], image, 3)
    assert [len(pulls(host, image)) for host in hosts] == [0, 1, 1]
    assert all(image["id"] in host.stored() for host in hosts)
    assert all(host.incoming() == set() for host in hosts)


def test_the_first_byte(hosts: list[Service]) -> None:
    """It comes hardly later than from the member that has it."""
    images = [hosts[0].upload(os.urandom(16 * MIB)) for _ in range(3)]

    def first_byte(host: Service, image: dict[str, Any]) -> float:
        began = time.monotonic()
        with Connection(host.port) as connection:
            connection.send(f"GET {path(image)} HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.head()[0] == 200
            assert connection.recv(1)
            return time.monotonic() - began

    theirs, ours = (min(first_byte(host, image) for image in images) for host in hosts[:2])
    assert ours - theirs < 0.1
    for image in images:
        wait_held(hosts[0], image, 2)


def test_the_last_byte_is_not_waited_for(hosts: list[Service], pretender: Pretender) -> None:
    """The first one comes long before the member has them all, which take four seconds; and then it keeps them."""
    image = held_by_pretender(hosts, pretender, Resource(os.urandom(8 * MIB), rate=2 * MIB))
    began = time.monotonic()
    with Connection(hosts[1].port) as connection:
        connection.send(f"GET {path(image)} HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.head()[0] == 200
        assert connection.recv(1)
        assert time.monotonic() - began < 2
    wait_for(lambda: image["id"] in hosts[1].stored(), 20, "it is kept")


def test_a_frozen_holder(hosts: list[Service]) -> None:
    """It takes connections and says nothing: another one is asked, and who is asked next time knows."""
    images = [hosts[0].upload(os.urandom(3 * MIB)) for _ in range(3)]
    for image in images:
        hosts[1].download(image["id"])
        wait_held(hosts[2], image, 2)
    hosts[0].freeze()
    began = time.monotonic()
    for image in images:
        body = hosts[2].download(image["id"]).body
        assert hashlib.sha256(body).hexdigest() == image["sha256"]
    hosts[0].cont()
    assert time.monotonic() - began < 2 * PATIENCE + 1


def test_a_holder_that_dies_in_the_middle(hosts: list[Service], pretender: Pretender) -> None:
    """With no other, the client is cut; and then nobody says that there is no such image."""
    image = held_by_pretender(hosts, pretender, Resource(os.urandom(8 * MIB), stall_after=3 * MIB))
    with Connection(hosts[1].port) as connection:
        connection.send(f"GET {path(image)} HTTP/1.1\r\nHost: x\r\n\r\n")
        status, headers = connection.head()
        assert (status, headers["Content-Length"]) == (200, str(8 * MIB))
        began = time.monotonic()
        assert len(connection.read_to_the_end()) == 3 * MIB
        assert PATIENCE <= time.monotonic() - began < 3 * PATIENCE + 1
    assert image["id"] not in hosts[1].stored()
    pretender.leave()
    wait_for(lambda: hosts[1].get("/members").json()[-1]["id"] != "pretender", 5, "it is known as dead")
    answer = hosts[1].download(image["id"])
    assert (answer.status, "pretender" in answer.message) == (503, True)


def test_deleted_elsewhere_in_the_middle(hosts: list[Service], pretender: Pretender) -> None:
    """Whoever was getting it is cut within two seconds, and nothing of it stays."""
    image = held_by_pretender(hosts, pretender, Resource(os.urandom(8 * MIB), rate=2 * MIB))
    with Connection(hosts[1].port) as connection:
        connection.send(f"GET {path(image)} HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.head()
        assert connection.recv(1)
        assert hosts[2].delete(image["id"]).status == 200
        began = time.monotonic()
        assert len(connection.read_to_the_end()) < 8 * MIB
        assert time.monotonic() - began < 2.0
    wait_for(lambda: hosts[1].incoming() == set(), 2, "nothing is left")
    assert image["id"] not in hosts[1].stored()
    assert hosts[1].get(f"/images/{image['id']}").status == 404


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.release)])
def test_killed_in_the_middle(new_host: StartService, seed: int, times: int) -> None:
    """At any moment of a pull: the next start has all of it, or nothing, and then serves it whole."""
    moments = random.Random(seed)
    one, other = new_host(**CLUSTER), new_host(**CLUSTER)
    body = os.urandom(40 * MIB)
    for _ in range(times):
        image = one.upload(body)
        wait_for(lambda image=image: other.image(image["id"])["replicas"], 5, "it is known")  # type: ignore[misc]
        with Connection(other.port) as connection:
            connection.send(f"GET {path(image)} HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(moments.uniform(0, 0.4))
            other.kill()
        other.start()
        assert other.incoming() == set()
        assert other.download(image["id"]).body == body
        wait_held(one, image, 2)
        assert one.delete(image["id"]).status == 200


def test_rot(hosts: list[Service]) -> None:
    """A client never has a whole body of wrong bytes; who sent them sets them aside, and takes a good copy."""
    good, puller, rotten = hosts
    rotten.expect_errors("image damaged")
    puller.expect_errors("wrong bytes from a member")
    body = os.urandom(2 * MIB)
    # They take turns, so one of two times it is asked.
    for image in (rotten.upload(body), rotten.upload(body)):
        good.download(image["id"])
        wait_held(puller, image, 2)
        with (rotten.images_dir / image["id"]).open("r+b") as file:
            file.seek(MIB)
            file.write(bytes([body[MIB] ^ 1]))
        with Connection(puller.port) as connection:
            connection.send(f"GET {path(image)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            connection.head()
            came = connection.read_to_the_end()
        assert came == body or len(came) < len(body)
        assert puller.download(image["id"]).body == body
        if puller.events("wrong bytes from a member", image=image["id"]):
            break
    assert puller.events("wrong bytes from a member", peer=rotten.events("listening")[-1]["member"])
    wait_for(lambda: rotten.events("image mended", image=image["id"]), 5, "it is mended")
    wait_held(puller, image, 3)
    assert (rotten.images_dir / image["id"]).read_bytes() == body


@pytest.fixture
def small_disk(mount: Mount, tmp_path: Path) -> Path:
    """A file system of its own with 16 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount("-t", "tmpfs", "-o", f"size={16 * MIB}", "imgsvc-test", directory)
    return directory


def test_no_room(new_host: StartService, small_disk: Path) -> None:
    """The bytes go through, and none of them stays."""
    one, full = new_host(**CLUSTER), new_host(small_disk / "data", **CLUSTER)
    body = os.urandom(24 * MIB)
    image = one.upload(body)
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(lambda _: full.download(image["id"]), range(4)):
            assert answer.body == body
    assert full.request("GET", path(image), headers={"Range": f"bytes={MIB}-{2 * MIB}"}).body == body[MIB : 2 * MIB + 1]
    assert (full.stored(), full.incoming()) == (set(), set())
    assert full.image_files() == []
    assert full.image(image["id"])["replicas"] == image["replicas"]


def test_a_disk_that_fills_in_the_middle(
    new_host: StartService, etcd: EtcdCluster, etcd_prefix: str, small_disk: Path, source: Source
) -> None:
    """Who was following goes on without a gap."""
    full = new_host(small_disk / "data", **CLUSTER | {"cluster_peer_timeout": 10})
    body = os.urandom(8 * MIB)
    image = full.upload(body)
    pretender = Pretender(etcd, etcd_prefix, source)
    resource = pretender.hold(image, Resource(body, stall_after=3 * MIB))
    wait_for(lambda: full.image(image["id"])["replicas"] == ["pretender"], 5, "it is known")
    (full.images_dir / image["id"]).unlink()
    with Connection(full.port) as connection:
        connection.send(f"GET {path(image)} HTTP/1.1\r\nHost: x\r\n\r\n")
        _, headers = connection.head()
        first = connection.recv(MIB)
        fill(small_disk / "filler")
        resource.resume()
        assert first + connection.read_exactly(int(headers["Content-Length"]) - len(first)) == body
    wait_for(lambda: full.incoming() == set(), 5, "nothing is left")
    assert full.stored() == set()
    pretender.leave()


def test_without_etcd(own_etcd: EtcdCluster, start_service: StartService) -> None:
    """What all know is still served by all; that there is a copy more is on record once etcd is back."""
    one, other = (start_service(**on_etcd(own_etcd, "/test"), **CLUSTER) for _ in range(2))
    body = os.urandom(2 * MIB)
    image = one.upload(body)
    wait_for(other.images, 5, "it is known")
    own_etcd.kill(0)
    assert other.download(image["id"]).body == body
    wait_for(lambda: image["id"] in other.stored(), 5, "it is kept")
    own_etcd.start(0)
    own_etcd.wait_healthy()
    wait_held(one, image, 2)


def test_a_stranger(hosts: list[Service]) -> None:
    """Who says that it is a member, and does not show it, gets nothing."""
    image = hosts[0].upload(b"content")
    assert hosts[0].request("GET", path(image), headers={"X-Imgsvc-Peer": "stranger"}).status == 403


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
