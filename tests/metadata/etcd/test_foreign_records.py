"""Records in etcd that others wrote: the Go program, or somebody by hand."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from imgsvc.errors import Invalid, NotFound, Unavailable
from imgsvc.metadata.image import Status, new_id
from imgsvc.metadata.store import Entry, Member
from tests.harness import wait_for
from tests.metadata.etcd.helpers import SOURCE, SOURCE_SHA256, Raw
from tests.metadata.etcd_store import OwnedEtcdStore
from tests.metadata.helpers import entry, image, listed


def from_go(raw: Raw, status: str = "complete", source: str = "") -> str:
    """Puts a record as the Go program wrote it, alone, and returns its id."""
    image_id = new_id()
    raw.put(
        f"/images/{image_id}/metadata",
        f'{{"id":"{image_id}","source":"{source}","type":"kvm","comment":"old","status":"{status}","size":24,'
        '"expected_size":24,"download_start":"2015-03-02T07:04:35.123456789Z",'
        '"download_end":"2015-03-02T07:04:36Z"}',
    )
    return image_id


class TestForeignRecords:
    def test_reading(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """A record of the Go program is one of ours, without claim, holder or owner."""
        image_id = from_go(raw, source=SOURCE)
        assert store.get(image_id).comment == "old"
        assert [each.id for each in listed(store)] == [image_id]
        assert entry(store, image_id) == Entry(store.get(image_id), owner=None, here=False)

    def test_deleting(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """It goes as others do."""
        store.delete(from_go(raw, source=SOURCE))
        assert raw.all() == {}

    def test_a_survey_claims(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """After a survey its source is claimed; a second record of that source is left without."""
        first, second = sorted(from_go(raw, source=SOURCE) for _ in range(2))
        upload = from_go(raw)
        list(store.survey())
        list(store.survey())
        assert store.get_by_source(SOURCE).id == first
        store.delete(second)
        store.delete(upload)
        assert store.get_by_source(SOURCE).id == first

    @pytest.mark.parametrize("status", ["pending", "downloading"])
    def test_a_survey_ends_transfers(self, store: OwnedEtcdStore, other: OwnedEtcdStore, raw: Raw, status: str) -> None:
        """What the Go program was transferring is in error, whichever member looks first; our own transfers go on."""
        image_id = from_go(raw, status, source=SOURCE)
        current = store.create(image())
        for pages in (other.survey(), store.survey()):
            (page,) = pages
            found = {each.image.id: each for each in page}
            failed = found[image_id].image
            assert (failed.status, found[image_id].owner) == (Status.ERROR, None)
            assert "mistify-image-service stopped" in failed.error
            assert failed == store.get_by_source(SOURCE)
            assert found[current.id].image == current

    def test_a_survey_explains(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """An image that the Go program left in error has a sentence for whoever asks."""
        image_id = from_go(raw, "error")
        list(store.survey())
        assert "did not record why" in store.get(image_id).error

    def test_holding_claims(self, store: OwnedEtcdStore, member: Member, raw: Raw) -> None:
        """Who holds it says so, and claims its source."""
        image_id = from_go(raw, source=SOURCE)
        store.hold(store.get(image_id))
        assert f"/images/{image_id}/replicas/{member.id}" in raw.all()
        assert store.get_by_source(SOURCE).id == image_id
        assert entry(store, image_id).here

    @pytest.mark.parametrize("document", ["", "{", "[]", "\xff", '{"id": 1}', "another's"])
    def test_nonsense(self, store: OwnedEtcdStore, raw: Raw, document: str) -> None:
        """What is no document is named in the log and in the error, and hides no other image."""
        good = store.create(image())
        key = f"/images/{new_id()}/metadata"
        with capture_logs() as logs:
            raw.put(key, good.to_json() if document == "another's" else document)
            raw.put(f"/images/{new_id()}/else", "x")
            wait_for(lambda: [log.get("key") for log in logs] == [raw.prefix + key], 5, "a word in the log")
            assert listed(store) == [good]
        assert [each.image for page in store.survey() for each in page] == [good]
        with pytest.raises(Unavailable, match=key):
            store.get(key.split("/")[2])

    def test_a_claim_without_a_record(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """A record removed by hand does not take its source with it."""
        removed = store.create(image(SOURCE))
        raw.delete(f"/images/{removed.id}/metadata")
        with pytest.raises(NotFound):
            store.get_by_source(SOURCE)
        created = store.create(image(SOURCE))
        assert store.get_by_source(SOURCE) == created

    def test_a_claim_of_nonsense(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """A claim that names no image, because somebody wrote something else, claims nothing."""
        raw.client.put(f"{raw.prefix}/image-sources/{SOURCE_SHA256}", b"\xff")
        with pytest.raises(NotFound):
            store.get_by_source(SOURCE)
        created = store.create(image(SOURCE))
        assert store.get_by_source(SOURCE) == created

    @pytest.mark.parametrize("comment", ["x" * 2_000_000, "\ud800"], ids=["too long", "half a surrogate pair"])
    def test_what_etcd_cannot_take(self, store: OwnedEtcdStore, raw: Raw, comment: str) -> None:
        """A record that etcd could not store is the caller's mistake."""
        with pytest.raises(Invalid):
            store.create(image(comment=comment))
        assert raw.all() == {}
