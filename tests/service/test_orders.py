"""What members ask of each other, as the service takes it: from members alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imgsvc.cluster.peers import PEER, SIGNATURE, Signatures
from imgsvc.metadata.image import new_id
from tests.client import Answer
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service
from tests.service.conftest import StartService, on_etcd

SECRET = "known to members"
OPEN_WARNING = "without cluster.secret, whoever reaches this service is believed to be a member of the cluster"


@pytest.fixture(scope="module")
def _member(etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = on_etcd(etcd, "/test-orders")
    with Service(tmp_path_factory.mktemp("member"), cluster_secret=SECRET, **settings) as service:
        yield service


@pytest.fixture
def member(_member: Service) -> Iterator[Service]:
    """One of a cluster with a secret, which other tests of this module use too; its log must stay clean."""
    yield _member
    _member.check_log()


@pytest.fixture
def image_id(member: Service) -> str:
    return str(member.upload(b"content")["id"])


def order(service: Service, path: str, secret: str = SECRET, **changed: str) -> Answer:
    """An order as another member signs it, with some fields changed."""
    return service.request("POST", path, headers=Signatures(secret, "other").fields("POST", path) | changed)


@pytest.mark.parametrize("end", ["", "/", "?x=1"])
def test_a_check_is_taken_on(member: Service, image_id: str, end: str) -> None:
    """The path is signed as it is sent. The image is none the worse for it."""
    answer = order(member, f"/peers/check/{image_id}{end}")
    assert (answer.status, answer.json()) == (202, {"status": "queued"})
    assert member.download(image_id).body == b"content"


@pytest.mark.parametrize("kind", ["check", "copy"])
def test_a_stranger(member: Service, image_id: str, kind: str) -> None:
    """Without a signature, with another secret, for another image, or as nobody: it is refused, and the error is ours."""
    path = f"/peers/{kind}/{image_id}"
    signed = Signatures(SECRET, "other").fields("POST", f"/peers/{kind}/{new_id()}")
    refused = [
        member.request("POST", path),
        member.request("POST", path, headers={PEER: "other"}),
        member.request("POST", path, headers=signed),
        order(member, path, secret="another"),
        order(member, path, **{PEER: "third"}),
        order(member, path, **{SIGNATURE: "é"}),
        member.request("POST", path, b"x" * 1000),
    ]
    for answer in refused:
        assert answer.status == 403
        assert answer.json()["code"] == 403
    assert member.download(image_id).body == b"content"


@pytest.mark.parametrize("kind", ["check", "copy"])
def test_routes(member: Service, kind: str) -> None:
    path = f"/peers/{kind}/{new_id()}"
    answer = member.get(path)
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    assert order(member, f"/peers/{kind}/..").status == 404
    assert order(member, "/peers/steal/" + new_id()).status == 404


def test_a_copy_of_nothing(member: Service) -> None:
    assert order(member, f"/peers/copy/{new_id()}").status == 404


def test_without_a_secret(new_host: StartService) -> None:
    """Whoever says that it is a member is believed, and the start has said so; who does not say it is refused."""
    service = new_host()
    path = f"/peers/check/{service.upload(b'content')['id']}"
    assert len(service.events(OPEN_WARNING)) == 1
    assert service.request("POST", path).status == 403
    assert service.request("POST", path, headers={PEER: "any"}).status == 202
    assert order(service, path).status == 202


def test_with_a_secret_nothing_is_said(member: Service) -> None:
    assert not member.events(OPEN_WARNING)


def test_no_cluster(start_service: StartService) -> None:
    """A service that shares its records with nobody takes orders from nobody, and warns of nothing."""
    service = start_service()
    path = f"/peers/check/{service.upload(b'content')['id']}"
    assert order(service, path).status == 404
    assert not service.events(OPEN_WARNING)
