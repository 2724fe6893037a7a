"""Two stores that share their records in a real etcd, and these records as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from imgsvc.metadata.store import Member
from tests.etcd_cluster import EtcdCluster
from tests.metadata.etcd.helpers import Raw
from tests.metadata.etcd_store import OwnedEtcdStore, new_member, open_store


@pytest.fixture
def member() -> Member:
    return new_member("one")


@pytest.fixture
def cluster(etcd: EtcdCluster) -> EtcdCluster:
    """Where the stores are."""
    return etcd


@pytest.fixture
def store(cluster: EtcdCluster, etcd_prefix: str, member: Member) -> Iterator[OwnedEtcdStore]:
    with closing(open_store(cluster.endpoints, etcd_prefix, member)) as store:
        yield store


@pytest.fixture
def other(cluster: EtcdCluster, etcd_prefix: str) -> Iterator[OwnedEtcdStore]:
    """The store as another member has it."""
    with closing(open_store(cluster.endpoints, etcd_prefix, new_member("other"))) as store:
        yield store


@pytest.fixture
def raw(etcd: EtcdCluster, etcd_prefix: str) -> Iterator[Raw]:
    with closing(Raw(etcd.endpoints[0], etcd_prefix)) as raw:
        yield raw


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes in the end what is entered."""
    with ExitStack() as opened:
        yield opened
