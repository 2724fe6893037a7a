"""What many slow clients, and busy disks, do to the service."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tests.bench.programs import asked, children, said
from tests.bench.row import Figures, Goal, Row
from tests.bench.stage import MIB, Stage, fill, warm
from tests.bench.transfers import fetched, uploaded

_CLIENTS = 64
_UPLOAD_MIB = 64
# Bytes a second of each slow client, as curl spells it: all uploads together write 256 MiB a second.
_DOWNLOAD_RATE = "1M"
_UPLOAD_RATE = "4M"
_DOWNLOAD_SECONDS = 10.0
_PROBE_SECONDS = 10.0
_PROBE_RATE = 100.0


class Memory(Row):
    """The highest resident memory of a fresh service."""

    name = "memory"
    programs = ("curl",)
    goals = (
        Goal("memory, 64 slow downloads", "memory, downloads", "", 300, 120, unit="MiB"),
        Goal("memory, 64 slow uploads", "memory, uploads", "", 400, 150, unit="MiB"),
    )
    rounds = 3

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._file = stage.directory / "small"
        fill(self._file, _UPLOAD_MIB * MIB)

    def measure(self) -> Figures:
        return {
            "memory, idle": self._peak(lambda url, image: None),
            "memory, downloads": self._peak(self._download),
            "memory, uploads": self._peak(self._upload),
        }

    def _peak(self, use: Callable[[str, str], None]) -> float:
        """MiB, of a service with a URL and an image that is used like this."""
        with self.stage.fresh_service() as service:
            with self._file.open("rb") as file:
                image = service.upload(file)
            use(service.url, f"{service.url}/images/{image['id']}/download")
            return service.memory("VmHWM") / MIB

    def _download(self, _url: str, image: str) -> None:
        command = ["curl", "-sS", "--limit-rate", _DOWNLOAD_RATE, "-o", "/dev/null", image]
        with children(*[command] * _CLIENTS) as running:
            time.sleep(_DOWNLOAD_SECONDS)
            assert all(client.poll() is None for client in running), "a download ended early"

    def _upload(self, url: str, _image: str) -> None:
        limit = ["curl", "-sSf", "--limit-rate", _UPLOAD_RATE, "-o", "/dev/null"]
        command = [*limit, "-T", str(self._file), "-H", "X-Image-Type: kvm", f"{url}/images"]
        with children(*[command] * _CLIENTS) as running:
            for client in running:
                assert client.wait() == 0, subprocess.list2cmdline(command)


class Busy(Row):
    """Latency of a small request beside one upload and one fetch that run flat out."""

    name = "busy"
    programs = ("curl", "nginx")
    goals = (Goal("GET /images/{id} beside an upload and a fetch, p99", "busy, p99", "", 20, 20, unit="ms"),)

    def measure(self) -> Figures:
        service = self.stage.service
        probe = asked("prober", f"{service.url}/images/{self.stage.uploaded}", _PROBE_SECONDS, _PROBE_RATE)
        with children(probe) as (prober,):
            idle = said(prober)
        warm()
        with ExitStack() as load:
            uploads = load.enter_context(_again_and_again(self._upload))
            fetches = load.enter_context(_again_and_again(self._fetch))
            (prober,) = load.enter_context(children(probe))
            busy = said(prober)
        return {
            "busy, p50": busy["p50"],
            "busy, p99": busy["p99"],
            "busy, longest": busy["max"],
            "busy, p99 when idle": idle["p99"],
            "busy, transfers meanwhile": len(uploads) + len(fetches),
        }

    def _upload(self, _number: int) -> None:
        uploaded(self.stage)

    def _fetch(self, number: int) -> None:
        fetched(self.stage.service, f"{self.stage.source_url()}?busy={self.stage.round}-{number}", poll=0.2)


@contextmanager
def _again_and_again(work: Callable[[int], None]) -> Iterator[list[float]]:
    """Does it in a thread until the end of the context; the list tells when it was done."""
    over = threading.Event()
    done: list[float] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            while not over.is_set():
                work(len(done))
                done.append(time.monotonic())
        except Exception as error:  # noqa: BLE001 - raised below
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]
