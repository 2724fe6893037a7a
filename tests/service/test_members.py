"""`GET /members`: who is live, as the members themselves say it."""

from __future__ import annotations

import shutil
import time
from contextlib import closing

import pytest

from imgsvc import __version__
from imgsvc.etcd import Etcd
from imgsvc.metadata.image import parse_time
from tests.client import Answer
from tests.etcd_cluster import EtcdCluster
from tests.harness import Service, wait_for
from tests.service.conftest import StartService, on_etcd
from tests.tus import Tus, id_of


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


TTL = 2
GONE = TTL + 4.0


def live(service: Service) -> list[str]:
    return [member["id"] for member in service.get("/members").json()]


def ready(service: Service) -> Answer:
    return service.get("/readyz")


def test_all_know_all(new_host: StartService) -> None:
    """Each member answers the same, in the order of ids; one that stops is gone at once, one that is killed soon."""
    hosts = {name: new_host(cluster_member_id=name, cluster_lease_ttl=TTL) for name in ("b", "c", "a")}
    for host in hosts.values():
        wait_for(lambda host=host: live(host) == ["a", "b", "c"], 5, "all are known")  # type: ignore[misc]
    for member in hosts["a"].get("/members").json():
        assert member["url"] == f"http://127.0.0.1:{hosts[member['id']].port}"
        assert member["version"] == __version__
        assert 0 < member["free"] <= member["total"]
    hosts["b"].terminate()
    wait_for(lambda: live(hosts["a"]) == ["a", "c"], 1, "who stopped is gone")
    hosts["c"].kill()
    assert live(hosts["a"]) == ["a", "c"]
    wait_for(lambda: live(hosts["a"]) == ["a"], GONE, "who was killed is gone")
    hosts["c"].start()
    wait_for(lambda: live(hosts["a"]) == ["a", "c"], 5, "it is back")


def test_where_it_is_reached(new_host: StartService) -> None:
    host = new_host(cluster_advertise_url="https://images.example:8443")
    wait_for(lambda: live(host), 5, "it is known")
    assert host.get("/members").json()[0]["url"] == "https://images.example:8443"


def test_a_quick_restart(new_host: StartService) -> None:
    """A member that was killed need not wait for its own lease to end."""
    host = new_host(cluster_lease_ttl=60)
    image_id = host.upload(b"content")["id"]
    host.kill()
    began = time.monotonic()
    host.start()
    assert time.monotonic() - began < 20
    assert host.download(image_id).body == b"content"


def test_the_number_of_images_is_told(new_host: StartService) -> None:
    """From the first moment, as far as others are concerned."""
    host = new_host(cluster_member_id="a")
    host.upload(b"content")
    host.terminate()
    host.start()
    wait_for(lambda: [member["images"] for member in host.get("/members").json()] == [1], 5, "its image is counted")


def test_its_key_is_deleted(new_host: StartService, etcd: EtcdCluster, etcd_prefix: str) -> None:
    """By whomever: it is back at once, for this member lives."""
    one, other = new_host(cluster_member_id="a"), new_host(cluster_member_id="b")
    key = f"{etcd_prefix}/image-members/a"
    with closing(Etcd(etcd.endpoints)) as connection:

        def created() -> list[int]:
            return [item.created for item in connection.range(key).items]

        before = created()
        connection.delete(key)
        wait_for(lambda: created() not in ([], before), 5, "it is back")
    wait_for(lambda: live(one) == live(other) == ["a", "b"], 5, "all see it")
    assert len(one.events("lease granted")) == 1


def test_without_etcd(start_service: StartService, own_etcd: EtcdCluster) -> None:
    """The answer is that of the last moment, and says how old it is."""
    host = start_service(**on_etcd(own_etcd, "/members"), cluster_member_id="a", cluster_lease_ttl=TTL)
    wait_for(lambda: live(host) == ["a"], 5, "it is known")
    assert "X-Imgsvc-Stale" not in host.get("/members").headers
    own_etcd.stop(0)
    wait_for(lambda: "X-Imgsvc-Stale" in host.get("/members").headers, 10, "the age is said")
    answer = host.get("/members")
    assert [member["id"] for member in answer.json()] == ["a"]
    assert 1 <= int(answer.headers["X-Imgsvc-Stale"]) < 30
    own_etcd.cont(0)
    wait_for(lambda: "X-Imgsvc-Stale" not in host.get("/members").headers, 10, "it is new again")


class TestNames:
    def test_one_is_given_later(self, new_host: StartService) -> None:
        """All that the member held is on record under the new id; nothing is lost, also not by a second change."""
        host, other = new_host(cluster_lease_ttl=TTL), new_host()
        images = [host.upload(bytes([n]))["id"] for n in range(3)]
        (old,) = host.image(images[0])["replicas"]
        for name in ("a", "b"):
            host.kill()
            host.settings["cluster_member_id"] = name
            host.start()
            for n, image_id in enumerate(images):
                assert host.image(image_id)["replicas"] == [name]
                assert host.download(image_id).body == bytes([n])
            wait_for(lambda name=name: name in live(other), 5, "it is known by its name")  # type: ignore[misc]
            assert old not in live(other)
        del host.settings["cluster_member_id"]
        host.terminate()
        host.start()
        assert host.image(images[0])["replicas"] == ["b"]

    def test_one_is_given_in_the_middle_of_an_upload(self, new_host: StartService) -> None:
        """Whoever can go on with it does."""
        tus = Tus(new_host(cluster_lease_ttl=TTL))
        path = tus.create(10)
        tus.bring(path, 0, b"01234")
        tus.service.kill()
        tus.service.settings["cluster_member_id"] = "a"
        tus.service.start()
        assert tus.offset(path) == 5
        tus.bring(path, 5, b"56789")
        image_id = id_of(path)
        assert tus.service.image(image_id)["replicas"] == ["a"]
        assert tus.service.download(image_id).body == b"0123456789"

    def test_that_of_a_live_member(self, new_host: StartService, start_service: StartService) -> None:
        """The second waits, says for whom, does nothing, and goes on by itself when that one has left."""
        first = new_host(cluster_member_id="a", cluster_lease_ttl=TTL)
        second = new_host(cluster_lease_ttl=TTL)
        image_id = second.upload(b"content")["id"]
        second.terminate()
        second.settings["cluster_member_id"] = "a"
        second.start(wait=False)
        second.wait_listening()
        wait_for(lambda: "in use" in ready(second).message, 10, "it says why it waits")
        assert ready(second).status == 503
        assert f"member id a is in use at http://127.0.0.1:{first.port}" in ready(second).message
        assert second.put(b"x").status == 503
        assert second.get("/members").status == 503
        assert ready(first).status == 200
        first.kill()
        second.wait_ready()
        assert second.image(image_id)["replicas"] == ["a"]
        assert second.download(image_id).body == b"content"

    @pytest.mark.release
    def test_that_of_a_dead_member(self, new_host: StartService) -> None:
        """Its images are not here: the start is refused, and they stay what they are."""
        first, second = new_host(cluster_member_id="a", cluster_lease_ttl=TTL), new_host()
        image_id = first.upload(b"content")["id"]
        second.upload(b"other")
        first.terminate()
        second.terminate()
        second.settings["cluster_member_id"] = "a"
        assert "the member id a is that of another directory" in second.start_refused()
        del second.settings["cluster_member_id"]
        second.start()
        first.start()
        assert first.image(image_id)["replicas"] == ["a"]
        assert first.download(image_id).body == b"content"

    @pytest.mark.release
    def test_that_of_a_dead_member_in_an_empty_directory(self, new_host: StartService) -> None:
        """As if its file system were not mounted."""
        first = new_host(cluster_member_id="a", cluster_lease_ttl=TTL)
        image_id = first.upload(b"content")["id"]
        first.terminate()
        place = first.settings["image_store_config_dir"]
        first.settings["image_store_config_dir"] = first.data_dir / "empty"
        assert "is its file system mounted" in first.start_refused()
        first.settings["image_store_config_dir"] = place
        first.start()
        assert first.download(image_id).body == b"content"
