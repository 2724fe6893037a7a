"""kill -9 at random moments, with uploads, fetches and deletions in flight: what was acknowledged holds, and nothing
is left that tells a lie."""

from __future__ import annotations

import hashlib
import http.client
import random
import threading
import time
from collections.abc import Callable

import pytest

from tests.client import Answer
from tests.harness import Service, wait_for
from tests.service.conftest import Settings, StartService
from tests.source import Resource, Source

_CLIENTS = 6
_LARGEST = 700_000


class Clients:
    """Threads that upload, fetch and delete until the service is gone, and remember what it acknowledged."""

    def __init__(self, service: Service, source: Source, chance: random.Random) -> None:
        self.digests: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self.deleted: set[str] = set()
        self._unsure: set[str] = set()
        self._service = service
        self._source = source
        self._chance = chance
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()
        self._unexpected: list[BaseException] = []

    def start(self) -> None:
        """Begins a round, on the service as it runs now."""
        self._over.clear()
        self._threads = [threading.Thread(target=self._work) for _ in range(_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends a round; raises what no client may see."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self._unexpected:
            raise self._unexpected[0]

    def kept(self) -> set[str]:
        """The acknowledged images which nobody has tried to delete."""
        return (set(self.digests) | set(self.sources)) - self.deleted - self._unsure

    def _work(self) -> None:
        while not self._over.is_set():
            step: Callable[[], None] = self._chance.choice([self._upload, self._upload, self._fetch, self._delete])
            try:
                step()
            except (OSError, http.client.HTTPException):
                pass  # the service was killed
            except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
                self._unexpected.append(error)
                return

    def _content(self) -> bytes:
        return self._chance.randbytes(self._chance.randrange(_LARGEST))

    def _upload(self) -> None:
        content = self._content()
        pieces = (content[n : n + 50_000] for n in range(0, len(content), 50_000))
        answer = self._service.put(content if self._chance.random() < 0.5 else pieces)
        if _was_done(answer, 200):
            with self._lock:
                self.digests[answer.json()["id"]] = hashlib.sha256(content).hexdigest()

    def _fetch(self) -> None:
        content = self._content()
        resource = Resource(content, chunked=self._chance.random() < 0.5, rate=self._chance.choice([None, 2_000_000]))
        url = self._source.serve(f"/{self._chance.getrandbits(64):x}", resource)
        answer = self._service.post({"source": url, "type": "kvm"})
        if _was_done(answer, 202):
            with self._lock:
                self.sources[answer.json()["id"]] = hashlib.sha256(content).hexdigest()

    def _delete(self) -> None:
        with self._lock:
            kept = sorted(self.kept())
            if len(kept) < 5:
                return
            image_id = self._chance.choice(kept)
            self._unsure.add(image_id)
        if _was_done(self._service.delete(image_id), 200):
            with self._lock:
                self.deleted.add(image_id)


def _was_done(answer: Answer, status: int) -> bool:
    """Whether it was; a service that is starting may say that it cannot yet."""
    assert answer.status in (status, 503), answer
    return answer.status == status


def assert_no_lie(service: Service, clients: Clients) -> None:
    """Nothing is in transfer for ever, acknowledged images are whole, deleted ones gone, and every file has its
    record."""

    def settled() -> bool:
        return all(image["status"] in ("complete", "error") for image in service.images())

    wait_for(settled, 30, "every transfer has ended")
    images = {image["id"]: image for image in service.images()}
    assert not clients.deleted & set(images)
    for image_id in clients.kept():
        digest = clients.digests.get(image_id) or clients.sources[image_id]
        assert (images[image_id]["status"], images[image_id]["sha256"]) == ("complete", digest), images[image_id]
        assert hashlib.sha256((service.images_dir / image_id).read_bytes()).hexdigest() == digest
    complete = {image_id for image_id, image in images.items() if image["status"] == "complete"}
    for image_id in images.keys() - complete:
        assert images[image_id]["source"] == "", f"a fetch was not begun again: {images[image_id]}"
        assert images[image_id]["error"]
    wait_for(lambda: service.incoming() == set(), 5, ".incoming is empty")
    assert service.stored() == complete


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=[pytest.mark.release, pytest.mark.timeout(1200)])])
def test_kill_9_at_random_moments(start_service: StartService, records: Settings, source: Source, kills: int) -> None:
    """Killed again and again, while starting and while busy, the service loses nothing that it acknowledged."""
    chance = random.Random()
    service = start_service(**records, fetch_concurrency=8)
    clients = Clients(service, source, chance)
    for _ in range(kills):
        clients.start()
        time.sleep(chance.uniform(0.05, 0.8))
        service.kill()
        clients.stop()
        service.start(wait=False)
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0.2, 1.2))
            service.kill()
            service.start(wait=False)
        service.wait_ready()
    assert_no_lie(service, clients)
    assert clients.digests
    assert clients.sources
