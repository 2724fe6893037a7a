"""All of etcd is away: what was known is still told and served, with its age; what would change anything is refused."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tests.etcd_cluster import EtcdCluster
from tests.harness import Service, wait_for
from tests.service.conftest import StartService, on_etcd
from tests.source import Resource, Source

LEASE = 2


def ages(service: Service, *paths: str) -> list[int]:
    """What the answers say of their age, in seconds, 0 for none; each comes within two."""
    found = []
    for path in paths:
        began = time.monotonic()
        answer = service.get(path)
        assert time.monotonic() - began < 2.0, path
        assert answer.status == 200, answer
        found.append(int(answer.headers.get("X-Imgsvc-Stale", "0")))
    return found


@pytest.mark.parametrize("harm", [pytest.param(EtcdCluster.kill, marks=pytest.mark.release), EtcdCluster.stop])
def test_reading_goes_on(
    own_etcd: EtcdCluster, start_service: StartService, source: Source, harm: Callable[[EtcdCluster, int], None]
) -> None:
    """For longer than the lease, and what this member has written last is there; every answer says how old it is."""
    service = start_service(**on_etcd(own_etcd, "/test"), cluster_lease_ttl=LEASE)
    content = os.urandom(1000)
    resource = Resource(b"fetched", hold=True)
    pending = service.fetch(source.serve("/pending", resource))["id"]
    image = service.upload(content)
    harm(own_etcd, 0)
    paths = [f"/images/{image['id']}", "/images", f"/images/{image['id']}/download", "/members"]
    wait_for(lambda: ages(service, "/images") != [0], 3, "it is noticed")
    time.sleep(LEASE)
    assert min(ages(service, *paths)) > LEASE
    assert max(ages(service, *paths)) < 20
    assert service.image(image["id"]) == image
    assert {each["id"] for each in service.images()} == {image["id"], pending}
    assert service.download(image["id"]).body == content
    assert service.request("HEAD", f"/images/{image['id']}").headers["X-Imgsvc-Stale"]
    assert service.get(f"/images/{pending}/download").message == "incomplete image"
    answer = service.put(b"new")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    own_etcd.restore()
    wait_for(lambda: ages(service, *paths) == [0] * len(paths), 15, "it is followed again")
    resource.begin()
    service.wait_status(pending, "complete")
