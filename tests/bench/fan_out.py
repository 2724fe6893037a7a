"""Very many clients that want an image of which one member of a cluster has the bytes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from functools import partial

from tests.bench.cluster import member
from tests.bench.programs import children, cpu_seconds
from tests.bench.row import Figures, Goal, Row
from tests.bench.stage import Stage, warm
from tests.harness import wait_for

_PREFIX = "/bench-fanout"
_CLIENTS = 64
_GIB = 1 << 30
_SECONDS = 10.0


class FanOut(Row):
    """The image is uploaded anew in each round, so that no other member has a copy when it begins."""

    name = "fanout"
    programs = ("curl", "nginx", "etcd")
    goals = (Goal("64 downloads from three members, of which one has it", "fanout", "fanout: nginx", 1.25, 1.00),)
    rounds = 3

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._members = [member(stage, _PREFIX, f"fanout-{name}") for name in "abc"]
        for each in self._members:
            stage.running.enter_context(each)
        self._holder, *self._others = self._members
        _download([stage.source_url()])  # so that it is in the page cache

    def measure(self) -> Figures:
        figures: Figures = {}

        def ours() -> None:
            with self.stage.source.open("rb") as file:
                image = self._holder.upload(file)["id"]
            urls = [f"{each.url}/images/{image}/download" for each in self._members]
            _download(urls[:1])
            warm()
            before = [cpu_seconds(each.pid) for each in self._members]
            figures["fanout"] = _download([url for url, _ in zip(itertools.cycle(urls), range(_CLIENTS))])
            used = sum(cpu_seconds(each.pid) - earlier for each, earlier in zip(self._members, before, strict=True))
            figures["fanout, CPU a GiB"] = used / self._moved
            self._check_pulls(image)
            self._holder.delete(image)
            wait_for(lambda: not any(each.stored() for each in self._members), _SECONDS, "the image is gone everywhere")

        def reference() -> None:
            warm()
            before = cpu_seconds(self.stage.nginx.pid)
            figures["fanout: nginx"] = _download([self.stage.source_url()] * _CLIENTS)
            figures["fanout, CPU a GiB: nginx"] = (cpu_seconds(self.stage.nginx.pid) - before) / self._moved

        self.stage.in_turn(ours, reference)
        return figures

    @property
    def _moved(self) -> float:
        return _CLIENTS * self.stage.sizes.image / _GIB

    def _check_pulls(self, image: str) -> None:
        """Each of the others has pulled the bytes once, whole, and all that any of them gave went to clients, to the one
        that warmed the page cache, and to these two pulls."""
        for each in self._others:
            wait_for(partial(each.events, "pull", image=image), _SECONDS, "a pull is in the log")
            pulls = [line["bytes"] for line in each.events("pull", image=image)]
            assert pulls == [self.stage.sizes.image], f"a member has pulled {pulls}"
        expected = (_CLIENTS + 1 + len(self._others)) * self.stage.sizes.image
        wait_for(lambda: self._given(image) >= expected, _SECONDS, "all downloads are in the log")
        assert self._given(image) == expected, f"the members gave {self._given(image)} bytes instead of {expected}"
        for each in self._members:
            each.forget_log()

    def _given(self, image: str) -> int:
        """Bytes of the image that all members have sent, to anyone."""
        path = f"/images/{image}/download"
        return sum(line["bytes"] for each in self._members for line in each.events("request", path=path))


def _download(urls: Sequence[str]) -> float:
    """Seconds until all of these, asked for at once, are there."""
    began = time.monotonic()
    with children(*(["curl", "-sSf", "-o", "/dev/null", url] for url in urls)) as running:
        for client, url in zip(running, urls, strict=True):
            assert client.wait() == 0, url
        return time.monotonic() - began
