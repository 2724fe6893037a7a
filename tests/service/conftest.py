"""Running services for tests: one to share per module and metadata store, and as many of one's own as needed."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.client import Connection
from tests.etcd_cluster import EtcdCluster
from tests.harness import Census, Service, wait_for
from tests.source import Source

MIB = 1 << 20
IDLE = 1.0
LIMIT = 24 * MIB
# Threads of the pools of imgsvc/context.py; each is started when there is work for it, and then stays.
_POOLS = {"hash": 2, "records": 16, "looks": 8, "ends": 16, "reads": 8, "bytes": 8, "health": 2, "members": 1}

Settings = dict[str, object]
StartService = Callable[..., Service]


def _records(request: pytest.FixtureRequest) -> Settings:
    if request.param == "sqlite":
        return {}
    return on_etcd(request.getfixturevalue("etcd"), f"/test-{uuid.uuid4()}")


def on_etcd(cluster: EtcdCluster, prefix: str) -> Settings:
    """Settings of a host that shares its records with all others of the same prefix."""
    return {
        "metadata_store_type": "etcd",
        "metadata_store_config_machines": cluster.endpoints,
        "metadata_store_config_prefix": prefix,
    }


@pytest.fixture(scope="module", params=["sqlite", "etcd"])
def shared_service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("shared"), **_records(request)) as service:
        yield service


@pytest.fixture
def connection(service: Service) -> Iterator[Connection]:
    with Connection(service.port) as connection:
        yield connection


@pytest.fixture
def service(shared_service: Service) -> Iterator[Service]:
    """One that other tests of the module use too, once with each metadata store; its log must stay clean."""
    yield shared_service
    shared_service.check_log()


@pytest.fixture(params=["sqlite", "etcd"])
def records(request: pytest.FixtureRequest) -> Settings:
    """Settings for an empty set of records, once in each metadata store."""
    return _records(request)


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[StartService]:
    """Starts a service of the test's own, with these settings, on a directory of its own unless told."""
    with ExitStack() as running:

        def start(data_dir: Path | None = None, **settings: object) -> Service:
            return running.enter_context(Service(data_dir or tmp_path / str(uuid.uuid4()), **settings))

        yield start


@pytest.fixture
def new_host(start_service: StartService, etcd: EtcdCluster, etcd_prefix: str) -> StartService:
    """Starts a host that shares its records with the others of the test, with these further settings."""
    return partial(start_service, **on_etcd(etcd, etcd_prefix))


@pytest.fixture
def seed() -> int:
    """Of the moments of the kills; a test that fails shows it."""
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201 - pytest keeps it for when the test fails
    return seed


@contextmanager
def two_hosts(
    cluster: EtcdCluster, prefix: str, directories: pytest.TempPathFactory, **settings: object
) -> Iterator[tuple[Service, Service]]:
    """Two hosts that share their records, with these further settings, for more than one test."""
    one, other = (
        Service(directories.mktemp(name), **on_etcd(cluster, prefix), **settings) for name in ("one", "other")
    )
    with one, other:
        yield one, other


@pytest.fixture
def own_etcd() -> Iterator[EtcdCluster]:
    """One member, to which the test may do what it likes."""
    with closing(EtcdCluster()) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def _impatient_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Census, int, int]]:
    """The service, what it holds once it has opened all that it keeps open, its memory then, and its most threads."""
    with Service(tmp_path_factory.mktemp("raw"), idle_timeout=IDLE, max_image_size=LIMIT) as service:
        threads = service.census().threads + sum(_POOLS.values())
        with ThreadPoolExecutor(24) as pool:
            for image in pool.map(lambda _: service.upload(bytes(MIB)), range(48)):
                service.download(image["id"])
                service.delete(image["id"])
        wait_for(lambda: service.census().sockets <= 8, 5, "connections are closed")
        yield service, service.census(), service.memory(), threads


@pytest.fixture
def guarded_service(_impatient_service: tuple[Service, Census, int, int]) -> Iterator[Service]:
    """One with an idleTimeout of IDLE seconds and a maxImageSize of LIMIT. It must serve on after each test, with no
    file, descriptor, socket or thread left, and little more memory."""
    service, before, memory, threads = _impatient_service
    yield service
    wait_for(lambda: service.image_files() == [], 6, "no image is open")
    wait_for(lambda: service.census().sockets <= before.sockets, 6, "no socket is left")
    wait_for(lambda: service.incoming() == set(), 6, ".incoming is empty")
    after = service.census()
    assert len(after.files) <= len(before.files)
    assert after.threads <= threads
    assert service.memory() < memory + 64 * MIB
    wait_for(
        lambda: {image["status"] for image in service.images()} <= {"complete", "error"}, 6, "no image is in transfer"
    )
    assert service.upload(b"still here")["status"] == "complete"
    service.check_log()


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as source:
        yield source
