"""The start sweep settles what the last run left, and only that; in doubt it leaves things alone."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from imgsvc.errors import ConfigError, ImgsvcError, NoSpace, Unavailable, Unreadable
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.metadata.image import Image, Status, new_id
from imgsvc.metadata.memory import MemoryMetadataStore
from tests.flaky import DAMAGED, FULL, LOST, Fault
from tests.images.helpers import content, put
from tests.left_behind import BODY, committed, complete, interrupted
from tests.rooms import DiskPlace, Place, Rooms, feed_and_finish, wait_until
from tests.source import Source

STOPPED = "the service stopped during the upload"


def swept(place: Place) -> Rooms:
    """After a restart and the sweep."""
    rooms = place.open()
    rooms.maintenance.start_sweep()
    return rooms


class TestTransfers:
    @pytest.mark.parametrize("fed", [[], [b"some", b"bytes"]], ids=["empty", "begun"])
    def test_an_interrupted_upload(self, place: Place, rooms: Rooms, fed: list[bytes]) -> None:
        """Nobody will send the rest: its record says so, and its bytes are gone."""
        image = interrupted(rooms, *fed)
        after = swept(place)
        ended = after.base.get(image.id)
        assert (ended.status, ended.error, ended.size) == (Status.ERROR, STOPPED, 0)
        after.check_settled()

    def test_a_committed_upload(self, place: Place, rooms: Rooms) -> None:
        """The sender was not told that it had succeeded, so it has not."""
        image = committed(rooms)
        after = swept(place)
        assert after.base.get(image.id).error == STOPPED
        after.check_settled()

    @pytest.mark.parametrize("leave", [interrupted, committed])
    @pytest.mark.parametrize("began", [True, False], ids=["begun", "queued"])
    def test_a_fetch(self, place: Place, rooms: Rooms, leave: Callable[..., Image], *, began: bool) -> None:
        """Whether it was queued, on its way or committed, it is fetched from the beginning."""
        with Source() as source:
            url = source.serve("/image", BODY)
            if not began:
                image = rooms.queued(url)
            elif leave is interrupted:
                image = interrupted(rooms, b"some", source=url)
            else:
                image = committed(rooms, source=url)
            after = swept(place)
            again = after.base.get(image.id)
            assert (again.status, again.size, again.download_start) == (Status.PENDING, 0, None)
            assert after.claims() == {image.id}
            assert list(after.disk.ids()) == []
            with closing(after):
                after.start()
                wait_until(lambda: after.base.get(image.id).status is Status.COMPLETE)
            assert content(after.disk, image.id) == BODY
            assert len(source.asked("/image")) == 1
            after.check_settled()

    def test_what_was_final_stays(self, place: Place, rooms: Rooms) -> None:
        """Complete images, errors, and their bytes are as they were."""
        whole, failed = complete(rooms), rooms.upload()
        failed.abort(NoSpace("no space"))
        before = rooms.listed()
        after = swept(place)
        assert after.listed() == before
        assert content(after.disk, whole.id) == BODY
        after.check_settled()

    def test_stale_claims(self, place: Place, rooms: Rooms) -> None:
        """A claim that no record in transfer explains goes."""
        rooms.disk.claim(new_id())
        rooms.disk.claim(complete(rooms).id)
        after = swept(place)
        after.check_settled()


class TestLost:
    def test_no_file(self, place: Place, rooms: Rooms) -> None:
        """A complete image whose bytes are gone is an error, so that it is not offered, and can be fetched again."""
        image = complete(rooms)
        rooms.disk.delete(image.id)
        after = swept(place)
        assert after.base.get(image.id).error == "the image was lost: its file is missing"
        after.check_settled()

    def test_another_size(self, place: Place, rooms: Rooms) -> None:
        """A file that was cut is not passed off as the image."""
        image = complete(rooms)
        rooms.disk.delete(image.id)
        put(rooms.disk, image.id, BODY[:-1])
        after = swept(place)
        lost = after.base.get(image.id)
        assert lost.status is Status.ERROR
        assert f"{len(BODY) - 1} bytes" in lost.error
        assert f"{len(BODY)}" in lost.error
        after.service.delete(image.id)
        after.check_settled()

    def test_a_file_that_cannot_be_looked_at(self, place: Place, rooms: Rooms) -> None:
        """One of a disk that is rotten keeps no other from being served, and is not condemned unseen."""
        images = {image.id: image for image in (complete(rooms), complete(rooms), complete(rooms, sha256=""))}
        after = place.open()
        after.faults.next("size", DAMAGED)
        with capture_logs() as logs:
            after.maintenance.start_sweep()
        assert after.listed() == images
        assert set(after.disk.ids()) == set(images)
        (line,) = [line for line in logs if line["log_level"] == "error"]
        assert line["image"] in images

    @pytest.mark.parametrize("fault", [LOST, DAMAGED, FULL])
    def test_a_file_that_cannot_be_set_aside(self, place: Place, rooms: Rooms, fault: Fault) -> None:
        """Nor is it served; it stays where it is, also at the starts that follow, and can be deleted."""
        image, whole = complete(rooms), complete(rooms)
        rooms.disk.delete(image.id)
        put(rooms.disk, image.id, BODY[:-1])
        for _ in range(2):
            after = place.open()
            after.faults.always("quarantine", fault=fault)
            after.maintenance.start_sweep()
            assert after.base.get(image.id).was_lost
            assert set(after.disk.ids()) == {image.id, whole.id}
            with pytest.raises(ImgsvcError):
                after.service.open(image.id)
        after.service.delete(image.id)
        after.check_settled()

    def test_bytes_of_an_error_that_cannot_be_removed(self, place: Place, rooms: Rooms) -> None:
        """They go when the disk lets them."""
        failed, whole = rooms.upload(), complete(rooms)
        failed.abort(NoSpace("no space"))
        put(rooms.disk, failed.image.id, BODY)
        after = place.open()
        after.faults.next("delete", DAMAGED)
        after.maintenance.start_sweep()
        assert set(after.disk.ids()) == {failed.image.id, whole.id}
        swept(place).check_settled()

    @pytest.mark.parametrize("source", ["", "http://source.example/1"], ids=["an upload", "a fetch"])
    def test_bytes_of_a_transfer_that_cannot_be_removed(self, place: Place, rooms: Rooms, source: str) -> None:
        """The transfer is settled all the same."""
        image = committed(rooms, source)
        after = place.open()
        after.faults.next("delete", DAMAGED)
        after.maintenance.start_sweep()
        assert after.base.get(image.id).status is (Status.PENDING if source else Status.ERROR)
        assert after.claims() == set(after.take_turns()) == ({image.id} if source else set())

    @pytest.mark.parametrize(("leave", "call"), [(interrupted, "writer"), (committed, "size")])
    def test_an_upload_that_cannot_be_looked_at(
        self, place: Place, rooms: Rooms, leave: Callable[..., Image], call: str
    ) -> None:
        image = leave(rooms)
        after = place.open()
        after.faults.next(call, DAMAGED)
        after.maintenance.start_sweep()
        assert after.base.get(image.id).error == STOPPED
        after.check_settled()

    def test_a_claim_that_cannot_be_removed(self, place: Place, rooms: Rooms) -> None:
        rooms.disk.claim(new_id())
        after = place.open()
        after.faults.next("unclaim", DAMAGED)
        after.maintenance.start_sweep()
        swept(place).check_settled()

    def test_a_directory_that_cannot_be_listed(self, rooms: Rooms) -> None:
        """Then nothing is known of any image, and the start waits."""
        rooms.faults.next("ids", DAMAGED)
        with pytest.raises(Unreadable):
            rooms.maintenance.start_sweep()

    def test_no_digest(self, place: Place, rooms: Rooms) -> None:
        """An image of the Go program gets its digest, and keeps the rest."""
        image = complete(rooms, sha256="")
        after = swept(place)
        with closing(after):
            after.start()
            wait_until(lambda: after.base.get(image.id).sha256 != "")
        assert after.base.get(image.id).sha256 == hashlib.sha256(BODY).hexdigest()
        assert after.base.get(image.id).status is Status.COMPLETE


class TestOrphans:
    def test_bytes_without_a_record_go(self, place: Place, rooms: Rooms) -> None:
        """In a directory that is marked for these records."""
        put(rooms.disk, new_id(), BODY)
        kept = complete(rooms)
        after = swept(place)
        assert list(after.disk.ids()) == [kept.id]

    def test_other_records(self, rooms: Rooms) -> None:
        """With records to which the directory does not belong everything looks like an orphan: all is left alone, and
        the log says so."""
        orphan, claim = new_id(), new_id()
        put(rooms.disk, orphan, BODY)
        rooms.disk.claim(claim)
        rooms.disk.mark("other records")
        with capture_logs() as logs:
            rooms.maintenance.start_sweep()
            rooms.maintenance.reconcile()
        assert list(rooms.disk.ids()) == [orphan]
        assert rooms.claims() == {claim}
        assert rooms.disk.marked_for not in ("", "other records", rooms.base.identity)
        assert [line["log_level"] for line in logs if line.get("example") in (orphan, claim)] == ["error", "error"]

    def test_other_records_and_back(self, rooms: Rooms) -> None:
        """What came in under the wrong records is no orphan of the right ones. Once a person has moved it away, the
        directory belongs to these again, and orphans go."""
        kept = complete(rooms)
        wrong = Rooms(rooms.disk, MemoryMetadataStore(rooms.base._member))  # type: ignore[attr-defined]  # each has it
        wrong.maintenance.start_sweep()
        strange = complete(wrong)
        wrong.maintenance.reconcile()
        for _ in range(2):
            rooms.maintenance.start_sweep()
            rooms.maintenance.reconcile()
            assert set(rooms.disk.ids()) == {kept.id, strange.id}
        rooms.disk.delete(strange.id)
        rooms.maintenance.start_sweep()
        put(rooms.disk, new_id(), BODY)
        rooms.maintenance.start_sweep()
        rooms.check_settled()

    @pytest.mark.parametrize("source", ["", "http://source.example/1"], ids=["an upload", "a fetch"])
    def test_a_transfer_in_a_directory_of_others(self, rooms: Rooms, source: str) -> None:
        """Bytes that these records have in transfer may be a whole image, which a person may look for; the transfer
        does not wait for that."""
        put(rooms.disk, new_id(), BODY)
        rooms.disk.mark("other records")
        image = committed(rooms, source)
        rooms.maintenance.start_sweep()
        assert list(rooms.disk.quarantined()) == [image.id]
        assert rooms.base.get(image.id).status is (Status.PENDING if source else Status.ERROR)
        assert rooms.claims() == set(rooms.take_turns()) == ({image.id} if source else set())

    def test_a_whole_upload_in_a_directory_of_others(self, rooms: Rooms) -> None:
        """All of its bytes had come, to this member: it becomes complete, as at any start."""
        put(rooms.disk, new_id(), BODY)
        rooms.disk.mark("other records")
        upload = rooms.upload(expected_size=5)
        rooms.faults.next("update", LOST)
        with pytest.raises(Unavailable):
            feed_and_finish(upload)
        rooms.maintenance.start_sweep()
        rooms.verify_uploads()
        assert rooms.base.get(upload.image.id).status is Status.COMPLETE
        assert content(rooms.disk, upload.image.id) == b"bytes"

    @pytest.mark.parametrize("look", ["start_sweep", "reconcile"])
    def test_records_that_are_exchanged_meanwhile(self, rooms: Rooms, look: str) -> None:
        """As when etcd is restored: what was seen of the earlier ones does not give the directory to the later ones,
        which lack an image."""
        image = complete(rooms)

        def exchange() -> None:
            rooms.base.delete(image.id)
            rooms.base._identity = "restored"  # type: ignore[attr-defined]  # each has it

        rooms.faults.at("page", 2, exchange)
        for _ in range(3):
            with contextlib.suppress(Unavailable):
                getattr(rooms.maintenance, look)()
        assert content(rooms.disk, image.id) == BODY

    def test_an_empty_directory_takes_to_other_records(self, rooms: Rooms) -> None:
        """With no images in doubt the mark follows the records, and from then on orphans go."""
        rooms.disk.mark("other records")
        rooms.maintenance.start_sweep()
        assert rooms.disk.marked_for == rooms.base.identity

    def test_a_directory_of_the_go_program(self, rooms: Rooms, tmp_path: Path) -> None:
        """It has images and no marker: those that the records know are served, the others are left alone, and the
        mark waits until somebody has looked at them."""
        image = complete(rooms)
        (tmp_path / "old").mkdir()
        with closing(FilesystemImageStore(tmp_path / "old")) as old:
            (tmp_path / "old" / image.id).write_bytes(BODY)
            (tmp_path / "old" / new_id()).write_bytes(BODY)
            after = Rooms(old, rooms.base)
            after.maintenance.start_sweep()
            assert len(list(old.ids())) == 2
            assert (old.fresh, old.marked_for) == (False, "")
            (tmp_path / "old" / next(name for name in old.ids() if name != image.id)).unlink()
            after.maintenance.start_sweep()
            assert old.marked_for == rooms.base.identity
            after.check_settled()

    @pytest.mark.parametrize("document", ["{", '{"id": 7}', '{"status": "unheard of"}'])
    def test_a_spoilt_record_protects_its_bytes(self, tmp_path: Path, document: str) -> None:
        """What cannot be read may still say whose bytes they are."""
        with closing(DiskPlace(tmp_path)) as place:
            rooms = place.open()
            rooms.disk.mark(rooms.base.identity)
            image = complete(rooms)
            with closing(sqlite3.connect(tmp_path / "imgsvc.db")) as connection, connection:
                connection.execute("UPDATE imgsvc_images SET document = ?", (document,))
            after = swept(place)
            after.maintenance.reconcile()
            assert content(after.disk, image.id) == BODY

    def test_a_disk_that_keeps_one_orphan(self, rooms: Rooms) -> None:
        """One file that cannot be removed stops neither the start nor the removal of the others."""
        for _ in range(3):
            put(rooms.disk, new_id(), BODY)
        rooms.faults.next("delete", LOST)
        rooms.maintenance.start_sweep()
        assert len(list(rooms.disk.ids())) == 1


class TestUnmounted:
    @pytest.fixture
    def elsewhere(self, tmp_path: Path) -> Iterator[FilesystemImageStore]:
        """An empty directory, as where a file system is not mounted."""
        with closing(FilesystemImageStore(tmp_path / "empty")) as store:
            yield store

    def test_an_empty_directory_is_refused(self, rooms: Rooms, elsewhere: FilesystemImageStore) -> None:
        """When this host is on record as holding images; the error names the directory, and nothing is changed."""
        image = complete(rooms)
        for _ in range(2):
            with pytest.raises(ConfigError, match=elsewhere.place):
                Rooms(elsewhere, rooms.base).maintenance.start_sweep()
        assert elsewhere.fresh
        assert rooms.base.get(image.id) == image

    def test_a_new_directory_is_marked(self, rooms: Rooms, elsewhere: FilesystemImageStore) -> None:
        """Records that say nothing of bytes here are no reason to refuse."""
        rooms.upload().abort(NoSpace("no space"))
        Rooms(elsewhere, rooms.base).maintenance.start_sweep()
        assert elsewhere.marked_for == rooms.base.identity

    def test_records_that_cannot_be_read_mark_nothing(self, rooms: Rooms, elsewhere: FilesystemImageStore) -> None:
        """An outage at the first start does not let the marker be written unchecked."""
        after = Rooms(elsewhere, rooms.base)
        after.faults.always("page")
        with pytest.raises(Unavailable):
            after.maintenance.start_sweep()
        assert elsewhere.fresh


class TestReconcile:
    def test_only_what_has_no_record(self, rooms: Rooms) -> None:
        """While transfers run: their bytes, on the way or just committed, are not touched."""
        put(rooms.disk, new_id(), BODY)
        whole, running = complete(rooms), rooms.upload()
        running.feed(b"some")
        ending = committed(rooms)
        rooms.maintenance.reconcile()
        assert set(rooms.disk.ids()) == {whole.id, ending.id}
        rooms.settlements.retry()
        running.finish()
        rooms.check_settled()
