"""Clients of services: one that all tests of a file share, one with each metadata store, one with limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import Service
from tests.tus import Tus


@pytest.fixture(scope="module")
def _own_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("tus")) as service:
        yield service


@pytest.fixture
def tus(_own_service: Service) -> Iterator[Tus]:
    """With a service that all tests here share."""
    yield Tus(_own_service)
    _own_service.check_log()


@pytest.fixture
def anywhere(service: Service) -> Tus:
    """The same, once with each metadata store."""
    return Tus(service)


@pytest.fixture
def guarded(guarded_service: Service) -> Tus:
    """With a service that drops who is silent, has a limit, and must have nothing left at the end."""
    return Tus(guarded_service)
