"""The services of one process, over real stores whose calls can be made to fail."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest

from imgsvc.cluster.choice import Choice
from imgsvc.cluster.orders import Orders
from imgsvc.cluster.peers import Peers, Signatures
from imgsvc.cluster.presence import has_room
from imgsvc.cluster.pulls import Pulls
from imgsvc.cluster.supply import Supply
from imgsvc.digests import Digests
from imgsvc.fetcher import Fetcher
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.memory import MemoryImageStore
from imgsvc.images.store import ImageStore
from imgsvc.maintenance import Maintenance
from imgsvc.metadata.image import UNKNOWN_SIZE, Image, ImageType, Status, new_id
from imgsvc.metadata.memory import MemoryMetadataStore
from imgsvc.metadata.mirror import LiveMember, Mirror
from imgsvc.metadata.sqlite import SqliteMetadataStore
from imgsvc.metadata.store import Member, MetadataStore
from imgsvc.room import Room
from imgsvc.service import ImageService
from imgsvc.settings import FetchSettings
from imgsvc.settlements import Settlements
from imgsvc.transfer import REPORT_INTERVAL, Transfer
from imgsvc.transfers import Transfers
from imgsvc.uploads import Uploads
from tests.flaky import Faults, flaky_images, flaky_records
from tests.images.helpers import content

SITE = "one.example:/images"


class Rooms:
    """Wired as the context does it; nothing is started. `disk` and `base` are the stores themselves, for a look that
    no fault disturbs."""

    def __init__(
        self,
        disk: ImageStore,
        base: MetadataStore,
        *,
        concurrency: int = 1,
        stall_timeout: float = 1.0,
        retries: int = 0,
        max_image_size: int = 0,
        reserve: Callable[[int], int] = lambda _total: 0,
        expire: float = 60.0,
    ) -> None:
        self.disk, self.base = disk, base
        self.faults = Faults()
        self.images = flaky_images(disk, self.faults)
        self.records = flaky_records(base, self.faults)
        self.settlements = Settlements(self.images, self.records)
        self.room = Room(self.images, max_image_size, reserve)
        self.transfers = Transfers(
            self.images, self.records, self.room, self.settlements, hashers=ThreadPoolExecutor(1)
        )
        settings = FetchSettings(
            concurrency=concurrency,
            connect_timeout=1.0,
            stall_timeout=stall_timeout,
            deny_networks=(),
            retries=retries,
        )
        self.fetcher = Fetcher(settings, self.images, self.records, self.transfers, self.settlements)
        self.digests = Digests(self.images, self.records)
        self.mirror = Mirror()
        self.supply = Supply(Choice(self.mirror, disk.member), Signatures("", disk.member), 1.0, self._accuse)
        self.accused: list[tuple[str, str]] = []
        self.pulls = Pulls(
            self.images,
            self.records,
            self.transfers,
            self.room,
            self.settlements,
            supply=self.supply,
            hashers=ThreadPoolExecutor(1),
            doubt=partial(self.digests.submit, doubted=True),
        )
        self.served: list[str] = []
        self.damaged: list[str] = []
        self.service = ImageService(
            self.images,
            self.records,
            self.transfers,
            self.fetcher,
            settlements=self.settlements,
            digests=self.digests,
            pulls=self.pulls,
            orders=Orders(None, Peers(Signatures("", disk.member), 1.0), disk.member, partial(has_room, reserve)),
            served=self.served.append,
            damaged=self.damaged.append,
            me=base._member.id,  # type: ignore[attr-defined]  # every store has it
        )
        self.uploads = Uploads(self.images, self.records, self.transfers, self.settlements, expire=expire)
        self.maintenance = Maintenance(self.images, self.records, self.fetcher, self.uploads, self.digests)

    def start(self) -> None:
        self.transfers.start()
        self.fetcher.start()
        self.uploads.start()
        self.digests.start()

    def close(self) -> None:
        """Stops the threads; the stores stay open."""
        self.pulls.close()
        self.digests.close()
        self.fetcher.close()
        self.uploads.close()
        self.transfers.close()

    def let_go(self) -> None:
        """After a kill: the files that the process had open are closed, as the kernel would."""
        for writer in self.faults.writers:
            writer.close()

    def upload(self, expected_size: int = UNKNOWN_SIZE) -> Transfer:
        return self.transfers.upload(ImageType.KVM, "of a test", expected_size)

    def fetch(self) -> Transfer:
        return self.transfers.fetch(self.queued())

    def queued(self, source: str = "http://source.example/image") -> Image:
        """A claimed, pending image that nobody fetches yet."""
        image = Image(id=new_id(), type=ImageType.KVM, source=source)
        self.disk.claim(image.id)
        return self.base.create(image)

    def verify_uploads(self) -> None:
        """What the thread of the uploads does after a start, until a store fails or nothing is left."""
        while self.uploads._to_verify:
            self.uploads._to_verify.popleft()()

    def take_turns(self) -> list[str]:
        """The ids of the images that wait to be fetched, which then wait no more."""
        turns = self.fetcher._turns._waiting
        waiting = [turn.image_id for *_, turn in sorted(turns)]
        turns.clear()
        return waiting

    def _accuse(self, member: LiveMember, image_id: str) -> None:
        self.accused.append((member.id, image_id))

    def listed(self) -> dict[str, Image]:
        return {entry.image.id: entry.image for page in self.base.survey() for entry in page}

    def claims(self) -> set[str]:
        return set(self.disk.unfinished())

    def check_settled(self) -> None:
        """Nothing is half: each record is final, a complete one has its very bytes, and there are no others."""
        images = self.listed()
        assert {image.status for image in images.values()} <= {Status.COMPLETE, Status.ERROR}
        complete = {image for image in images.values() if image.status is Status.COMPLETE}
        assert set(self.disk.ids()) == {image.id for image in complete}
        for image in complete:
            stored = content(self.disk, image.id)
            assert (image.size, image.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())
        for image in images.values():
            assert bool(image.error) == (image.status is Status.ERROR)
        assert self.claims() == set()


def feed_and_finish(transfer: Transfer) -> Image:
    transfer.feed(b"bytes")
    return transfer.finish()


def report_now(transfer: Transfer) -> None:
    """As if enough time had passed since the last report."""
    transfer._reported -= REPORT_INTERVAL
    transfer.report()


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """For what happens in another thread."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Place(Protocol):
    """Where a service runs: what it stored is there when it is opened again."""

    def open(self) -> Rooms: ...

    def close(self) -> None: ...


class MemoryPlace:
    def __init__(self) -> None:
        self._images = MemoryImageStore()
        self._records = MemoryMetadataStore(Member(self._images.member, SITE, "http://one.example:20000"))

    def open(self) -> Rooms:
        return Rooms(self._images, self._records)

    def close(self) -> None:
        self._images.close()


class DiskPlace:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._opened = ExitStack()

    def open(self) -> Rooms:
        self.close()
        images = self._opened.enter_context(closing(FilesystemImageStore(self._directory / "images")))
        member = Member(images.member, SITE, "http://one.example:20000")
        records = self._opened.enter_context(closing(SqliteMetadataStore(self._directory / "imgsvc.db", member)))
        return Rooms(images, records)

    def close(self) -> None:
        self._opened.close()


PLACES: dict[str, Callable[[Path], Place]] = {"memory": lambda _directory: MemoryPlace(), "disk": DiskPlace}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """One with each kind of stores."""
    with closing(PLACES[request.param](tmp_path)) as place:
        yield place


@pytest.fixture
def rooms(place: Place) -> Rooms:
    """A service at a place that is marked for its records."""
    rooms = place.open()
    rooms.disk.mark(rooms.base.identity)
    return rooms
