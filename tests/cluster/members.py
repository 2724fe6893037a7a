"""One member, and others that serve images as a test likes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Self

from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.store import ImageReader
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from imgsvc.metadata.mirror import Known, LiveMember
from imgsvc.metadata.store import Member
from tests.images.helpers import content
from tests.rooms import SITE, Rooms, wait_until
from tests.shared_records import SharedRecords
from tests.source import Exchange, Resource, Source

MIB = 1 << 20


class Reading(threading.Thread):
    """A client that reads a range, or all, as soon as it comes: `body` so far, and the `error` that ended it."""

    def __init__(self, reader: ImageReader, first: int = 0, end: int | None = None, *, close: bool = True) -> None:
        super().__init__(daemon=True)
        self.reader = reader
        self.body = b""
        self.error: Exception | None = None
        self._offset = first
        self._close = close
        self._end = reader.size if end is None else end
        self.start()

    def run(self) -> None:
        try:
            while self._offset < self._end:
                self._wait()
                block = self.reader.read(self._offset, min(MIB, self._end - self._offset))
                self.body += block
                self._offset += len(block)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        finally:
            if self._close:
                self.reader.close()

    def whole(self) -> bytes:
        """All that it wanted."""
        self.join(20.0)
        assert not self.is_alive(), f"only {len(self.body)} bytes came"
        if self.error is not None:
            raise self.error
        return self.body

    def _wait(self) -> None:
        while not self.reader.arrived(self._offset):
            there = threading.Event()
            self.reader.wait(self._offset, self._end - self._offset, there.set)
            assert there.wait(20.0), "it was forgotten"


class Members:
    """`one` is the member, with real files and records that it shares; the others are known to it by its mirror. A
    context manager."""

    def __init__(self, directory: Path) -> None:
        self._opened = ExitStack()
        images = self._opened.enter_context(closing(FilesystemImageStore(directory)))
        self.records = SharedRecords(Member(images.member, SITE, "http://one.example"))
        images.mark(self.records.identity)
        self.one = Rooms(images, self.records)
        self.be_patient(10.0)  # for a member that stalls goes on when the test has looked
        self._opened.callback(self.one.close)
        self.source = self._opened.enter_context(Source())
        self.others: dict[str, Source] = {}
        self.resources: dict[str, Resource] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def be_patient(self, seconds: float) -> None:
        """With the others, when they are silent."""
        self.one.supply._patience = seconds

    def image(self, body: bytes, sha256: str | None = None, source: str = "") -> Image:
        """Complete, and held by nobody yet."""
        image = self.records.create(Image(new_id(), ImageType.KVM, source).started(len(body)))
        digest = hashlib.sha256(body).hexdigest() if sha256 is None else sha256
        image = self.records.update(image.completed(len(body), digest))
        self.records.holding.clear()
        return image

    def serve(self, image: Image, answer: Resource | bytes, member: str = "a") -> str:
        """By another, new member, of which the first in order is asked first; returns its id."""
        source = self._opened.enter_context(Source())
        self.others[member] = source
        resource = dataclasses.replace(Resource(answer) if isinstance(answer, bytes) else answer)
        resource.etag = f'"{image.sha256}"'
        source.serve(self.path(image), resource)
        self.resources[member] = resource
        self.one.mirror.join(LiveMember(member, source.url))
        self.hold(image, member)
        return member

    def hold(self, image: Image, member: str) -> None:
        self.records.holding.setdefault(image.id, set()).add(member)
        holders = tuple(sorted(self.records.holding[image.id]))
        self.one.mirror.put(
            Known(image.id, image.to_json(), 1, Status.COMPLETE, ImageType.KVM, image.size, replicas=holders)
        )

    def asked(self, image: Image, member: str) -> list[Exchange]:
        return self.others[member].asked(self.path(image))

    def read(self, image: Image, first: int = 0, end: int | None = None) -> Reading:
        return Reading(self.one.pulls.open(image), first, end)

    @staticmethod
    def path(image: Image) -> str:
        return f"/images/{image.id}/download"


def some(size: int) -> bytes:
    return os.urandom(size)


def check_kept(members: Members, image_id: str, body: bytes) -> None:
    """Here, on record, and with nothing half beside it."""
    wait_until(lambda: not members.one.pulls.running)
    assert content(members.one.disk, image_id) == body
    assert members.one.disk.member in members.records.holding[image_id]
    assert members.one.claims() == set()


def check_not_kept(members: Members, image_id: str) -> None:
    wait_until(lambda: not members.one.pulls.running)
    assert image_id not in set(members.one.disk.ids())
    assert members.one.disk.member not in members.records.holding.get(image_id, set())
    assert members.one.claims() == set()
