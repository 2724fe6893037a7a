"""Images in memory: for tests, and to keep the protocol honest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence

from imgsvc.errors import Conflict, NoSpace, NotFound, Unavailable
from imgsvc.images.store import ImageReader, ImageWriter, Space, Topic, require_id
from imgsvc.metadata.image import new_id


class MemoryImageStore:
    """An ImageStore whose images end with it. `capacity` is in bytes, of all images together."""

    def __init__(self, capacity: int = 64 * 1024 * 1024) -> None:
        self._capacity = capacity
        self._lock = threading.RLock()
        self._images: dict[str, bytearray] = {}
        self._incoming: dict[str, bytearray] = {}
        self._notes: dict[str, list[str]] = {}
        self._writing: set[str] = set()
        self._quarantined: list[tuple[str, bytearray]] = []
        self._noted: dict[str, str] = {}
        self._records: str | None = None
        self._member = self._home = new_id()
        self._closed = False

    @property
    def member(self) -> str:
        return self._member

    @property
    def home(self) -> str:
        return self._home

    @property
    def place(self) -> str:
        return "memory"

    @property
    def fresh(self) -> bool:
        return self._records is None

    @property
    def marked_for(self) -> str:
        return self._records or ""

    def mark(self, identity: str) -> None:
        self._records = identity

    def rename(self, member: str) -> None:
        self._member = member

    def claim(self, image_id: str) -> None:
        require_id(image_id)
        with self._lock:
            self._require_writable()
            self._incoming.setdefault(image_id, bytearray())

    def unclaim(self, image_id: str) -> None:
        require_id(image_id)
        with self._lock:
            self._require_writable()
            self._refuse_second_writer(image_id)
            self._incoming.pop(image_id, None)
            self._notes.pop(image_id, None)

    def unfinished(self) -> Iterator[str]:
        with self._lock:
            self._require_open()
            return iter(list(self._incoming))

    def writer(self, image_id: str, *, keep: bool = False, followed: bool = False) -> ImageWriter:  # noqa: ARG002 - all can be
        require_id(image_id)
        with self._lock:
            self._require_writable()
            self._refuse_second_writer(image_id)
            if image_id in self._images:
                raise Conflict(f"image {image_id} is stored already")
            if not (keep and image_id in self._incoming):
                self._incoming[image_id] = bytearray()
                self._notes.pop(image_id, None)
            self._writing.add(image_id)
            return _MemoryWriter(self, image_id)

    def size(self, image_id: str) -> int:
        return self.open(image_id).size

    def open(self, image_id: str) -> ImageReader:
        require_id(image_id)
        with self._lock:
            self._require_open()
            if image_id not in self._images:
                raise NotFound(f"image {image_id} is not stored here")
            return _MemoryReader(image_id, self._images[image_id])

    def delete(self, image_id: str) -> None:
        require_id(image_id)
        with self._lock:
            self._require_writable()
            self._images.pop(image_id, None)

    def ids(self) -> Iterator[str]:
        with self._lock:
            self._require_open()
            return iter(list(self._images))

    def count(self) -> int:
        return sum(1 for _ in self.ids())

    def quarantine(self, image_id: str, read: ImageReader | None = None) -> None:
        require_id(image_id)
        with self._lock:
            self._require_writable()
            if image_id not in self._images:
                raise NotFound(f"image {image_id} is not stored here")
            if isinstance(read, _MemoryReader) and not read.reads(self._images[image_id]):
                raise Conflict(f"image {image_id} has other bytes by now")
            self._quarantined.append((image_id, self._images.pop(image_id)))

    def quarantined(self) -> Iterator[str]:
        with self._lock:
            self._require_open()
            return iter([image_id for image_id, _ in self._quarantined])

    def remember(self, topic: Topic, line: str) -> None:
        with self._lock:
            self._require_writable()
            self._noted[topic] = line

    def remembered(self, topic: Topic) -> str:
        with self._lock:
            self._require_open()
            return self._noted.get(topic, "")

    def space(self) -> Space:
        with self._lock:
            self._require_open()
            kept = (*self._images.values(), *self._incoming.values(), *(image for _, image in self._quarantined))
            used = sum(map(len, kept))
            return Space(free=self._capacity - used, total=self._capacity)

    def ping(self) -> None:
        with self._lock:
            self._require_writable()

    def close(self) -> None:
        self._closed = True

    # What its writers ask of it.

    def append(self, image_id: str, block: bytes) -> None:
        with self._lock:
            self._require_writable()
            if len(block) > self.space().free:
                raise NoSpace(f"cannot write image {image_id}: no space left in memory")
            self._incoming[image_id] += block

    def incoming(self, image_id: str) -> bytearray:
        with self._lock:
            return self._incoming[image_id]

    def noted(self, image_id: str) -> list[str]:
        with self._lock:
            return self._notes.setdefault(image_id, [])

    def publish(self, image_id: str) -> None:
        with self._lock:
            self._require_writable()
            self._images[image_id] = self._incoming.pop(image_id)
            self._notes.pop(image_id, None)
            self._writing.discard(image_id)

    def drop(self, image_id: str, *, empty: bool) -> None:
        with self._lock:
            self._writing.discard(image_id)
            if empty:
                self._incoming[image_id] = bytearray()
                self._notes.pop(image_id, None)

    def _refuse_second_writer(self, image_id: str) -> None:
        if image_id in self._writing:
            raise Conflict(f"image {image_id} is being written")

    def _require_open(self) -> None:
        if self._closed:
            raise Unavailable("the image store is closed")

    def _require_writable(self) -> None:
        self._require_open()
        if self._records is None:
            raise Unavailable("the image store has not been marked as this service's yet")


class _MemoryWriter:
    def __init__(self, store: MemoryImageStore, image_id: str) -> None:
        self._store = store
        self._id = image_id
        self._image = store.incoming(image_id)
        self._open = True
        self._sound = True
        self._committed = False

    @property
    def size(self) -> int:
        return len(self._store.incoming(self._id))

    def write(self, block: bytes | bytearray | memoryview) -> None:
        self._begin()
        self._store.append(self._id, bytes(block))
        self._sound = True

    def read(self, offset: int, length: int) -> bytes:
        self._require_sound()
        return bytes(memoryview(self._store.incoming(self._id))[offset : offset + length])

    def truncate(self, size: int) -> None:
        self._require_sound()
        del self._store.incoming(self._id)[size:]

    def note(self, line: str) -> None:
        self._require_sound()
        self._store.noted(self._id).append(line)

    def notes(self) -> Sequence[str]:
        self._require_sound()
        return tuple(self._store.noted(self._id))

    def follow(self, size: int) -> ImageReader:
        return _MemoryReader(self._id, self._image, size)

    def commit(self) -> None:
        if self._committed:
            return
        self._begin()
        self._store.publish(self._id)
        self._open = False
        self._committed = True

    def abort(self) -> None:
        self._drop(empty=True)

    def close(self) -> None:
        self._drop(empty=False)

    def _begin(self) -> None:
        self._require_sound()
        self._sound = False

    def _require_sound(self) -> None:
        if not self._open or not self._sound:
            raise Unavailable(f"image {self._id} is no longer being written")

    def _drop(self, *, empty: bool) -> None:
        if self._open:
            self._open = False
            self._store.drop(self._id, empty=empty)


class _MemoryReader:
    def __init__(self, image_id: str, image: bytearray, size: int | None = None) -> None:
        self.size = len(image) if size is None else size
        self._id = image_id
        self._image: bytearray | None = image

    def reads(self, image: bytearray) -> bool:
        return self._image is image

    def arrived(self, offset: int) -> int:
        return self.size - offset

    def wait(self, offset: int, length: int, wake: Callable[[], None]) -> None:  # noqa: ARG002 - all of it is here
        wake()

    def read(self, offset: int, length: int) -> bytes:
        if self._image is None:
            raise Unavailable(f"image {self._id} is no longer being read")
        # No memoryview: who still writes could not make it longer then.
        block = self._image[offset : offset + length]
        if len(block) < min(length, self.size - offset):
            raise Unavailable(f"image {self._id} is shorter than it was")
        return bytes(block)

    def send(self, descriptor: int, offset: int, length: int) -> int:
        try:
            return os.write(descriptor, self.read(offset, length))
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self._image = None
