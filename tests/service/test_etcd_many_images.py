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
    """A start with them and a list of them, by type as well, cost seconds of CPU and little memory, and other requests
    are answered while they are listed."""
    service = new_host()
    # Bounds that hold on a busy machine: seconds of CPU, of which the start took 3.5 and the lists 4.5, and a part of the
    # whole; an idle one took 0.1 s for the slowest other request, and 20 MiB.
    started = service.cpu_seconds()
    assert started < 10
    idle = service.memory()
    took, slowest_other = list_twice_at_once(service)
    assert service.cpu_seconds() - started < 10
    assert slowest_other < max(took / 4, 1)
    assert service.memory("VmHWM") < idle + 64 * MIB
    assert len(service.images("?type=kvm")) == IMAGES / 2
