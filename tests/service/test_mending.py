"""Bytes that rot at one member while another one has them: what is wrong goes, and what is right comes."""

from __future__ import annotations

import pytest

from imgsvc.cluster.peers import Peers, Signatures
from imgsvc.metadata.mirror import LiveMember
from tests.harness import Service, wait_for
from tests.service.conftest import StartService

SECRET = "known to members"
BODY = bytes(range(256)) * 1000
ROTTEN = b"x" + BODY[1:]
DAMAGE = ("image damaged",)


def replicas(host: Service, image_id: str) -> list[str]:
    found: list[str] = host.image(image_id)["replicas"]
    return found


@pytest.fixture
def hosts(new_host: StartService) -> dict[str, Service]:
    """Two members of one cluster, which do not scrub by themselves."""
    return {name: new_host(cluster_member_id=name, cluster_secret=SECRET, scrub_interval=0) for name in ("a", "b")}


def stored_at_both(hosts: dict[str, Service]) -> str:
    image_id = str(hosts["a"].upload(BODY)["id"])
    ask(hosts["b"]).copy(image_id)
    wait_for(lambda: replicas(hosts["a"], image_id) == ["a", "b"], 5, "both are on record")
    assert image_id in hosts["b"].stored()
    return image_id


class Asked:
    def __init__(self, host: Service) -> None:
        self._member = LiveMember("host", f"http://127.0.0.1:{host.port}")
        self._peers = Peers(Signatures(SECRET, "tester"), 5.0)

    def check(self, image_id: str) -> None:
        self._peers.check(self._member, image_id)

    def copy(self, image_id: str) -> None:
        self._peers.copy(self._member, image_id, within=20)


def ask(host: Service) -> Asked:
    return Asked(host)


def rot(host: Service, image_id: str) -> None:
    (host.images_dir / image_id).write_bytes(ROTTEN)


def aside(host: Service) -> list[bytes]:
    place = host.images_dir / ".quarantine"
    return [path.read_bytes() for path in place.iterdir()] if place.exists() else []


def is_mended(hosts: dict[str, Service], image_id: str) -> bool:
    path = hosts["b"].images_dir / image_id
    return path.exists() and path.read_bytes() == BODY and replicas(hosts["a"], image_id) == ["a", "b"]


def test_a_check_that_finds_rot(hosts: dict[str, Service]) -> None:
    """The bytes are set aside, the copy is no longer on record, and a good one comes from the other member."""
    image_id = stored_at_both(hosts)
    rot(hosts["b"], image_id)
    hosts["b"].expect_errors(*DAMAGE)
    ask(hosts["b"]).check(image_id)
    wait_for(lambda: is_mended(hosts, image_id), 15, "a good copy is there")
    assert aside(hosts["b"]) == [ROTTEN]
    assert hosts["b"].download(image_id).body == BODY


def test_a_check_does_not_take_its_time(new_host: StartService) -> None:
    """Until it is over, clients may get what is wrong: the limit is for copies in the background."""
    host = new_host(cluster_secret=SECRET, cluster_copy_bytes_per_second=1000)
    image_id = str(host.upload(BODY)["id"])
    ask(host).check(image_id)
    wait_for(lambda: host.events("image checked"), 5, "it was read")


def test_a_check_of_a_healthy_copy(hosts: dict[str, Service]) -> None:
    """However often it is ordered: nothing changes."""
    image_id = stored_at_both(hosts)
    before = hosts["a"].image(image_id)
    for _ in range(50):
        ask(hosts["b"]).check(image_id)
    wait_for(lambda: hosts["b"].events("image checked"), 5, "it was read")
    assert [line["found"] for line in hosts["b"].events("image checked")] == ["matches"]
    assert hosts["a"].image(image_id) == before
    assert aside(hosts["b"]) == []


def test_a_check_where_it_is_not(hosts: dict[str, Service]) -> None:
    """Nobody can have an image condemned at a member that does not hold it."""
    image_id = str(hosts["a"].upload(BODY)["id"])
    ask(hosts["b"]).check(image_id)
    assert hosts["b"].image(image_id)["status"] == "complete"
    assert replicas(hosts["b"], image_id) == ["a"]


def test_a_download_of_what_was_cut(hosts: dict[str, Service]) -> None:
    """Whoever meets damage has it looked at: the client gets the image from the other member, and then it is mended."""
    image_id = stored_at_both(hosts)
    (hosts["b"].images_dir / image_id).write_bytes(BODY[:-1])
    hosts["b"].expect_errors("bytes of a complete image have changed", *DAMAGE)
    assert hosts["b"].download(image_id).body == BODY
    wait_for(lambda: is_mended(hosts, image_id), 15, "a good copy is there")
    assert aside(hosts["b"]) == [BODY[:-1]]


def test_the_only_copy_rots(hosts: dict[str, Service]) -> None:
    """It is an error, which says so, and the bytes are kept for a person. Who asks for the image is told the same at any
    member, with the name of the one that lost it, and not that there is no such image."""
    image_id = str(hosts["a"].upload(BODY)["id"])
    rot(hosts["a"], image_id)
    hosts["a"].expect_errors(*DAMAGE)
    ask(hosts["a"]).check(image_id)
    error = hosts["a"].wait_status(image_id, "error")["error"]
    assert "damaged" in error
    assert error.endswith(f"; held by a at http://127.0.0.1:{hosts['a'].port}")
    assert aside(hosts["a"]) == [ROTTEN]
    for host in hosts.values():
        wait_for(lambda host=host: host.image(image_id)["status"] == "error", 5, "it knows")  # type: ignore[misc]
        answer = host.download(image_id)
        assert (answer.status, answer.message) == (503, error)
    failed = hosts["a"].fetch("http://127.0.0.1:1/")["id"]
    hosts["a"].wait_status(failed, "error")
    assert (hosts["a"].download(failed).status, hosts["a"].download(failed).message) == (404, "incomplete image")


def test_the_only_copy_is_removed_by_hand(hosts: dict[str, Service]) -> None:
    """It is said whose it was, before anybody has put it into the record, too."""
    image_id = str(hosts["a"].upload(BODY)["id"])
    (hosts["a"].images_dir / image_id).unlink()
    hosts["a"].expect_errors("bytes of a complete image are missing")
    for host in hosts.values():
        answer = host.download(image_id)
        assert (answer.status, "a at http" in answer.message or "a is on record" in answer.message) == (503, True), (
            answer
        )


def test_the_scrub_finds_it(hosts: dict[str, Service]) -> None:
    """Nobody has to ask: what the pass in the background sets aside is copied again, too."""
    image_id = stored_at_both(hosts)
    rot(hosts["b"], image_id)
    hosts["b"].terminate()
    hosts["b"].settings["scrub_interval"] = 3600
    hosts["b"].expect_errors(*DAMAGE)
    hosts["b"].start()
    wait_for(lambda: is_mended(hosts, image_id), 15, "a good copy is there")
    assert aside(hosts["b"]) == [ROTTEN]


def test_a_copy_on_order(hosts: dict[str, Service]) -> None:
    """It is there when the answer is; asked again, it is there already."""
    image_id = str(hosts["a"].upload(BODY)["id"])
    for _ in range(2):
        ask(hosts["b"]).copy(image_id)
        assert (hosts["b"].images_dir / image_id).read_bytes() == BODY
        assert replicas(hosts["b"], image_id) == ["a", "b"]
