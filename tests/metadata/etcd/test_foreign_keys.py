"""One key of somebody else, whatever it says, stops no member: neither one that runs nor one that starts."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
from structlog.testing import capture_logs

from imgsvc.errors import NotFound, Unavailable
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import Image, ImageType, new_id
from tests.etcd_cluster import EtcdCluster
from tests.harness import wait_for
from tests.metadata.etcd.helpers import Raw
from tests.metadata.etcd_store import OwnedEtcdStore, open_store
from tests.metadata.helpers import image
from tests.rooms import Rooms, wait_until

DEEP = "[" * 5_000
HUGE = "1" * 400


@pytest.mark.parametrize(
    "document",
    [DEEP, '{"id":' * 5_000, f'{{"size": {HUGE}, "id": "ID", "type": "kvm", "status": "pending"}}'],
    ids=["lists", "objects", "number"],
)
def test_a_record(store: OwnedEtcdStore, raw: Raw, etcd: EtcdCluster, document: str) -> None:
    """It is none, as any that is spoilt: named in the log and by who asks for it, and beside it all goes on."""
    list(store.list())
    spoilt = new_id()
    key = f"/images/{spoilt}/metadata"
    with capture_logs() as logs:
        raw.put(key, document.replace("ID", spoilt))
        wait_for(lambda: [log["key"] for log in logs if "key" in log] == [raw.prefix + key], 5, "a word in the log")
    assert_goes_on(store, raw, etcd)
    with pytest.raises(Unavailable, match=key):
        store.get(spoilt)
    with pytest.raises(Unavailable, match=key):
        store.delete(spoilt)


def test_a_record_of_the_go_program_that_is_too_large(store: OwnedEtcdStore, raw: Raw, etcd: EtcdCluster) -> None:
    """It was in transfer, and cannot be told that it is over: it stays as it is, which stops nobody."""
    image_id = new_id()
    document = f'{{"id": "{image_id}", "type": "kvm", "status": "downloading", "comment": "{"x" * 1_200_000}"}}'
    raw.put(f"/images/{image_id}/metadata", document)
    assert_goes_on(store, raw, etcd)
    store.delete(image_id)
    assert raw.all() == {}


@pytest.mark.parametrize("image_id", ["NO-UUID", "..", "", "0B53A3F2-5A0C-4B1E-9B1F-0C6D3E2F1A00"])
def test_a_record_under_no_id(store: OwnedEtcdStore, raw: Raw, etcd: EtcdCluster, image_id: str) -> None:
    """Nobody could ask for it, and no file may have such a name: it is none."""
    raw.put(f"/images/{image_id}/metadata", Image(image_id, ImageType.KVM, source="http://a.example/").to_json())
    assert_goes_on(store, raw, etcd)
    assert store.mirror.in_transfer() == []
    with pytest.raises(NotFound):
        store.get(image_id)


@pytest.mark.parametrize("note", [DEEP, f'{{"member": "m", "url": "u", "until": {HUGE}}}'], ids=["lists", "number"])
@pytest.mark.parametrize("name", ["owner", "transfer", "replicas/another"])
def test_what_is_beside_a_record(store: OwnedEtcdStore, raw: Raw, etcd: EtcdCluster, name: str, note: str) -> None:
    """A carrier that makes no sense is none; who holds it, and who owns it, is not asked for sense."""
    created = store.create(image())
    raw.put(f"/images/{created.id}/{name}", note)
    assert_goes_on(store, raw, etcd)
    assert store.get(created.id).id == created.id
    assert store.carrier(created.id) == ""
    store.holders(created.id)
    store.delete(created.id)


@pytest.mark.parametrize(
    "note", [DEEP, json.dumps({"url": "u", "total": int(HUGE), "free": -1})], ids=["lists", "number"]
)
def test_a_member(store: OwnedEtcdStore, raw: Raw, etcd: EtcdCluster, note: str) -> None:
    """Of what it says, all that makes no sense is not said."""
    raw.put("/image-members/another", note)
    wait_until(lambda: "another" in store.mirror.members())
    said = store.mirror.members()["another"]
    assert (said.free, said.total) == (None, None)
    assert_goes_on(store, raw, etcd)


def is_listed(image: Image, store: OwnedEtcdStore) -> bool:
    return any(image.id in document for page in store.list() for document in page)


def assert_goes_on(store: OwnedEtcdStore, raw: Raw, etcd: EtcdCluster) -> None:
    """A member that runs hears of what is new; another one starts, and hears of it too."""
    with closing(open_store(etcd.endpoints, raw.prefix)) as beginner:
        created = beginner.create(image())
        Rooms(MemoryImageStore(), beginner).maintenance.start_sweep()
        wait_until(lambda: all(is_listed(created, each) and each.stale is None for each in (store, beginner)))
        beginner.delete(created.id)
