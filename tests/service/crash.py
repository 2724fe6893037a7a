"""What a service that is killed again and again goes through, and what must hold after each start."""

from __future__ import annotations

import hashlib
import http.client
import random
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any

from tests.client import Answer
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service, wait_for
from tests.source import Resource, Source
from tests.tus import Tus, id_of, path_of

_CLIENTS = 6
_LARGEST = 4 << 20
_PIECE = 100_000
# More are deleted again, so that all of them can be downloaded after every kill.
_MOST_KEPT = 40


class Clients:
    """Threads that upload, fetch and delete until the service is gone, and remember what it acknowledged."""

    def __init__(self, service: Service, source: Source, chance: random.Random) -> None:
        self.service = service
        # By id, what was acknowledged; by URL, what sources have.
        self.digests: dict[str, str] = {}
        self.fetched: dict[str, str] = {}
        self.offered: dict[str, str] = {}
        self.deleted: set[str] = set()
        # Seconds that an answer took.
        self.slowest = 0.0
        self._unsure: set[str] = set()
        # By path: what it is to have, and how far it was when it was last said.
        self._unfinished: dict[str, tuple[bytes, int]] = {}
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
        return set(self.digests) - self.deleted - self._unsure

    def finish_uploads(self, others: AbstractSet[str] = frozenset()) -> None:
        """Those that were begun and not finished; what nobody was told of is given up. Only when nothing else is under
        way, but for `others`."""
        tus = Tus(self.service)
        for path, (content, told) in self._unfinished.items():
            at = tus.offset(path)
            assert at >= told, f"{path} is at {at}, and was at {told}"
            assert tus.patch(path, at, content[at:]).status == 204
            self.digests[id_of(path)] = _digest(content)
        self._unfinished.clear()
        for image in self.service.images():
            plain = image["status"] == "downloading" and not image["source"]
            if (
                plain
                and image["id"] not in others
                and (self.service.incoming() | self.service.stored()) & {image["id"]}
            ):
                tus.offset(f"/uploads/{image['id']}")
                assert tus.terminate(f"/uploads/{image['id']}").status == 204
                self.deleted.add(image["id"])

    def change_sources(self) -> None:
        """What was offered so far is replaced, so that a fetch which is made again without need shows."""
        for url in self.offered:
            self._source.serve(url.removeprefix(self._source.url), b"changed")

    def _work(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                self._step()()
                self.slowest = max(self.slowest, time.monotonic() - began)
            except (ConnectionError, http.client.HTTPException):
                time.sleep(0.01)  # the service was killed
            except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
                self._unexpected.append(error)
                return

    def _step(self) -> Callable[[], None]:
        if len(self.kept()) > _MOST_KEPT:
            return self._delete
        return self._chance.choice([self._upload, self._upload, self._upload_in_pieces, self._fetch, self._delete])

    def _content(self) -> bytes:
        """From one byte to _LARGEST, and no size class more often than another."""
        return self._chance.randbytes(round(_LARGEST ** self._chance.random()))

    def _upload(self) -> None:
        content = self._content()
        headers = {"X-Image-Type": "kvm"}
        if self._chance.random() < 0.5:
            headers["Content-Length"] = str(len(content))
        body = _pieces(content, pause=self._chance.choice([0, 0, 0.02]))
        answer = self.service.request("PUT", "/images", body, headers)
        if _was_done(answer, 200):
            with self._lock:
                self.digests[answer.json()["id"]] = _digest(content)

    def _upload_in_pieces(self) -> None:
        """One piece of an upload that was begun before, maybe long before, or of a new one."""
        with self._lock:
            path, (content, told) = self._unfinished.popitem() if self._unfinished else ("", (self._content(), 0))
        tus = Tus(self.service)
        if not path:
            created = tus.post(len(content))
            if not _was_done(created, 201):
                return
            path = path_of(created)
        try:
            head = tus.head(path)
            if _was_done(head, 200):
                at = int(head.headers["Upload-Offset"])
                assert at >= told, f"{path} is at {at}, and was at {told}"
                told = at
                piece = content[at : at + self._chance.choice([1000, _LARGEST // 4, _LARGEST])]
                if _was_done(tus.patch(path, at, iter(_pieces(piece, pause=self._chance.choice([0, 0.02])))), 204):
                    told += len(piece)
        finally:
            with self._lock:
                if told < len(content):
                    self._unfinished[path] = content, told
                else:
                    self.digests[id_of(path)] = _digest(content)

    def _fetch(self) -> None:
        content = self._content()
        rate = self._chance.choice([None, None, 2_000_000])
        resource = Resource(content, chunked=self._chance.random() < 0.5, rate=rate)
        url = self._source.serve(f"/{self._chance.getrandbits(64):x}", resource)
        with self._lock:
            self.offered[url] = _digest(content)
        answer = self.service.post({"source": url, "type": "kvm"})
        if _was_done(answer, 202):
            with self._lock:
                self.digests[answer.json()["id"]] = self.offered[url]
                self.fetched[answer.json()["id"]] = url

    def _delete(self) -> None:
        with self._lock:
            kept = sorted(self.kept())
            if len(kept) < 5:
                return
            image_id = self._chance.choice(kept)
            self._unsure.add(image_id)
        if _was_done(self.service.delete(image_id), 200):
            with self._lock:
                self.deleted.add(image_id)


def kill_repeatedly(
    clients: Clients, chance: random.Random, kills: int, killed: Callable[[], None], settled: Callable[[], None]
) -> None:
    """Kills the service so many times, while clients are busy and while it starts. Calls `killed` after each kill,
    and `settled` once it is ready again."""
    service = clients.service
    while kills > 0:
        clients.start()
        time.sleep(chance.uniform(0.02, 0.8))
        service.kill()
        clients.stop()
        killed()
        service.start(wait=False)
        kills -= 1
        while kills > 0 and chance.random() < 0.4:
            if chance.random() < 0.5:
                time.sleep(chance.uniform(0, 1))
            else:
                service.wait_listening()  # the sweep is next
                time.sleep(chance.uniform(0, 0.1))
            service.kill()
            killed()
            service.start(wait=False)
            kills -= 1
        service.wait_ready()
        settled()


def end_lease(etcd: EtcdCluster, service: Service) -> None:
    """What time does to a host that is gone for longer than its lease: it owns nothing any more."""
    lease = int(service.events("lease granted")[-1]["lease"], 16)
    etcd.call("/v3/lease/revoke", {"ID": str(lease)})


def assert_no_lie(clients: Clients, others: AbstractSet[str] = frozenset()) -> int:
    """Every transfer has come to an end; acknowledged images are whole, deleted ones gone; there is no file without a
    record, and no record without its file. What nobody asked to keep is deleted; returns how many uploads had been
    interrupted. `others` are the images of other hosts."""
    service = clients.service
    clients.finish_uploads(others)

    def images() -> dict[str, dict[str, Any]]:
        return {image["id"]: image for image in service.images() if image["id"] not in others}

    def settled() -> bool:
        return all(image["status"] in ("complete", "error") for image in images().values())

    # In this order: a claim may be of a record that is still to come, and a record outlasts its claim by a moment.
    wait_for(lambda: service.incoming() == set(), 30, ".incoming is empty")
    wait_for(settled, 5, "every transfer has ended")
    found = images()
    complete = {image_id for image_id, image in found.items() if image["status"] == "complete"}
    assert clients.kept() <= complete, [found.get(image_id) for image_id in clients.kept() - complete]
    for image_id in complete:
        assert_whole(clients, found[image_id])
    for image_id in found.keys() - complete:
        assert_interrupted(service, found[image_id])
    assert not clients.deleted & found.keys()
    assert service.stored() == complete

    for image_id in clients.fetched.keys() & clients.kept():
        assert service.fetch(clients.fetched[image_id])["id"] == image_id
    for image_id in found.keys() - clients.kept():
        assert service.delete(image_id).status == 200
        clients.deleted.add(image_id)
    clients.change_sources()
    return len(found) - len(complete)


def assert_whole(clients: Clients, image: dict[str, Any]) -> None:
    """It has the bytes that were sent, whether that was acknowledged or not."""
    answer = clients.service.download(image["id"])
    assert (answer.status, len(answer.body), _digest(answer.body)) == (200, image["size"], image["sha256"]), image
    for digests, key in ((clients.digests, image["id"]), (clients.offered, image["source"])):
        assert digests.get(key, image["sha256"]) == image["sha256"], image


def assert_interrupted(service: Service, image: dict[str, Any]) -> None:
    assert image["source"] == "", f"a fetch was not begun again: {image}"
    assert image["error"]
    assert (image["size"], image["sha256"]) == (0, "")
    assert service.download(image["id"]).message == "incomplete image"


def _pieces(content: bytes, pause: float) -> Iterator[bytes]:
    for start in range(0, len(content), _PIECE):
        yield content[start : start + _PIECE]
        time.sleep(pause)


def _was_done(answer: Answer, status: int) -> bool:
    """Whether it was; a service that is starting may say that it cannot yet."""
    assert answer.status in (status, 503), answer
    return answer.status == status


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
