"""Images on their way in and out: upload, fetch, fetch from a slow source, download."""

from __future__ import annotations

import json
import subprocess
import time
from datetime import datetime
from pathlib import Path

from tests.bench.programs import children, cpu_seconds, helper, timed
from tests.bench.row import Figures, Goal, Row
from tests.bench.stage import Stage, fill, warm
from tests.harness import Service

_POLL_SECONDS = 0.01
_FETCH_SECONDS = 600.0
_CLIENTS = 8
_GIB = 1 << 30
# Bytes a second of the slow source.
RATE = 20 << 20

_UPLOAD_REFERENCE = "set -o pipefail; curl -sS {url} | tee {file} | openssl dgst -sha256; sync -d {file}"
_FETCH_REFERENCE = "set -e; curl -sS -o {file} {url}; sync -d {file}"


class Upload(Row):
    name = "put"
    programs = ("curl", "nginx", "openssl", "tee", "bash", "sync")
    goals = (Goal("PUT, with sha256 and fsync", "put", "put, reference", 0.60, 0.40),)

    def measure(self) -> Figures:
        figures: Figures = {}
        service, url = self.stage.service, self.stage.source_url()

        def ours() -> None:
            warm()
            before = cpu_seconds(service.pid)
            figures["put"] = uploaded(self.stage)
            figures["put, CPU of the service"] = cpu_seconds(service.pid) - before

        def reference() -> None:
            figures["put, reference"] = _shell(_UPLOAD_REFERENCE, url, self.stage.directory / "f")

        self.stage.in_turn(ours, reference)
        return figures


class Fetch(Row):
    name = "fetch"
    programs = ("curl", "nginx", "bash", "sync")
    goals = (Goal("fetch from nginx, with sha256 and fsync", "fetch", "fetch, reference", 1.00, 0.75),)

    def measure(self) -> Figures:
        figures: Figures = {}
        service, url = self.stage.service, self.stage.source_url()

        def ours() -> None:
            warm()
            before = cpu_seconds(service.pid)
            figures["fetch"], figures["fetch, by its record"] = fetched(service, f"{url}?round={self.stage.round}")
            figures["fetch, CPU of the service"] = cpu_seconds(service.pid) - before

        def reference() -> None:
            figures["fetch, reference"] = _shell(_FETCH_REFERENCE, url, self.stage.directory / "f")

        self.stage.in_turn(ours, reference)
        return figures


class Limited(Row):
    """The source gives each connection its bytes at a steady rate, however many requests it makes: nginx's limit_rate
    would grant every request a burst, and so flatter whoever makes many."""

    name = "limited"
    programs = ("curl",)
    goals = (Goal("fetch from a source of 20 MiB/s a connection", "limited", "limited, reference", 0.35, 0.26),)
    rounds = 3

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        path = stage.directory / "limited"
        fill(path, stage.sizes.limited)
        self._url = stage.running.enter_context(helper("limited_source", path, RATE))

    def measure(self) -> Figures:
        figures: Figures = {}

        def ours() -> None:
            warm()
            source = f"{self._url}?round={self.stage.round}"
            figures["limited"], figures["limited, by its record"] = fetched(self.stage.service, source)

        def reference() -> None:
            warm()
            file = self.stage.directory / "f"
            figures["limited, reference"] = timed("curl", "-sSf", "-o", file, self._url)[0]
            file.unlink()

        self.stage.in_turn(ours, reference)
        return figures


class Download(Row):
    name = "download"
    programs = ("curl", "nginx")
    goals = (
        Goal("download, one client", "download", "download: nginx", 0.80, 0.50),
        Goal("download, eight at once", "downloads of 8", "downloads of 8: nginx", 1.25, 1.00),
        Goal("download, CPU seconds a GiB", "download, CPU a GiB", "download, CPU a GiB: nginx", 3.0, 1.5),
    )

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        service = stage.service
        self._ours = f"{service.url}/images/{stage.uploaded}/download"
        self._sides = ("", self._ours, service.pid), (": nginx", stage.source_url(), stage.nginx.pid)
        for _, url, _ in self._sides:  # so that both files are in the page cache
            _download(url, 1)

    def measure(self) -> Figures:
        figures: Figures = {}

        def side(name: str, url: str, pid: int) -> None:
            before = cpu_seconds(pid)
            figures[f"download{name}"] = _download(url, 1)
            figures[f"downloads of 8{name}"] = _download(url, _CLIENTS)
            moved = (1 + _CLIENTS) * self.stage.sizes.image / _GIB
            figures[f"download, CPU a GiB{name}"] = (cpu_seconds(pid) - before) / moved

        ours, nginx = self._sides
        self.stage.in_turn(lambda: side(*ours), lambda: side(*nginx))
        return figures


def uploaded(stage: Stage) -> float:
    """Seconds from the start of curl until it has the answer. The image is deleted again."""
    url = f"{stage.service.url}/images"
    seconds, answer = timed("curl", "-sSf", "-T", stage.source, "-H", "X-Image-Type: kvm", url)
    image = json.loads(answer)
    assert (image["status"], image["size"]) == ("complete", stage.sizes.image), image
    stage.service.delete(image["id"])
    return seconds


def fetched(service: Service, source: str, poll: float = _POLL_SECONDS) -> tuple[float, float]:
    """Seconds from the POST until a client sees `complete`, and from the record's start to its end. The image is
    deleted again."""
    began = time.monotonic()
    image = service.fetch(source)
    while (image := service.image(image["id"]))["status"] in ("pending", "downloading"):
        assert time.monotonic() - began < _FETCH_SECONDS, image
        time.sleep(poll)
    seconds = time.monotonic() - began
    assert image["status"] == "complete", image
    service.delete(image["id"])
    start, end = (datetime.fromisoformat(image[f"download_{key}"]) for key in ("start", "end"))
    return seconds, (end - start).total_seconds()


def _shell(script: str, url: str, file: Path) -> float:
    """Seconds of a script that writes a file, which is removed again."""
    warm()
    seconds, _ = timed("bash", "-c", script.format(url=url, file=file))
    file.unlink()
    return seconds


def _download(url: str, clients: int) -> float:
    """Seconds until all of so many clients have it."""
    command = ["curl", "-sSf", "-o", "/dev/null", url]
    began = time.monotonic()
    with children(*[command] * clients) as running:
        for client in running:
            assert client.wait() == 0, subprocess.list2cmdline(command)
        return time.monotonic() - began
