"""`GET /members`: who is live, as the members themselves say it."""

from __future__ import annotations

import shutil

import pytest

from imgsvc import __version__
from imgsvc.metadata.image import parse_time
from tests.harness import Service, wait_for
from tests.service.conftest import StartService


@pytest.fixture
def alone(start_service: StartService) -> Service:
    """A service that shares its records with nobody."""
    return start_service()


def test_a_cluster_of_one(alone: Service) -> None:
    """Who asks every service the same question gets the same kind of answer."""
    alone.upload(b"content")
    (member,) = alone.get("/members").json()
    assert list(member) == ["id", "url", "version", "free", "total", "images", "started"]
    assert member["url"] == f"http://127.0.0.1:{alone.port}"
    assert (member["version"], member["images"]) == (__version__, 1)
    disk = shutil.disk_usage(alone.images_dir)
    assert member["total"] == disk.total
    assert abs(member["free"] - disk.free) < 1 << 30
    assert parse_time(member["started"]) is not None


def test_the_number_follows(alone: Service) -> None:
    """What comes in, goes, or is set aside is counted soon."""
    images = [alone.upload(bytes([n]))["id"] for n in range(3)]

    def counted() -> int:
        return int(alone.get("/members").json()[0]["images"])

    wait_for(lambda: counted() == 3, 5, "three images")
    alone.delete(images[0])
    wait_for(lambda: counted() == 2, 5, "two images")


def test_routes(alone: Service) -> None:
    """It is a resource like the others."""
    assert alone.get("/members/").json()[0]["id"] == alone.get("/members").json()[0]["id"]
    head, got = alone.request("HEAD", "/members"), alone.get("/members")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Length"] == str(len(got.body))
    for method in ("PUT", "POST", "DELETE"):
        answer = alone.request(method, "/members")
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert alone.get("/members/x").status == 404
