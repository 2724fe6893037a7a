"""Requests that move no images: one record, all of them, a source that is known."""

from __future__ import annotations

import gc
import hashlib
import http.client
import json
import re
import sqlite3
import statistics
import time
from contextlib import closing

from imgsvc.metadata.image import Image, ImageType, new_id
from imgsvc.metadata.sqlite import SqliteMetadataStore, insert_record
from imgsvc.metadata.store import Member
from tests.bench.programs import helper, timed
from tests.bench.row import Figures, Goal, Row
from tests.bench.stage import Stage
from tests.harness import Service

_WRK_SECONDS = 10
_CONNECTIONS = 16
_MANY = 5_000
_FEW = 100
_LISTS = 7
_POSTS = 200
_BYTES = b"the bytes of a small image"


class Get(Row):
    name = "get"
    programs = ("wrk",)
    goals = (Goal("GET /images/{id}", "get", "get, reference", 0.50, 0.80, unit="/s", more_is_better=True),)

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._path = f"/images/{stage.service.upload(_BYTES)['id']}"
        self._reference = stage.running.enter_context(helper("fixed_handler"))

    def measure(self) -> Figures:
        figures: Figures = {}

        def ours() -> None:
            service = self.stage.service
            figures["get"] = rate_of(service.url + self._path)
            service.forget_log()

        def reference() -> None:
            figures["get, reference"] = rate_of(self._reference)

        self.stage.in_turn(ours, reference)
        return figures


class List(Row):
    name = "list"
    goals = (Goal("GET /images with 5,000 images", "list", "list, reference", 2.0, 0.7),)

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._service = filled(stage, _MANY)

    def measure(self) -> Figures:
        """Each figure is a median already, for one list is over so soon that anything disturbs it."""
        ours: list[float] = []
        reference: list[float] = []
        with closing(connection_to(self._service)) as connection:
            for _ in range(_LISTS):
                gc.collect()  # so that it does not come due while we look at the clock
                seconds, body = asked_for(connection, "GET", "/images")
                ours.append(seconds)
                began = time.monotonic()
                images = json.loads(body)
                reference.append(time.monotonic() - began)
                assert len(images) == _MANY
        return {"list": statistics.median(ours), "list, reference": statistics.median(reference)}


class Known(Row):
    name = "known"
    goals = (Goal("POST of a known source, 5,000 images against 100", "known", "known, reference", 2.0, 1.0),)

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._many, self._few = filled(stage, _MANY), filled(stage, _FEW)

    def measure(self) -> Figures:
        with closing(connection_to(self._many)) as many, closing(connection_to(self._few)) as few:
            pairs = [(_posted(many, number), _posted(few, number)) for number in range(_POSTS)]
        ours, reference = map(statistics.median, zip(*pairs, strict=True))
        return {"known": ours, "known, reference": reference}


def filled(stage: Stage, count: int) -> Service:
    """A service that holds as many images, each with a source and a few bytes."""
    name = f"data-{count}"
    if name not in stage.filled:
        directory = stage.directory / name
        images = directory / "images"
        images.mkdir(parents=True)
        digest = hashlib.sha256(_BYTES).hexdigest()
        filename = directory / "imgsvc.db"
        SqliteMetadataStore(filename, Member("", "", "")).close()
        with closing(sqlite3.connect(filename)) as connection, connection:
            for number in range(count):
                image = Image(new_id(), ImageType.KVM, _source(number), comment=f"image {number} of a benchmark")
                image = image.started(len(_BYTES)).completed(len(_BYTES), digest).at_revision(1)
                insert_record(connection, image, claimed_source=image.source)
                (images / image.id).write_bytes(_BYTES)
        stage.filled[name] = stage.start_service(name)
    return stage.filled[name]


def _source(number: int) -> str:
    return f"http://mirror.example.com/images/debian-12-generic-amd64-{number}.img"


def rate_of(url: str) -> float:
    """Requests a second. One thread is enough to ask, and leaves a core to who answers."""
    report = timed("wrk", "-t1", f"-c{_CONNECTIONS}", f"-d{_WRK_SECONDS}s", url)[1]
    assert "Non-2xx" not in report, report
    assert "Socket errors" not in report, report
    found = re.search(r"Requests/sec:\s+([\d.]+)", report)
    assert found is not None, report
    return float(found[1])


def connection_to(service: Service) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)


def asked_for(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
) -> tuple[float, bytes]:
    """Seconds until the answer is there, and the answer."""
    began = time.monotonic()
    connection.request(method, path, body)
    answer = connection.getresponse()
    content = answer.read()
    seconds = time.monotonic() - began
    assert answer.status < 300, content
    return seconds, content


def _posted(connection: http.client.HTTPConnection, number: int) -> float:
    document = {"source": _source(number % _FEW), "type": "kvm", "comment": ""}
    return asked_for(connection, "POST", "/images", json.dumps(document).encode())[0]
