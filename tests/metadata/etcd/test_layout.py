"""The layout in etcd, key by key, as other programs read it."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from imgsvc.etcd_layout import Layout
from imgsvc.metadata.etcd_images import stored_document
from imgsvc.metadata.image import parse_time
from imgsvc.metadata.store import Member
from tests.etcd_cluster import EtcdCluster
from tests.metadata.etcd.helpers import SOURCE, SOURCE_SHA256, Raw
from tests.metadata.etcd_store import OwnedEtcdStore, open_store
from tests.metadata.helpers import image


class TestLayout:
    def test_the_life_of_an_image(self, store: OwnedEtcdStore, member: Member, raw: Raw) -> None:
        """Key by key and byte by byte, what other programs read: in transfer, complete, and deleted."""
        current = store.create(image(SOURCE, comment='a "b"'))
        top = f"/images/{current.id}"
        document = (
            f'{{"id":"{current.id}","source":"http://source.example/ä.gz","type":"kvm","comment":"a \\"b\\"",'
            '"status":"pending","size":0,"expected_size":0,"download_start":"0001-01-01T00:00:00Z",'
            '"download_end":"0001-01-01T00:00:00Z","sha256":"","error":""}'
        )
        claim = f"/image-sources/{SOURCE_SHA256}"
        carrier = f'{{"member": "{member.id}", "url": "{member.url}", "until": 0.0}}'
        in_transfer = {
            f"{top}/metadata": document,
            claim: current.id,
            f"{top}/owner": member.id,
            f"{top}/transfer": carrier,
        }
        assert raw.all() == in_transfer
        assert raw.lease(f"{top}/owner") == store.membership.lease_id
        assert raw.lease(f"{top}/metadata") == raw.lease(claim) == raw.lease(f"{top}/transfer") == 0

        current = store.update(current.started(24))
        assert set(raw.all()) == set(in_transfer)
        assert raw.lease(f"{top}/owner") == store.membership.lease_id

        current = store.update(current.completed(24, "ab"))
        found = raw.all()
        assert set(found) == {f"{top}/metadata", claim, f"{top}/replicas/{member.id}"}
        assert found[f"{top}/metadata"] == stored_document(current)
        assert current.replicas == (member.id,)
        note = json.loads(found[f"{top}/replicas/{member.id}"])
        assert note == {"verified": note["verified"], "site": member.site, "url": member.url}
        verified = parse_time(note["verified"])
        assert verified is not None
        assert abs(datetime.now(UTC) - verified) < timedelta(minutes=1)
        assert raw.lease(f"{top}/replicas/{member.id}") == 0

        store.delete(current.id)
        assert raw.all() == {}

    def test_an_image_in_error(self, store: OwnedEtcdStore, other: OwnedEtcdStore, raw: Raw) -> None:
        """It keeps its record and its claim, and has neither owner nor holder, whoever held it."""
        current = store.update(store.create(image(SOURCE)).completed(1, "ab"))
        other.hold(current)
        current = store.update(current.failed("lost"))
        assert raw.all() == {
            f"/images/{current.id}/metadata": stored_document(current),
            f"/image-sources/{SOURCE_SHA256}": current.id,
        }

    def test_an_upload_claims_nothing(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """An image without source has no claim, and no claim of another goes with it."""
        store.create(image(SOURCE))
        upload = store.create(image())
        assert [key for key in raw.all() if "sources" in key] == [f"/image-sources/{SOURCE_SHA256}"]
        store.delete(upload.id)
        assert [key for key in raw.all() if "sources" in key] == [f"/image-sources/{SOURCE_SHA256}"]

    @pytest.mark.parametrize("prefix", ["/lochness", "lochness", "lochness/", "//lochness//"])
    def test_prefixes(self, prefix: str) -> None:
        """Slashes around a prefix make no difference."""
        assert Layout(prefix).record("x") == "/lochness/images/x/metadata"

    def test_no_prefix(self) -> None:
        """Without a prefix, keys still begin with a slash, as the Go program's did."""
        assert Layout("").record("x") == Layout("/").record("x") == "/images/x/metadata"
        assert Layout("/a/b").member("x") == "/a/b/image-members/x"

    def test_identity(self, store: OwnedEtcdStore, other: OwnedEtcdStore, etcd: EtcdCluster) -> None:
        """The same for all members; another in another cluster, whatever the prefix."""
        assert store.identity == other.identity
        with (
            closing(EtcdCluster()) as elsewhere,
            closing(open_store(elsewhere.endpoints, "/x")) as stranger,
            closing(open_store(etcd.endpoints, "/x")) as namesake,
        ):
            assert len({store.identity, stranger.identity, namesake.identity}) == 3
