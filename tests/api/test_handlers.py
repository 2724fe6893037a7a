"""Handlers over a real context: what each error is answered with, and what every answer has."""

from __future__ import annotations

import inspect
import json
import re
from http import HTTPStatus
from typing import Any

import pytest
from structlog.testing import capture_logs
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders
from tornado.web import Application, HTTPError

from imgsvc import errors
from imgsvc.api.app import register_image_routes
from imgsvc.api.errors import message_of, status_of
from imgsvc.metadata.image import Image, ImageType
from tests.api.conftest import Service
from tests.flaky import LOST, Fault

IMAGE = Image(id="0b53a0a6-6c41-4f43-9d2c-6c0d2b2f9a11", type=ImageType.KVM)

# Each class of errors.py, as a client meets it. Those of 500 never come so far: one stops the start, the other is only
# ever in an image's record.
STATUS: dict[errors.ImgsvcError, int] = {
    errors.ImgsvcError("a sentence"): 500,
    errors.ConfigError("a sentence"): 500,
    errors.Invalid("a sentence"): 400,
    errors.TooLarge("a sentence"): 413,
    errors.NotFound("a sentence"): 404,
    errors.Gone("a sentence"): 410,
    errors.NotComplete("a sentence"): 404,
    errors.Conflict("a sentence"): 409,
    errors.SourceTaken(IMAGE): 409,
    errors.NoSpace("a sentence"): 507,
    errors.Unavailable("a sentence"): 503,
    errors.Elsewhere("a sentence"): 503,
    errors.PeerFailed("a sentence"): 503,
    errors.Unreadable("a sentence"): 503,
    errors.Incomplete("a sentence"): 400,
    errors.IdleTimeout("a sentence"): 408,
    errors.WrongDigest("a sentence"): 422,
    errors.WrongChecksum("a sentence"): 460,
    errors.Forbidden("a sentence"): 403,
    errors.Locked("a sentence"): 423,
    errors.Forbidden("a sentence"): 403,
    errors.FetchFailed("a sentence"): 500,
    errors.Interrupted("a sentence"): 500,
    errors.Stopping("a sentence"): 503,
}

ROUTES = {
    "/images": "GET, HEAD, PUT, POST",
    f"/images/{IMAGE.id}": "GET, HEAD, DELETE",
    f"/images/{IMAGE.id}/download": "GET, HEAD",
    "/uploads": "POST, OPTIONS",
    f"/uploads/{IMAGE.id}": "HEAD, PATCH, DELETE, OPTIONS",
    "/healthz": "GET, HEAD",
    "/members": "GET, HEAD",
    "/readyz": "GET, HEAD",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")


class Asking:
    """Any method, with or without a body; an error is an answer like any other."""

    def __init__(self, client: AsyncHTTPClient, base_url: str) -> None:
        self._client = client
        self._base_url = base_url

    async def __call__(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> HTTPResponse:
        return await self._client.fetch(
            self._base_url + path,
            method=method,
            body=body,
            headers=HTTPHeaders(headers or {}),
            raise_error=False,
            allow_nonstandard_methods=True,
            follow_redirects=False,
        )


@pytest.fixture
def ask(http_client: AsyncHTTPClient, base_url: str) -> Asking:
    return Asking(http_client, base_url)


def document(answer: HTTPResponse) -> dict[str, Any]:
    """An error, which has the same shape from every route."""
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.body.endswith(b"\n")
    assert int(answer.headers["Content-Length"]) == len(answer.body)
    error: dict[str, Any] = json.loads(answer.body)
    assert list(error) == ["message", "code", "stack"]
    assert error["code"] == answer.code
    return error


class TestErrorTable:
    def test_every_class_has_a_status(self) -> None:
        """One that is added and not thought of here is a failure."""
        classes = {
            kind
            for _, kind in inspect.getmembers(errors, inspect.isclass)
            if issubclass(kind, errors.ImgsvcError) and kind.__module__ == errors.__name__
        }
        assert {type(error) for error in STATUS} == classes

    @pytest.mark.parametrize("error", STATUS, ids=lambda error: type(error).__name__)
    @pytest.mark.gen_test
    async def test_each_is_answered(self, service: Service, ask: Asking, error: errors.ImgsvcError) -> None:
        """With its status and its own sentence, or with the words that clients know by heart."""
        by_heart: dict[type[errors.ImgsvcError], str] = {
            errors.NotFound: "image not found",
            errors.NotComplete: "incomplete image",
        }
        service.faults.always("look", fault=Fault(error))
        answer = await ask("GET", f"/images/{IMAGE.id}")
        assert answer.code == STATUS[error]
        assert document(answer)["message"] == by_heart.get(type(error), str(error))
        assert document(answer)["stack"] == []

    @pytest.mark.gen_test
    async def test_a_mistake_of_ours(self, service: Service, ask: Asking) -> None:
        """It tells a client nothing, and the log all."""
        service.faults.always("look", fault=Fault(ZeroDivisionError("/a/path")))
        with capture_logs() as logs:
            answer = await ask("GET", f"/images/{IMAGE.id}")
        assert answer.code == 500
        assert document(answer) == {"message": "internal error", "code": 500, "stack": []}
        [line] = [line for line in logs if line["log_level"] == "error"]
        assert isinstance(line["exc_info"], ZeroDivisionError)

    @pytest.mark.gen_test
    async def test_a_mistake_of_a_client(self, service: Service, ask: Asking) -> None:
        """It leaves no traceback."""
        with capture_logs() as logs:
            await ask("GET", f"/images/{IMAGE.id}")
            await ask("POST", "/images", b"no JSON")
        assert {line["log_level"] for line in logs} == {"info"}

    def test_what_tornado_raises(self) -> None:
        """Its errors keep their status, and have words."""
        assert status_of(HTTPError(405)) == HTTPStatus.METHOD_NOT_ALLOWED
        assert message_of(HTTPError(405)) == "method not allowed"
        assert message_of(HTTPError(400, "in its own words")) == "in its own words"


class TestExposedStack:
    @pytest.fixture
    def environ(self) -> dict[str, str]:
        return {"IMGSVC_EXPOSE_STACK": "true"}

    @pytest.mark.gen_test
    async def test_it_shows_where(self, service: Service, ask: Asking) -> None:
        """To operators who ask for it."""
        service.faults.always("look", fault=Fault(ZeroDivisionError("a mistake of ours")))
        stack = document(await ask("GET", f"/images/{IMAGE.id}"))["stack"]
        assert any("service.py" in line for line in stack)
        assert stack[-1] == "ZeroDivisionError: a mistake of ours"


class TestMethods:
    @pytest.mark.parametrize("slash", ["", "/"])
    @pytest.mark.parametrize(("path", "allowed"), ROUTES.items())
    @pytest.mark.gen_test
    async def test_others_than_allowed(self, ask: Asking, path: str, allowed: str, slash: str) -> None:
        """They are 405, and `Allow` says which would do."""
        for method in METHODS:
            if method not in allowed.split(", "):
                answer = await ask(method, path + slash, b"{}" if method in ("POST", "PUT", "PATCH") else None)
                assert (answer.code, answer.headers["Allow"]) == (405, allowed)
                assert method == "HEAD" or document(answer)["message"] == "method not allowed"

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("path", ["/", "/image", "/imagesx", f"/images/{IMAGE.id}/x", "/images//download", "//"])
    @pytest.mark.gen_test
    async def test_unknown_paths(self, ask: Asking, path: str, method: str) -> None:
        """They are 404 whatever the method."""
        answer = await ask(method, path)
        assert answer.code == 404
        assert "Allow" not in answer.headers

    @pytest.mark.gen_test
    async def test_head(self, service: Service, ask: Asking) -> None:
        """HEAD is GET without the body, errors included."""
        image = service.complete()
        for path in ("/images", f"/images/{image.id}", f"/images/{image.id}/download", "/healthz", "/images/x"):
            get, head = await ask("GET", path), await ask("HEAD", path)
            assert (head.code, head.body) == (get.code, b"")
            for name in ("Content-Type", "Content-Length"):
                assert head.headers.get(name) == get.headers.get(name)


class TestRequestId:
    @pytest.mark.parametrize(
        "given", ["a", "0b53-7", "host.example:4711/", "x" * 64, "x" * 65, "", "a b", "a;b", "\xe9"]
    )
    @pytest.mark.gen_test
    async def test_given(self, ask: Asking, given: str) -> None:
        """One that is sane is taken; for another there is one of ours."""
        sane = re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", given) is not None
        with capture_logs() as logs:
            answer = await ask("GET", "/images/x", headers={"X-Request-Id": given})
        echoed = answer.headers["X-Request-Id"]
        assert (echoed == given) == sane
        assert sane or re.fullmatch(r"[0-9a-f]{32}", echoed)
        assert [line["request"] for line in logs if line["event"] == "request"] == [echoed]

    @pytest.mark.gen_test
    async def test_none_given(self, ask: Asking) -> None:
        """Each request has one of its own."""
        ids = {(await ask("GET", path)).headers["X-Request-Id"] for path in ("/healthz", "/healthz", "/nowhere")}
        assert len(ids) == 3


class TestReadiness:
    @pytest.mark.gen_test
    async def test_not_ready(self, service: Service, ask: Asking) -> None:
        """Before the start is done, and when it ends: images are 503 with the reason, and the process lives."""
        service.context.not_ready = "the service is starting: no disk"
        for method, path in (
            ("GET", "/images"),
            ("PUT", "/images"),
            ("DELETE", f"/images/{IMAGE.id}"),
            ("GET", "/readyz"),
        ):
            answer = await ask(method, path, b"body" if method == "PUT" else None)
            assert (answer.code, document(answer)["message"]) == (503, "the service is starting: no disk")
        assert (await ask("GET", "/healthz")).code == 200
        assert service.listed() == []

    @pytest.mark.parametrize("store", ["image store", "metadata store"])
    @pytest.mark.gen_test
    async def test_a_store_that_fails(self, service: Service, ask: Asking, store: str) -> None:
        """It is named, with its reason."""
        assert (await ask("GET", "/readyz")).code == 200
        skipped = iter([None] if store == "metadata store" else [])
        service.faults.plan = lambda _number, call: LOST if call == "ping" and next(skipped, LOST) else None
        answer = await ask("GET", "/readyz")
        assert (answer.code, document(answer)["message"]) == (503, f"{store}: {LOST.error}")
        assert (await ask("GET", "/healthz")).code == 200


class TestPrefix:
    @pytest.fixture
    def app(self, service: Service) -> Application:
        """The image routes in somebody else's application."""
        return Application(register_image_routes("/v2/guest-images", service.context, service.in_flight))

    @pytest.mark.gen_test
    async def test_the_routes_are_below_it(self, service: Service, ask: Asking) -> None:
        """All of them, and nothing is where it usually is."""
        kvm = {"X-Image-Type": "kvm"}
        image = json.loads((await ask("PUT", "/v2/guest-images", b"bytes", kvm)).body)
        assert json.loads((await ask("GET", "/v2/guest-images/")).body) == [image]
        assert (await ask("GET", f"/v2/guest-images/{image['id']}/download")).body == b"bytes"
        assert (await ask("DELETE", f"/v2/guest-images/{image['id']}")).code == 200
        assert service.listed() == []
        assert (await ask("GET", "/images")).code == 404


@pytest.mark.gen_test
async def test_one_line_a_request(http_server: HTTPServer, service: Service, ask: Asking) -> None:
    """The log has what happened, whatever the answer."""
    with capture_logs() as logs:
        for method, path, body in (("PUT", "/images", b"12345"), ("GET", "/nowhere", None), ("HEAD", "/healthz", None)):
            await ask(method, path, body, {"X-Image-Type": "kvm"})
    lines = [line for line in logs if line["event"] == "request"]
    fields = [(line["method"], line["path"], line["status"], line["bytes_in"]) for line in lines]
    assert fields == [("PUT", "/images", 200, 5), ("GET", "/nowhere", 404, 0), ("HEAD", "/healthz", 200, 0)]
    assert all(line["remote"] == "127.0.0.1" and 0 < line["duration"] < 5 and line["bytes"] >= 0 for line in lines)
