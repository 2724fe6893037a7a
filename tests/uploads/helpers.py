"""A client that uploads in parts, and goes on where it was; and uploads that were interrupted."""

from __future__ import annotations

import hashlib

import pytest

from imgsvc.errors import Gone, ImgsvcError, Incomplete
from imgsvc.metadata.image import UNKNOWN_SIZE, ImageType, Status
from imgsvc.resumable import Checksum
from imgsvc.uploads import Incoming
from tests.flaky import Fault, Killed
from tests.images.helpers import content
from tests.rooms import Place, Rooms

BODY = bytes(range(100)) * 9
PART = 300
LEFT = Incomplete("the sender went away")


class Client:
    """Uploads BODY in three requests, and asks how far it is whenever anything went wrong; when that is all, it takes
    that for success and never comes again, as real clients do. `told` is what it was told last. One that `breaks`
    leaves the last request right behind its last byte."""

    def __init__(self, rooms: Rooms, *, checked: bool = False, breaks: bool = False) -> None:
        self.rooms = rooms
        self.id = ""
        self.told = 0
        self._checked = checked
        self._breaks = breaks

    def run(self, tries: int = 6) -> None:
        """To the end; raises Gone when there is no way to it."""
        for _ in range(tries):
            try:
                self._go_on()
            except Gone:
                raise
            except ImgsvcError:
                self.rooms.settlements.retry()
            else:
                return
        raise AssertionError(f"not whole after {tries} tries")

    def _go_on(self) -> None:
        uploads = self.rooms.uploads
        if not self.id:
            self.id = uploads.create(ImageType.KVM, "of a test", len(BODY), "", "given").image.id
        while self.told < len(BODY):
            progress = uploads.look(self.id)
            assert progress.offset >= self.told, "bytes that were acknowledged are gone"
            self.told = progress.offset
            if self.told == len(BODY):
                return
            part = BODY[self.told : self.told + PART]
            checksum = Checksum("sha256", hashlib.sha256(part).digest()) if self._checked else None
            self._bring(uploads.go_on(self.id, self.told, len(part), checksum), part)

    def _bring(self, request: Incoming, part: bytes) -> None:
        try:
            for piece in (part[:100], part[100:]):
                if piece:
                    request.feed(piece)
            if self._breaks and self.told + len(part) == len(BODY):
                raise LEFT
            request.commit()
            self.told = request.complete().offset
        except ImgsvcError as error:
            request.abort(error)
            raise


def opened(place: Place) -> Rooms:
    rooms = place.open()
    if rooms.disk.fresh:
        rooms.disk.mark(rooms.base.identity)
    return rooms


def check(rooms: Rooms, client: Client) -> None:
    rooms.check_settled()
    assert rooms.base.get(client.id).status is Status.COMPLETE
    assert content(rooms.disk, client.id) == BODY
    progress = rooms.uploads.look(client.id)
    assert (progress.offset, progress.length, progress.expires) == (len(BODY), len(BODY), None)
    assert not rooms.transfers.is_known(client.id)


def begun(place: Place) -> Client:
    """One that was interrupted in its third request, by a kill."""
    rooms = opened(place)
    client = Client(rooms)
    rooms.faults.plan = lambda _number, _call: Fault(Killed()) if client.told > PART else None
    with pytest.raises(Killed):
        client.run()
    rooms.let_go()
    return client


def paused(rooms: Rooms, sha256: str = "") -> Client:
    """After its first request; it has announced the digest."""
    client = Client(rooms)
    client.id = rooms.uploads.create(ImageType.KVM, "", len(BODY), sha256, "").image.id
    request = rooms.uploads.go_on(client.id, 0, PART)
    request.feed(BODY[:PART])
    request.commit()
    client.told = request.complete().offset
    assert client.told == PART
    return client


def broken_off(rooms: Rooms, sha256: str = "") -> Client:
    """One that has sent all its bytes, and left before it was told so."""
    client = paused(rooms, sha256)
    request = rooms.uploads.go_on(client.id, PART, UNKNOWN_SIZE)
    request.feed(BODY[PART:])
    request.abort(LEFT)
    assert rooms.base.get(client.id).status is Status.DOWNLOADING
    return client
