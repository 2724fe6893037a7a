"""One pass over the images: what it finds, what becomes of it, and what holds when it is cut short."""

from __future__ import annotations

import hashlib
import threading
from contextlib import closing
from typing import cast

import pytest

from imgsvc.errors import NotComplete, Stopping
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import Image, Status
from imgsvc.metadata.store import Member
from imgsvc.scrub import Finding, Outcome, Scrub
from imgsvc.whole import Pace
from tests.flaky import DAMAGED, FULL, LOST, UNKNOWN, Fault, Killed
from tests.images.helpers import content, put
from tests.left_behind import BODY, complete, interrupted
from tests.rooms import SITE, Place, Rooms, wait_until
from tests.shared_records import OTHER, SharedRecords
from tests.source import Source

ROTTEN = b"the bytes of an inage"
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_RETRY_INTERVAL", "_READ_AGAIN"):
        monkeypatch.setattr(f"imgsvc.scrub.{name}", 0.01)


def scrub(rooms: Rooms, after: str = "") -> dict[str, Finding]:
    """One pass, in order."""
    run = Scrub(rooms.images, rooms.records, Pace(0), threading.Event()).run(after)
    found = {finding.image_id: finding for finding in run}
    assert list(found) == sorted(found)
    return found


def rot(rooms: Rooms, image: Image, body: bytes = ROTTEN) -> None:
    """As a disk does, under the store."""
    if isinstance(rooms.disk, MemoryImageStore):
        rooms.disk._images[image.id][:] = body
    else:
        path = cast("FilesystemImageStore", rooms.disk)._path / image.id
        path.write_bytes(body)


def check_aside(rooms: Rooms, image: Image) -> None:
    """Its record says so, and its bytes are kept."""
    record = rooms.base.get(image.id)
    assert (record.status, record.size, record.sha256) == (Status.ERROR, 0, "")
    assert record.error.startswith("the image is damaged: ")
    assert record.error.endswith("; its bytes are in quarantine")
    assert list(rooms.disk.quarantined()) == [image.id]
    assert image.id not in rooms.disk.ids()


def test_damaged_images(rooms: Rooms) -> None:
    """Those that differ are set aside, whatever the difference is, and the others are as they were."""
    whole, flipped, short, whole_too = (complete(rooms) for _ in range(4))
    rot(rooms, flipped)
    rot(rooms, short, BODY[:-1])
    found = scrub(rooms)
    assert found[whole.id] == Finding(whole.id, Outcome.MATCHES, len(BODY))
    assert found[whole_too.id].outcome is Outcome.MATCHES
    wrong = hashlib.sha256(ROTTEN).hexdigest()
    assert found[flipped.id].outcome is found[short.id].outcome is Outcome.DAMAGED
    assert rooms.base.get(flipped.id).error == (
        f"the image is damaged: its sha256 is {wrong}, and should be {DIGEST}; its bytes are in quarantine"
    )
    assert f"its file has {len(BODY) - 1} bytes, and the image {len(BODY)}" in rooms.base.get(short.id).error
    assert sorted(rooms.disk.quarantined()) == sorted([flipped.id, short.id])
    with pytest.raises(NotComplete):
        rooms.service.open(flipped.id)
    rooms.check_settled()
    assert set(scrub(rooms)) == {whole.id, whole_too.id}


def test_it_goes_on_after_an_image(rooms: Rooms) -> None:
    """With the one that follows, be the image itself there or not."""
    images = sorted(complete(rooms).id for _ in range(3))
    rooms.service.delete(images[1])
    assert list(scrub(rooms, after=images[0])) == list(scrub(rooms, after=images[1])) == [images[2]]


def test_what_is_left_to_others(rooms: Rooms) -> None:
    """An image without a digest, and one in transfer."""
    bare = complete(rooms, sha256="")
    interrupted(rooms, b"some")
    rot(rooms, bare)
    assert [(finding.outcome, finding.reason) for finding in scrub(rooms).values()] == [
        (Outcome.LEFT, "it has no digest yet")
    ]
    assert rooms.base.get(bare.id) == bare


def test_bytes_that_are_gone(rooms: Rooms) -> None:
    """A complete image must not stay one."""
    image = complete(rooms)
    rooms.disk.delete(image.id)
    assert scrub(rooms)[image.id].outcome is Outcome.DAMAGED
    assert "its file is missing; there are no bytes to keep" in rooms.base.get(image.id).error


def test_afterwards(rooms: Rooms) -> None:
    """The source can be fetched again, and what it brings is served; the image can be deleted; what was set aside
    stays until a person has looked at it."""
    with Source() as source, closing(rooms):
        rooms.start()
        image = rooms.service.fetch(source.serve("/image", BODY), complete(rooms).type, "")
        wait_until(lambda: rooms.base.get(image.id).status is Status.COMPLETE)
        rot(rooms, image)
        scrub(rooms)
        check_aside(rooms, image)
        again = rooms.service.fetch(image.source, image.type, "")
        wait_until(lambda: rooms.base.get(image.id).status is Status.COMPLETE)
        assert (again.id, content(rooms.disk, image.id)) == (image.id, BODY)
        assert scrub(rooms)[image.id].outcome is Outcome.MATCHES
        rot(rooms, image)
        scrub(rooms)
        assert rooms.service.delete(image.id).status is Status.ERROR
        assert list(rooms.disk.quarantined()) == [image.id] * 2


class TestMeanwhile:
    def test_deleted(self, rooms: Rooms) -> None:
        """Right after its bytes were found wrong: nothing is condemned, and nothing is kept."""
        image = complete(rooms)
        rot(rooms, image)
        self.when_read(rooms, lambda: rooms.service.delete(image.id))
        assert scrub(rooms)[image.id].outcome is Outcome.LEFT
        assert list(rooms.disk.quarantined()) == []

    def test_fetched_again(self, rooms: Rooms) -> None:
        """What has taken the place of the bytes that were read is not judged by them."""
        image = complete(rooms)
        rot(rooms, image)
        self.when_read(rooms, lambda: rooms.base.update(rooms.base.get(image.id).requeued()))
        assert scrub(rooms)[image.id].outcome is Outcome.LEFT
        assert list(rooms.disk.ids()) == [image.id]

    def test_deleted_in_the_middle(self, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is let go of, long before a slow reading is over, so that its space comes back."""
        monkeypatch.setattr("imgsvc.scrub._LOOK_INTERVAL", 0.05)
        image = complete(rooms)
        run = Scrub(rooms.images, rooms.records, Pace(1), threading.Event()).run()  # a byte a second
        threading.Timer(0.2, rooms.service.delete, [image.id]).start()
        assert next(run).outcome is Outcome.LEFT

    def test_found_by_two(self, rooms: Rooms) -> None:
        """Of a command and a service that read it at the same time, both say so, and it is kept once."""
        image = complete(rooms)
        rot(rooms, image)
        self.when("quarantine", rooms, lambda: rooms.disk.quarantine(image.id))
        assert scrub(rooms)[image.id].outcome is Outcome.DAMAGED
        check_aside(rooms, image)

    @pytest.mark.parametrize("whole", [True, False])
    def test_found_by_two_and_fetched_again(self, rooms: Rooms, *, whole: bool) -> None:
        """Before the second could write its record: what the fetch brought is not condemned, unless its bytes are
        gone."""
        image = complete(rooms)
        rot(rooms, image)

        def fetch_again() -> None:
            failed = rooms.base.update(rooms.base.get(image.id).failed("the other scrub says so"))
            if whole:
                put(rooms.disk, image.id, BODY)
            rooms.base.update(rooms.base.update(failed.requeued()).completed(len(BODY), DIGEST))

        self.when("lose_copy", rooms, fetch_again)
        scrub(rooms)
        rooms.faults.heal()
        assert rooms.base.get(image.id).status is (Status.COMPLETE if whole else Status.ERROR)

    def when_read(self, rooms: Rooms, happens: object) -> None:
        """At the end of the image."""
        self.when("read", rooms, happens, skip=1)

    def when(self, call: str, rooms: Rooms, happens: object, skip: int = 0) -> None:
        """Before a call of this name, once."""
        left = iter(range(skip + 1))

        def plan(_number: int, name: str) -> Fault | None:
            if name == call and next(left, None) == skip:
                assert callable(happens)
                happens()
            return None

        rooms.faults.plan = plan


class TestTrouble:
    @pytest.mark.parametrize("fault", [LOST, DAMAGED])
    @pytest.mark.parametrize("call", ["open", "read"])
    def test_once(self, rooms: Rooms, call: str, fault: Fault) -> None:
        """A disk that fails once is asked again."""
        image = complete(rooms)
        rooms.faults.next(call, fault)
        assert scrub(rooms)[image.id].outcome is Outcome.MATCHES

    @pytest.mark.parametrize("call", ["open", "read"])
    def test_no_fault_of_the_image(self, rooms: Rooms, call: str) -> None:
        """Too many open files, say: it condemns nothing, and the others have their turn."""
        images = [complete(rooms) for _ in range(2)]
        rooms.faults.next(call, LOST, times=2)
        assert [finding.outcome for finding in scrub(rooms).values()] == [Outcome.UNREAD, Outcome.MATCHES]
        assert rooms.listed() == {image.id: image for image in images}

    def test_unreadable(self, rooms: Rooms) -> None:
        """An image that the disk does not give back is not served any longer."""
        image = complete(rooms)
        rooms.faults.next("read", DAMAGED, times=2)
        assert scrub(rooms)[image.id].outcome is Outcome.DAMAGED
        check_aside(rooms, image)
        assert "Input/output error" in rooms.base.get(image.id).error

    def test_a_disk_that_is_gone(self, rooms: Rooms) -> None:
        """Nothing is condemned for what may be the whole disk's trouble."""
        images = [complete(rooms) for _ in range(3)]
        rooms.faults.always("read", "quarantine", fault=DAMAGED)
        assert {finding.outcome for finding in scrub(rooms).values()} == {Outcome.UNREAD}
        assert rooms.listed() == {image.id: image for image in images}

    def test_wrong_bytes_that_cannot_be_moved(self, rooms: Rooms) -> None:
        """They are not served either."""
        image = complete(rooms)
        rot(rooms, image)
        rooms.faults.always("quarantine", fault=FULL)
        assert scrub(rooms)[image.id].outcome is Outcome.DAMAGED
        assert rooms.base.get(image.id).error.endswith("; its bytes stay where they are: there is no space")
        assert list(rooms.disk.ids()) == [image.id]

    @pytest.mark.parametrize("fault", [LOST, UNKNOWN, FULL])
    def test_the_record_follows(self, rooms: Rooms, fault: Fault) -> None:
        """As soon as its store takes it."""
        image = complete(rooms)
        rot(rooms, image)
        rooms.faults.next("lose_copy", fault, times=3)
        assert scrub(rooms)[image.id].outcome is Outcome.DAMAGED
        check_aside(rooms, image)

    @pytest.mark.parametrize("call", ["page", "get", "lose_copy"])
    def test_records_that_are_away(self, rooms: Rooms, call: str) -> None:
        """The pass waits for them."""
        other = max((complete(rooms) for _ in range(2)), key=lambda image: image.id)
        rot(rooms, other)
        rooms.faults.next(call, LOST, times=3)
        found = scrub(rooms)
        assert [finding.outcome for finding in found.values()] == [Outcome.MATCHES, Outcome.DAMAGED]
        check_aside(rooms, other)

    def test_a_mistake_of_ours(self, rooms: Rooms) -> None:
        """It costs the image its turn, and no other."""
        for _ in range(2):
            complete(rooms)
        rooms.faults.next("read", Fault(RuntimeError("a mistake")))
        assert [finding.outcome for finding in scrub(rooms).values()] == [Outcome.UNREAD, Outcome.MATCHES]

    def test_stopped(self, rooms: Rooms) -> None:
        """While it waits for the record, too: the next start finds what is missing."""
        image = complete(rooms)
        rot(rooms, image)
        closing_down = threading.Event()

        def plan(_number: int, name: str) -> Fault | None:
            if name != "lose_copy":
                return None
            closing_down.set()
            return LOST

        rooms.faults.plan = plan
        with pytest.raises(Stopping):
            next(Scrub(rooms.images, rooms.records, Pace(0), closing_down).run())
        assert rooms.base.get(image.id) == image


class TestKilled:
    """The process dies right before a call of a store, or right after it."""

    @pytest.mark.parametrize("applied", [True, False])
    def test_anywhere(self, place: Place, rooms: Rooms, *, applied: bool) -> None:
        """After the next start the image is as it was, or in error with its bytes kept; it is never complete without
        its bytes, and a second pass ends what the first began."""
        whole = complete(rooms)
        step = 0
        while self.dies(rooms, step, applied=applied):
            after = place.open()
            after.maintenance.start_sweep()
            damaged = [image for image in after.listed().values() if image.id != whole.id]
            assert after.base.get(whole.id) == whole
            for image in damaged:
                aside = list(after.disk.quarantined()).count(image.id)
                there = image.id in set(after.disk.ids())
                assert (image.status, there, aside) in [(Status.COMPLETE, True, 0), (Status.ERROR, False, 1)]
                if image.status is Status.ERROR:
                    assert "its bytes are in quarantine" in image.error
            scrub(after)
            for image in damaged:
                assert after.base.get(image.id).status is Status.ERROR
                after.service.delete(image.id)
            rooms = place.open()
            step += 1
        assert step > 5

    def dies(self, rooms: Rooms, step: int, *, applied: bool) -> bool:
        image = complete(rooms)
        rot(rooms, image)
        rooms.faults.kill(len(rooms.faults.calls) + step, applied=applied)
        try:
            scrub(rooms)
        except Killed:
            return True
        finally:
            rooms.faults.heal()
        return False


class TestShared:
    """Records that other members share."""

    @pytest.fixture
    def images(self) -> MemoryImageStore:
        return MemoryImageStore()

    @pytest.fixture
    def records(self, images: MemoryImageStore) -> SharedRecords:
        return SharedRecords(Member(images.member, SITE, "http://one.example:20000"))

    @pytest.fixture
    def rooms(self, images: MemoryImageStore, records: SharedRecords) -> Rooms:
        images.mark(records.identity)
        return Rooms(images, records)

    def test_another_holds_it_too(self, rooms: Rooms, records: SharedRecords) -> None:
        """This member's copy is let go of and kept aside; the image stays complete."""
        image = complete(rooms)
        records.holding[image.id].add(OTHER.id)
        rot(rooms, image)
        assert scrub(rooms)[image.id].outcome is Outcome.DAMAGED
        assert records.get(image.id) == image
        assert records.holding[image.id] == {OTHER.id}
        assert (list(rooms.disk.ids()), list(rooms.disk.quarantined())) == ([], [image.id])

    def test_the_other_found_the_same(self, rooms: Rooms, records: SharedRecords) -> None:
        """Two members that release their copies at the same moment leave no complete image that nobody holds."""
        image = complete(rooms)
        records.holding[image.id].add(OTHER.id)
        rot(rooms, image)

        def plan(_number: int, name: str) -> None:
            if name == "lose_copy":
                records.holding[image.id].discard(OTHER.id)

        rooms.faults.plan = plan
        scrub(rooms)
        check_aside(rooms, image)

    def test_not_held_here(self, rooms: Rooms, records: SharedRecords) -> None:
        """Bytes that nobody has vouched for yet are not this room's business; nor are another member's images."""
        doubted, elsewhere = complete(rooms), complete(rooms)
        rooms.disk.delete(elsewhere.id)
        records.holding = {doubted.id: set(), elsewhere.id: {OTHER.id}}
        rot(rooms, doubted)
        assert scrub(rooms) == {}
        assert list(rooms.disk.ids()) == [doubted.id]
