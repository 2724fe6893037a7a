"""What tests of a running service do with one."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.client import Answer, Connection
from tests.harness import Service, wait_for


def begin_upload(service: Service, connection: Connection, length: int | None, sent: bytes) -> str:
    """Begins an upload on the connection, sends some of it, and returns the id once it has its record.

    It is a container, for the hundreds of other images here are not, and the list is asked for again and again.
    """
    mark = str(uuid.uuid4())
    connection.begin_upload(length, f"X-Image-Comment: {mark}", image_type="container")
    connection.send(sent)

    def found() -> list[str]:
        return [image["id"] for image in service.images("?type=container") if image["comment"] == mark]

    wait_for(found, 5, "the upload has its record")
    return found()[0]


def assert_is_error(answer: Answer, status: int) -> dict[str, Any]:
    """An error in its wire form, without a stack; returns it."""
    assert answer.status == status, answer
    assert answer.headers["Content-Type"] == "application/json"
    error: dict[str, Any] = answer.json()
    assert list(error) == ["message", "code", "stack"]
    assert answer.body == json.dumps(error, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    assert (error["code"], error["stack"]) == (status, [])
    assert isinstance(error["message"], str)
    assert error["message"].strip()
    return error


def marked(service: Service, mark: str) -> list[str]:
    """The states of the images that have this comment."""
    return [image["status"] for image in service.images() if image["comment"] == mark]


def assert_gone(service: Service, image_id: str) -> None:
    """No record, no bytes."""
    for answer in (service.get(f"/images/{image_id}"), service.download(image_id), service.delete(image_id)):
        assert (answer.status, answer.message) == (404, "image not found")
    assert image_id not in {image["id"] for image in service.images()}
    assert image_id not in service.stored()
    wait_for(lambda: image_id not in service.incoming(), 2, "nothing of it in .incoming")


def post_at_once(services: list[Service], url: str) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(lambda n: services[n % len(services)].fetch(url), range(32)))
