"""Clusters to which tests may do what they like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.cluster_of_three import ClusterOfThree
from tests.mounts import mounting
from tests.namespaces import Network, why_no_namespaces

_DISK_BYTES = 64 << 20


@contextmanager
def cluster_with_everything(parent: Path, **settings: object) -> Iterator[ClusterOfThree]:
    """Each member has a small disk of its own, and is in a network that can be cut; where that cannot be had, not."""
    directories = [parent / name for name in "abc"]
    with ExitStack() as opened:
        network = None
        if not why_no_namespaces():
            network = opened.enter_context(Network())
            mount = opened.enter_context(mounting())
            for directory in directories:
                directory.mkdir()
                mount("-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "imgsvc-test", directory)
        yield opened.enter_context(ClusterOfThree(directories, network, **settings))


@pytest.fixture(scope="module")
def _cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOfThree]:
    settings: dict[str, object] = request.module.SETTINGS
    with cluster_with_everything(tmp_path_factory.mktemp("cluster"), **settings) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: ClusterOfThree) -> Iterator[ClusterOfThree]:
    """One for all tests of a module, with the `SETTINGS` that it names; whole and without images at the beginning of
    each. What members log must be clean, but for what the test expects."""
    yield _cluster
    _cluster.heal()
    _cluster.etcd.restore()
    _cluster.start()
    for image in _cluster.members[0].images():
        assert _cluster.members[0].delete(image["id"]).status in (200, 404)
    for member in _cluster.members:
        member.check_log()


@pytest.fixture
def partitions(_cluster: ClusterOfThree) -> None:
    """Skips where there can be none."""
    if _cluster.network is None:
        pytest.skip(why_no_namespaces())
