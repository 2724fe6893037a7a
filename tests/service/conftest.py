"""Running services for tests: one to share per module and metadata store, and as many of one's own as needed."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness import Service
from tests.source import Source

Settings = dict[str, object]
StartService = Callable[..., Service]


def _records(request: pytest.FixtureRequest) -> Settings:
    if request.param == "sqlite":
        return {}
    etcd = request.getfixturevalue("etcd")
    return {
        "metadata_store_type": "etcd",
        "metadata_store_config_machines": etcd.endpoints,
        "metadata_store_config_prefix": f"/test-{uuid.uuid4()}",
    }


@pytest.fixture(scope="module", params=["sqlite", "etcd"])
def shared_service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("shared"), **_records(request)) as service:
        yield service


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
def source() -> Iterator[Source]:
    with Source() as source:
        yield source
