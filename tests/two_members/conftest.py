"""Two hosts that share their records in a real etcd, each with its own images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing

import pytest

from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.store import Member
from tests.etcd_cluster import EtcdCluster
from tests.lossy_proxy import LossyProxy
from tests.metadata.etcd_store import new_member, open_store
from tests.rooms import Rooms


@pytest.fixture
def hosts(etcd: EtcdCluster, etcd_prefix: str) -> Iterator[list[Rooms]]:
    with ExitStack() as opened:
        yield [opened_host(opened, etcd.endpoints, etcd_prefix, new_member(name)) for name in ("one", "two")]


@pytest.fixture
def proxy(etcd: EtcdCluster) -> Iterator[LossyProxy]:
    with closing(LossyProxy(etcd.endpoints[0])) as proxy:
        yield proxy


@pytest.fixture
def unlucky(etcd: EtcdCluster, etcd_prefix: str, proxy: LossyProxy) -> Iterator[Rooms]:
    """One more host, whose first way to etcd will lose answers, and whose second does not."""
    with ExitStack() as opened:
        host = opened_host(opened, [proxy.url, *etcd.endpoints], etcd_prefix, new_member("three"))
        host.base.ping()
        yield host


@pytest.fixture
def namesakes(etcd: EtcdCluster, etcd_prefix: str) -> Iterator[list[Rooms]]:
    """Two hosts that are called the same, with their images at the same path."""
    with ExitStack() as opened:
        members = [dataclasses.replace(new_member(), site="localhost:/images") for _ in range(2)]
        yield [opened_host(opened, etcd.endpoints, etcd_prefix, member) for member in members]


def opened_host(opened: ExitStack, endpoints: Sequence[str], etcd_prefix: str, member: Member) -> Rooms:
    images = MemoryImageStore()
    member = dataclasses.replace(member, id=images.member)
    records = opened.enter_context(closing(open_store(endpoints, etcd_prefix, member)))
    images.mark(records.identity)
    return Rooms(images, records)
