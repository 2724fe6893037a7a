"""20,000 images in etcd: listed without the others noticing, and no obstacle to a start."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import Layout
from imgsvc.etcd_messages import put
from imgsvc.metadata.image import Image, ImageType, new_id
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service
from tests.service.conftest import StartService

MIB = 1 << 20
IMAGES = 20_000
# Of 128 operations that etcd takes in a transaction.
BATCH = 60


@pytest.fixture
def many_images(etcd: EtcdCluster, etcd_prefix: str) -> None:
    """Complete images of every kind, which a host holds that is not there."""
    layout = Layout(etcd_prefix)
    note = json.dumps({"verified": "2026-11-23T07:04:36.5Z", "site": "elsewhere:/images", "url": "http://elsewhere"})
    kinds = list(ImageType)
    with closing(Etcd(etcd.endpoints)) as connection:
        for start in range(0, IMAGES, BATCH):
            operations = []
            for n in range(start, min(start + BATCH, IMAGES)):
                image = Image(id=new_id(), type=kinds[n % 2], comment=f"{n} " + "x" * 200).started(n)
                document = image.completed(n, "ab" * 32).to_json()
                operations += [put(layout.record(image.id), document), put(layout.replica(image.id, "elsewhere"), note)]
            assert connection.transact([], operations).succeeded


def list_twice_at_once(service: Service) -> tuple[float, float]:
    """Seconds until both are there, and seconds of the slowest /healthz meanwhile."""
    began = time.monotonic()
    slowest = 0.0
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(service.get, "/images") for _ in range(2)]
        while not all(answer.done() for answer in answers):
            asked = time.monotonic()
            assert service.get("/healthz").status == 200
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.01)
    for answer in answers:
        assert len(answer.result().json()) == IMAGES
    return time.monotonic() - began, slowest


def test_many_images(new_host: StartService, many_images: None) -> None:
    """A start with them is ready within seconds; they are listed, by type as well, within seconds and little memory,
    while other requests are answered at once."""
    began = time.monotonic()
    service = new_host()
    # The bounds leave room for a busy machine; an idle one took 5 s, 5 s, 0.1 s and 20 MiB.
    assert time.monotonic() - began < 20
    idle = service.memory()
    took, slowest_other = list_twice_at_once(service)
    assert took < 20
    assert slowest_other < 1
    assert service.memory("VmHWM") < idle + 64 * MIB
    assert len(service.images("?type=kvm")) == IMAGES / 2
