"""Keys in etcd that somebody else wrote, whatever they are, are no trouble for a service."""

from __future__ import annotations

import json
from contextlib import closing

from imgsvc.etcd import Etcd
from imgsvc.etcd_messages import put
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from tests.etcd_cluster import EtcdCluster
from tests.harness import wait_for
from tests.service.conftest import StartService, on_etcd


def test_foreign_keys(start_service: StartService, etcd: EtcdCluster, etcd_prefix: str) -> None:
    """Names that are no text, text that is none, and what is no record: the others are listed and served, new ones come
    in, and the next start goes through."""
    service = start_service(**on_etcd(etcd, etcd_prefix), cluster_replicas=2)
    good = service.upload(b"content")["id"]
    odd = Image(new_id(), ImageType.KVM, status=Status.COMPLETE, size=7, sha256="ab" * 32)
    comment = odd.to_json().replace('"comment":""', '"comment":"\\ud800"')
    keys = {
        f"/images/{new_id()}/metadata": "[" * 5_000,
        f"/images/{odd.id}/metadata": comment,
        f"/images/{odd.id}/replicas/\udcff": "[" * 5_000,
        "/images/\udcff/metadata": comment,
        f"/images/{good}/replicas/\udcff": "{}",
        "/image-members/\udcff": json.dumps({"url": "http://127.0.0.1:1", "total": 10**400}),
    }
    with closing(Etcd(etcd.endpoints)) as connection:
        for key, value in keys.items():
            connection.transact([], [put(etcd_prefix + key, value)])
    wait_for(lambda: [each["id"] for each in service.images()] == sorted([good, odd.id]), 5, "what is an image")
    wait_for(lambda: len(service.get("/members").json()) == 2, 5, "two members")
    for _ in range(2):
        for image_id in (good, odd.id):
            assert service.get(f"/images/{image_id}").json()["id"] == image_id
        assert service.get(f"/images/{good}/download").body == b"content"
        assert service.get(f"/images/{odd.id}/download").status == 503
        more = service.upload(b"more")["id"]
        assert service.delete(more).status == 200
        service.terminate()
        service.start()
    assert service.delete(odd.id).status == 200
