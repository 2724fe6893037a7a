"""A member of a cluster with very many images: its start, its memory, its lists, and how soon it sees what others do."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing

from tests.bench.cluster import database_bytes, fill, member, stand_in
from tests.bench.programs import asked, children, cpu_seconds, said
from tests.bench.records import asked_for, connection_to, rate_of
from tests.bench.row import Figures, Goal, Row
from tests.bench.stage import MIB, Stage
from tests.harness import Service, wait_for

_PREFIX = "/bench-records"
_START_SECONDS = 300.0
_LISTS = 3
_WRITES = 1_000
_WRITES_A_SECOND = 50.0
_SEEN_SECONDS = 30.0


class Records(Row):
    """Two members that hold a third of the images each, and a third one of which there are only the records."""

    name = "records"
    programs = ("etcd", "wrk")
    goals = (
        Goal("PUT until another member sees it, 50/s, p99", "records, seen, p99", "", 100, 100, unit="ms"),
        Goal(
            "its answer until another member sees it, p99", "records, seen since answer, p99", "", 100, 100, unit="ms"
        ),
    )
    rounds = 2

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._count = stage.sizes.records
        self._writer, self._seer, other = (member(stage, _PREFIX, f"records-{name}") for name in "abc")
        self._seer.command[1:3] = ["-m", "tests.bench.telling_member"]
        for each in (self._writer, self._seer):  # so that their directories have markers, as after every other start
            with each:
                pass
        fill(stage, _PREFIX, (self._writer, self._seer, other), self._count)
        stand_in(stage, _PREFIX, other)
        self._database = database_bytes(stage)

    def measure(self) -> Figures:
        figures: Figures = {"records, etcd's database": self._database / MIB}
        with ExitStack() as running:
            figures["records, start"] = _started(self._writer, running)
            figures["records, CPU of the start"] = cpu_seconds(self._writer.pid)
            figures["records, memory at start"] = self._writer.memory() / MIB
            figures |= self._lists()
            figures["records, GET a second"] = rate_of(f"{self._writer.url}/images/{self._some_id}")
            self._writer.forget_log()
            _started(self._seer, running)
            figures |= self._seen()
            figures["records, memory"] = self._writer.memory("VmHWM") / MIB
        return figures

    def _lists(self) -> Figures:
        took: list[float] = []
        reference: list[float] = []
        with closing(connection_to(self._writer)) as connection:
            for _ in range(_LISTS):
                seconds, body = asked_for(connection, "GET", "/images")
                took.append(seconds)
                began = time.monotonic()
                images = json.loads(body)
                reference.append(time.monotonic() - began)
                assert len(images) == self._count
        self._some_id = images[0]["id"]
        return {
            "records, first list": took[0],
            "records, list": statistics.median(took[1:]),
            "records, list: json.loads": statistics.median(reference),
        }

    def _seen(self) -> Figures:
        sides = {"writer": self._writer.pid, "seer": self._seer.pid, "etcd": self.stage.etcd.pids[0]}
        before = {name: cpu_seconds(pid) for name, pid in sides.items()}
        with children(asked("putter", self._writer.url, _WRITES, _WRITES_A_SECOND)) as (putter,):
            puts = said(putter)
        wait_for(lambda: puts.keys() <= self._told().keys(), _SEEN_SECONDS, "the other member sees all images")
        self._count += len(puts)
        told = self._told()
        figures: Figures = {}
        for name, moments in (
            ("seen", [(put["due"], told[image]) for image, put in puts.items()]),
            ("seen since answer", [(put["answered"], told[image]) for image, put in puts.items()]),
            ("PUT", [(put["due"], put["answered"]) for put in puts.values()]),
        ):
            hundredths = statistics.quantiles([1000 * (end - start) for start, end in moments], n=100)
            figures |= {f"records, {name}, p50": hundredths[49], f"records, {name}, p99": hundredths[98]}
        for name, pid in sides.items():
            figures[f"records, CPU ms a PUT: {name}"] = 1000 * (cpu_seconds(pid) - before[name]) / len(puts)
        for service in (self._writer, self._seer):
            service.forget_log()
        return figures

    def _told(self) -> Mapping[str, float]:
        """When the other member first saw each image complete."""
        return {line["image"]: line["at"] for line in self._seer.events("seen")}


def _started(service: Service, running: ExitStack) -> float:
    """Seconds until it says that it is ready: to be asked again and again would delay it."""
    service.forget_log()
    began = time.monotonic()
    service.start(wait=False)
    running.callback(service.close)
    wait_for(lambda: service.events("ready") or service.exited, _START_SECONDS, "a member is ready")
    seconds = time.monotonic() - began
    service.wait_listening()
    return seconds
