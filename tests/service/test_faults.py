"""Faults of the Go program, each seen live, none of which may come back: 1, 3, 5 and 8 of eight.

2: test_delete_stops.py. 4: test_nothing_left.py. 6, disk full: test_disk_full.py. 7: test_large_lists.py.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.client import Connection
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service
from tests.service.conftest import Settings, StartService
from tests.service.helpers import begin_upload, post_at_once
from tests.source import Resource, Source

MIB = 1 << 20


# 1. A PUT answered 200 `complete` while the stored record stayed `downloading`.


def test_a_finished_upload_is_complete_for_everybody(service: Service) -> None:
    """Of 300 small uploads, 16 at a time, each that was answered reads as complete at once, and stays so."""

    def upload(n: int) -> dict[str, Any]:
        image = service.upload(b"small\n" * (n + 1))
        assert service.image(image["id"]) == image
        return image

    with ThreadPoolExecutor(16) as pool:
        images = list(pool.map(upload, range(300)))
    time.sleep(1.2)  # one interval of progress reports
    stored = {image["id"]: image for image in service.images()}
    for image in images:
        assert image["status"] == "complete"
        assert stored[image["id"]] == image


# 3. Killed or restarted in mid-transfer: `downloading` for ever, and a new POST returned the stuck image.


def test_a_kill_in_mid_transfer(start_service: StartService, records: Settings, source: Source) -> None:
    """After SIGKILL and a new start an interrupted upload is in `error` with the reason, interrupted and waiting
    fetches are begun again and end, and what was complete still is."""
    service = start_service(**records, fetch_concurrency=1)
    content = os.urandom(3 * MIB)
    complete = service.upload(content)
    resource = Resource(content, stall_after=2 * MIB)
    running = service.fetch(source.serve("/running", resource))
    waiting = service.fetch(source.serve("/waiting", content))
    service.wait_status(running["id"], "downloading")
    with Connection(service.port) as connection:
        uploading = begin_upload(service, connection, 3 * MIB, content[: 2 * MIB])
        service.kill()
    source.serve("/running", content)
    service.start()

    failed = service.wait_status(uploading, "error", "complete")
    assert (failed["status"], failed["size"], failed["sha256"]) == ("error", 0, "")
    assert failed["error"]
    assert service.download(uploading).message == "incomplete image"
    for image in (running, waiting):
        service.wait_status(image["id"], "complete")
        assert service.download(image["id"]).body == content
        assert service.fetch(image["source"])["id"] == image["id"]
    assert len(source.asked("/waiting")) == 1
    assert service.image(complete["id"]) == complete
    assert service.stored() == {complete["id"], running["id"], waiting["id"]}
    assert service.incoming() == set()


# 5. Parallel POSTs of one source made two images.


def test_parallel_posts_of_one_source_make_one_image(service: Service, source: Source) -> None:
    """Of 32 POSTs at once all get the same image, and the source is asked once."""
    resource = Resource(b"content", hold=True)
    images = post_at_once([service], source.serve("/guest", resource))
    resource.begin()
    assert len({image["id"] for image in images}) == 1
    service.wait_status(images[0]["id"], "complete")
    assert len(source.asked("/guest")) == 1
    assert service.incoming() == set()


def test_parallel_posts_at_two_services_make_one_image(
    start_service: StartService, etcd: EtcdCluster, etcd_prefix: str, source: Source
) -> None:
    """The same when the POSTs go to two hosts that share their records."""
    settings = {
        "metadata_store_type": "etcd",
        "metadata_store_config_machines": etcd.endpoints,
        "metadata_store_config_prefix": etcd_prefix,
    }
    services = [start_service(**settings), start_service(**settings)]
    resource = Resource(b"content", hold=True)
    images = post_at_once(services, source.serve("/guest", resource))
    resource.begin()
    assert len({image["id"] for image in images}) == 1
    for service in services:
        assert service.wait_status(images[0]["id"], "complete")["size"] == 7
    assert len(source.asked("/guest")) == 1
    assert sorted(len(service.stored()) for service in services) == [0, 1]


# 8. `size` jumped only every 5 s, and the first value was often 0.


class Progress:
    """Looks at an image's size again and again, from when its transfer begins."""

    def __init__(self, service: Service, image_id: str) -> None:
        self.changes: list[tuple[float, int]] = []
        self._service = service
        self._image_id = image_id
        self._began = time.monotonic()

    def look(self) -> None:
        image = self._service.image(self._image_id)
        if image["status"] == "downloading" and (not self.changes or image["size"] != self.changes[-1][1]):
            self.changes.append((time.monotonic() - self._began, image["size"]))

    def check(self, seconds: float) -> None:
        """The first value above zero came within a second, the others at most a second apart (and what a busy
        machine adds), and not many more than that."""
        times = [moment for moment, size in self.changes if size > 0]
        assert times[0] < 1.3, self.changes
        gaps = [later - earlier for earlier, later in zip(times, [*times[1:], seconds], strict=True)]
        assert max(gaps) < 1.5, self.changes
        assert len(times) <= seconds + 2, self.changes
        sizes = [size for _, size in self.changes]
        assert sizes == sorted(sizes)


def test_size_grows_steadily(service: Service, source: Source) -> None:
    """During a slow upload and a slow fetch `size` is above zero within a second, and then moves every second."""
    image = service.fetch(source.serve("/guest", Resource(bytes(700_000), rate=100_000)))
    source.wait_asked("/guest")
    fetch = Progress(service, image["id"])
    with Connection(service.port) as connection:
        upload = Progress(service, begin_upload(service, connection, 700_000, b"x"))
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < 4.5:
            connection.send(bytes(5_000))
            fetch.look()
            upload.look()
            time.sleep(0.05)
        fetch.check(elapsed)
        upload.check(elapsed)
