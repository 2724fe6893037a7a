"""The wire contract's table of routes, but for POST: see test_contract_post.py."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.client import Client, Connection
from tests.harness import Service
from tests.service.conftest import Settings, StartService
from tests.source import Resource, Source

CONTENT = b"a guest image, nearly\n"


def test_an_empty_list_is_an_empty_array(start_service: StartService, records: Settings) -> None:
    """GET /images of a service without images is `[]`, as JSON, with a newline."""
    answer = start_service(**records).get("/images")
    assert (answer.status, answer.body) == (200, b"[]\n")
    assert answer.headers["Content-Type"] == "application/json"


def test_the_list_has_every_image_as_get_has_it(service: Service) -> None:
    """Each element of GET /images is, to the byte, what GET /images/{id} says."""
    ids = [service.upload(CONTENT, comment=f"no. {n}")["id"] for n in range(3)]
    answer = service.get("/images")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.body == json.dumps(answer.json(), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    for image_id in ids:
        assert service.get(f"/images/{image_id}").body.rstrip(b"\n") in answer.body


def test_the_list_can_be_filtered_by_type(service: Service) -> None:
    """`type=kvm` and `type=container` leave only those; an empty `type=` leaves everything."""
    kvm = service.upload(CONTENT, "kvm")["id"]
    container = service.upload(CONTENT, "container")["id"]
    found = {query: {image["id"] for image in service.images(query)} for query in ("?type=kvm", "?type=container")}
    assert kvm in found["?type=kvm"]
    assert container in found["?type=container"]
    assert not found["?type=kvm"] & found["?type=container"]
    assert {kvm, container} <= {image["id"] for image in service.images("?type=")}
    assert {image["type"] for image in service.images("?type=kvm")} == {"kvm"}


@pytest.mark.parametrize(
    "query", ["type=other", "type=KVM", "type=123", "type=kvm%20", "type=kvm&type=container", "type=kvm&type=kvm"]
)
def test_a_filter_by_anything_else_is_refused(service: Service, query: str) -> None:
    """A type that is none, or more than one `type`, is 400 `invalid type`."""
    answer = service.get(f"/images?{query}")
    assert (answer.status, answer.message) == (400, "invalid type")


def test_an_upload_answers_with_the_finished_image(service: Service) -> None:
    """PUT answers 200 with an image that is complete, and that is what GET says from then on."""
    answer = service.request("PUT", "/images", CONTENT, {"X-Image-Type": "container", "X-Image-Comment": "mine"})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    image = answer.json()
    expected = {"source": "", "type": "container", "comment": "mine", "status": "complete", "size": len(CONTENT)}
    assert expected.items() <= image.items()
    assert service.get(f"/images/{image['id']}").body == answer.body


@pytest.mark.parametrize("image_type", [None, "", "other", "KVM", "kvm,container", "kvm, kvm", "\xff"])
def test_an_upload_without_a_type_is_refused(service: Service, image_type: str | None) -> None:
    """PUT with no or a bad X-Image-Type is 400 and makes no image."""
    before = len(service.images())
    headers = {} if image_type is None else {"X-Image-Type": image_type}
    answer = service.request("PUT", "/images", CONTENT, headers)
    assert (answer.status, answer.message) == (400, "invalid X-Image-Type header")
    assert len(service.images()) == before


def test_an_upload_is_refused_before_its_body(service: Service) -> None:
    """A bad type is answered while the body has not even begun."""
    with Connection(service.port) as connection:
        connection.begin_upload(100_000_000_000, image_type="no")
        answer = connection.answer()
    assert (answer.status, answer.message) == (400, "invalid X-Image-Type header")


def test_an_operators_curl_uploads(service: Service, tmp_path: Path) -> None:
    """`curl -T file` with the two headers works, comment in UTF-8 included, also for one large enough for curl to
    ask with Expect: 100-continue."""
    file = tmp_path / "guest.img"
    file.write_bytes(os.urandom(3 << 20))
    command = ["curl", "-sS", "-T", str(file), "-H", "X-Image-Type: kvm", "-H", "X-Image-Comment: für Gäste, 客人"]
    curl = subprocess.run([*command, f"{service.url}/images"], check=True, capture_output=True, timeout=30)
    image = json.loads(curl.stdout)
    assert (image["status"], image["comment"]) == ("complete", "für Gäste, 客人")
    assert service.download(image["id"]).body == file.read_bytes()


def test_an_image_can_be_read(service: Service) -> None:
    """GET /images/{id} is 200 with the image."""
    image = service.upload(CONTENT)
    answer = service.get(f"/images/{image['id']}")
    assert (answer.status, answer.json()) == (200, image)
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("name", [str(uuid.UUID(int=7)), "nonsense", "..", "%2e%2e%2fetc%2fpasswd", "%00", "a" * 5000])
@pytest.mark.parametrize("request_line", ["GET /images/{}", "DELETE /images/{}", "GET /images/{}/download"])
def test_what_is_no_image_is_not_found(service: Service, name: str, request_line: str) -> None:
    """An id that no image has, or that could be none, is 404 `image not found`, whatever is asked of it."""
    method, path = request_line.split(" ")
    answer = service.request(method, path.format(name))
    assert (answer.status, answer.message) == (404, "image not found")


def test_an_id_is_only_good_as_it_was_given(service: Service) -> None:
    """The upper-case form of an id names nothing."""
    image = service.upload(CONTENT)
    assert service.get(f"/images/{image['id'].upper()}").status == 404


def test_delete_answers_with_the_image_and_it_is_gone(service: Service) -> None:
    """DELETE is 200 with the image as it was; everything after it is 404, and the bytes are gone."""
    image = service.upload(CONTENT)
    assert image["id"] in service.stored()
    answer = service.delete(image["id"])
    assert (answer.status, answer.json()) == (200, image)
    assert answer.headers["Content-Type"] == "application/json"
    again = service.delete(image["id"])
    assert (again.status, again.message) == (404, "image not found")
    assert service.get(f"/images/{image['id']}").status == 404
    assert service.download(image["id"]).message == "image not found"
    assert image["id"] not in {other["id"] for other in service.images()}
    assert image["id"] not in service.stored()


def test_a_download_is_the_bytes(service: Service) -> None:
    """GET /images/{id}/download is 200 with type, length and the bytes."""
    content = os.urandom((2 << 20) + 1)
    answer = service.download(service.upload(content)["id"])
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Length"] == str(len(content))
    assert answer.body == content


def test_an_incomplete_image_has_no_download(service: Service, source: Source) -> None:
    """Before the first byte, in mid-transfer and after a failure a download is 404 `incomplete image`."""
    image = service.fetch(source.serve("/silent", Resource(hold=True)))
    source.wait_asked("/silent")
    pending = service.download(image["id"])
    failed = service.fetch(source.serve("/half", Resource(b"x" * 1000, stall_after=500)))
    service.wait_status(failed["id"], "downloading")
    downloading = service.download(failed["id"])
    source.close()
    service.wait_status(failed["id"], "error")
    errored = service.download(failed["id"])
    for answer in (pending, downloading, errored):
        assert (answer.status, answer.message) == (404, "incomplete image")


def test_head_works_wherever_get_does(service: Service) -> None:
    """HEAD has the status and headers of GET, and no body."""
    image = service.upload(CONTENT)
    paths = ["/images", "/images?type=kvm", f"/images/{image['id']}", f"/images/{image['id']}/download"]
    for path in [*paths, "/healthz", "/readyz", "/images?type=other", f"/images/{uuid.uuid4()}", "/nowhere"]:
        get, head = service.get(path), service.request("HEAD", path)
        assert (head.status, head.body) == (get.status, b""), path
        assert head.headers["Content-Type"] == get.headers["Content-Type"], path
    answer = service.request("HEAD", f"/images/{image['id']}/download")
    assert answer.headers["Content-Length"] == str(len(CONTENT))


def test_nothing_follows_the_answer_to_head(service: Service) -> None:
    """A second request on the connection of a HEAD gets its own answer next."""
    image = service.upload(CONTENT)
    with Connection(service.port) as connection:
        connection.send(f"HEAD /images/{image['id']}/download HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.send(f"GET /images/{image['id']} HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.answer("HEAD").status == 200
        assert connection.answer().json() == image


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/images", {"GET", "HEAD", "POST", "PUT"}),
        ("/images/{}", {"GET", "HEAD", "DELETE"}),
        ("/images/{}/download", {"GET", "HEAD"}),
        ("/healthz", {"GET", "HEAD"}),
        ("/readyz", {"GET", "HEAD"}),
    ],
)
def test_another_method_is_told_which_are_allowed(service: Service, path: str, allowed: set[str]) -> None:
    """A method that the path does not have is 405 with `Allow`, one that HTTP does not know too."""
    for method in {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"} - allowed:
        answer = service.request(method, path.format(uuid.uuid4()), b"" if method in ("POST", "PUT", "PATCH") else None)
        assert answer.status == 405, method
        assert {name.strip() for name in answer.headers["Allow"].split(",")} == allowed
        assert answer.json()["code"] == 405


@pytest.mark.parametrize("path", ["/", "/nowhere", "/image", "/images/a/b", "/images/a/download/c", "/imagesque", "*"])
def test_an_unknown_path_is_not_found(service: Service, path: str) -> None:
    """A path that the table does not have is 404, for every method."""
    for method in ("GET", "PUT", "POST", "DELETE"):
        answer = service.request(method, path, b"" if method in ("PUT", "POST") else None)
        assert (answer.status, answer.json()["code"]) == (404, 404)


def test_a_trailing_slash_is_the_same_resource(service: Service, source: Source) -> None:
    """With a slash at the end each request does what it does without, and no body is lost to a redirect."""
    put = service.request("PUT", "/images/", CONTENT, {"X-Image-Type": "kvm"})
    assert (put.status, put.json()["size"]) == (200, len(CONTENT))
    image_id = put.json()["id"]
    post = service.request(
        "POST", "/images/", json.dumps({"source": source.serve("/x", CONTENT), "type": "kvm"}).encode()
    )
    assert post.status == 202
    service.wait_status(post.json()["id"], "complete")
    assert {image_id, post.json()["id"]} <= {image["id"] for image in service.get("/images/").json()}
    assert {image["type"] for image in service.get("/images/?type=kvm").json()} == {"kvm"}
    assert service.get(f"/images/{image_id}/").json() == put.json()
    assert service.get(f"/images/{image_id}/download/").body == CONTENT
    assert service.request("PATCH", "/images/", b"").status == 405
    assert service.request("DELETE", f"/images/{image_id}/").json() == put.json()


def test_the_agents_way(service: Service, source: Source, tmp_path: Path) -> None:
    """What the agent on a hypervisor does: any answer but 200 is failure, the body goes to a file."""
    image = service.fetch(source.serve("/guest.zfs.gz", os.urandom(300_000)))
    service.wait_status(image["id"], "complete")
    file = tmp_path / "guest"
    command = ["curl", "-sSf", "-o", str(file), f"{service.url}/images/{image['id']}/download"]
    subprocess.run(command, check=True, timeout=30)
    assert file.read_bytes() == Client(service.port).download(image["id"]).body
    assert len(file.read_bytes()) == 300_000
