"""Members of a cluster in one process: each with a mirror and a real directory of its own, and no etcd. What one writes
to its record, all have in their mirrors."""

from __future__ import annotations

import dataclasses
import functools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from imgsvc.cluster.presence import has_room
from imgsvc.cluster.replicator import Replicator
from imgsvc.errors import NotFound, Unavailable
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.memory import MemoryImageStore
from imgsvc.images.store import ImageStore
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from imgsvc.metadata.mirror import Known, LiveMember, Mirror
from imgsvc.metadata.store import require_same
from imgsvc.settings import ClusterSettings
from imgsvc.throttle import Throttle
from tests.images.helpers import content, put


class Host:
    """`copied` are the ids of the images that it took a copy of, `failure` makes it fail, `pause` delays it, and it waits for the
    `gate`."""

    def __init__(self, hosts: Hosts, member: str, images: ImageStore) -> None:
        self.id = member
        self.mirror = Mirror()
        self.copied: list[str] = []
        self.failure: Exception | None = None
        self.pause = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.trusted = True
        self.busiest = 0
        self.tried: Counter[str] = Counter()
        self.images = images
        self.images.mark("these")
        self._busy = 0
        self._hosts = hosts
        self._lock = threading.Lock()

    def start(self, settings: ClusterSettings, turn: float) -> Replicator:
        replicator = Replicator(
            self.mirror,
            self,
            settings,
            me=self.id,
            fits=functools.partial(has_room, lambda _total: 0),
            may_work=lambda: self.trusted,
            turn=turn,
        )
        replicator.start()
        return replicator

    def drop_copy(self, image_id: str, keep: Collection[str]) -> bool:
        return self._hosts.drop(image_id, self.id, keep)

    def hold(self, image: Image) -> None:
        require_same(self._hosts.known(image.id).image, image)
        self._hosts.hold(image.id, self.id)

    def release(self, image_id: str) -> None:
        self._hosts.drop(image_id, self.id, ())

    def copy(self, image: Image, throttle: Throttle | None = None) -> None:
        """From any live holder, byte by byte, as a pull does."""
        with self._lock:
            self.tried[image.id] += 1
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            time.sleep(self.pause + (throttle.take(image.size) if throttle else 0.0))
            self.gate.wait()
            if self.failure is not None:
                raise self.failure
            known = self.mirror.get(image.id)
            source = next((member for member in known.replicas if member in self.mirror.members()), None)
            if source is None:
                raise Unavailable("no member that holds it is live")
            put(self.images, image.id, content(self._hosts[source].images, image.id))
            self._hosts.hold(image.id, self.id)
        finally:
            with self._lock:
                self._busy -= 1
        self.copied.append(image.id)


class Hosts:
    """A context manager: stops those that run. With a `capacity`, that is all the space that host-0 has."""

    def __init__(self, directory: Path, count: int, capacity: int | None = None) -> None:
        self._lock = threading.Lock()
        self._stores = ExitStack()
        self._replicators: list[Replicator] = []
        self._hosts = {
            name: Host(self, name, FilesystemImageStore(directory / name))
            for name in (f"host-{n}" for n in range(count))
        }
        if capacity is not None:
            self._stores.callback(self._hosts["host-0"].images.close)
            self._hosts["host-0"] = Host(self, "host-0", MemoryImageStore(capacity))
        for host in self._hosts.values():
            self._stores.callback(host.images.close)
            host.mirror.replace([], [LiveMember(name, f"http://{name}.example") for name in self._hosts])
            host.mirror.heard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._stores.close()

    def __getitem__(self, member: str) -> Host:
        return self._hosts[member]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def start(self, *, wanted: int = 2, delay: float = 0.0, rate: int = 0, turn: float = 30.0) -> None:
        settings = ClusterSettings(replicas=wanted, rebalance_delay=delay, copy_bytes_per_second=rate)
        for host in self:
            self._replicators.append(host.start(settings, turn))

    def stop(self) -> None:
        """Ends all at once, and the copies that are held up."""
        for replicator in self._replicators:
            replicator.stop()
        for host in self:
            host.gate.set()
        for replicator in self._replicators:
            replicator.close()

    def upload(self, member: str, size: int = 1000, image_id: str = "") -> str:
        """An image that the member alone holds; returns its id."""
        image = Image(image_id or new_id(), ImageType.KVM).started(size).completed(size, "00" * 32)
        put(self[member].images, image.id, random.Random(image.id).randbytes(size))
        known = Known(image.id, image.to_json(), 1, Status.COMPLETE, ImageType.KVM, size, replicas=(member,))
        self.everywhere(lambda mirror: mirror.put(known))
        return image.id

    def hold(self, image_id: str, member: str) -> None:
        with self._lock:
            known = self.known(image_id)
            known = dataclasses.replace(known, replicas=tuple(sorted({*known.replicas, member})))
            self.everywhere(lambda mirror: mirror.put(known))

    def drop(self, image_id: str, member: str, keep: Collection[str]) -> bool:
        """As the transaction does it: only if those are still on record."""
        with self._lock:
            known = self.known(image_id)
            if not {member, *keep} <= set(known.replicas):
                return False
            known = dataclasses.replace(known, replicas=tuple(other for other in known.replicas if other != member))
            self.everywhere(lambda mirror: mirror.put(known))
            return True

    def delete(self, image_id: str) -> None:
        self.everywhere(lambda mirror: mirror.remove(image_id))

    def leave(self, member: str) -> None:
        self.everywhere(lambda mirror: mirror.leave(member))

    def join(self, member: str, free: int | None = None) -> None:
        self.everywhere(lambda mirror: mirror.join(LiveMember(member, "", free=free, total=1 << 30)))

    def everywhere(self, change: Callable[[Mirror], None]) -> None:
        for host in self:
            change(host.mirror)

    def known(self, image_id: str) -> Known:
        return self["host-0"].mirror.get(image_id)

    def holders(self, image_id: str) -> set[str]:
        """On record, and with the very bytes."""
        try:
            replicas = set(self.known(image_id).replicas)
        except NotFound:
            return set()
        for member in replicas:
            size = self.known(image_id).size
            assert content(self[member].images, image_id) == random.Random(image_id).randbytes(size)
        return replicas
