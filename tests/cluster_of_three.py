"""A cluster for tests: members as processes over a real etcd of three, all of which may be killed, frozen and, in
network namespaces, cut off from each other."""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from imgsvc.etcd_layout import OWNER, RECORD, REPLICAS, Layout, end_of
from imgsvc.metadata.image import Image
from tests.etcd_cluster import EtcdCluster, free_port
from tests.harness import Service, Site, wait_for
from tests.namespaces import HERE, Network, Place
from tests.source import Source

LEASE = 2
SECRET = "known to members"

Settings = dict[str, object]
_READY_SECONDS = 30.0
_ESTABLISHED = "01"


@dataclass
class Stored:
    """What etcd has of one image."""

    image: Image | None = None
    owner: str = ""
    # The Unix time until which it waits for the member that brings it in.
    waits_until: float = 0.0
    replicas: list[str] = field(default_factory=list)


class Member(Service):
    """One of a cluster."""

    def __init__(self, data_dir: Path, site: Site, name: str, /, **settings: object) -> None:
        super().__init__(data_dir, site, cluster_member_id=f"member-{name}", **settings)
        self.settings.setdefault("cluster_advertise_url", self.url)
        self.name = name

    @property
    def id(self) -> str:
        """What records call it; known once it was started."""
        return str(self.events("listening")[-1]["member"])

    def is_ready(self) -> bool:
        try:
            return self.get("/readyz").status == 200
        except (OSError, http.client.HTTPException):
            return False


class ClusterOfThree:
    """A context manager; its members, which are called a, b and c, are ready when it begins, and their logs are looked
    at when it ends. `directories` are where they have their state.

    With a `network` each member and each member of etcd is a host of its own there, and so is the place from which the
    tests, and the `source`, see them.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        network: Network | None = None,
        /,
        **settings: object,
    ) -> None:
        self.network = network
        self.replicas = int(str(settings.get("cluster_replicas", _IMPATIENT["cluster_replicas"])))
        self.prefix = f"/test-{uuid.uuid4()}"
        self._closing = ExitStack()
        self.outside = self._host()
        self.etcd = EtcdCluster(3, places=[self._host() for _ in range(3)], seen_from=self.outside)
        self._closing.callback(self.etcd.close)
        try:
            self.source = self._closing.enter_context(Source(place=self.outside))
            self._settings = settings
            self.members = [self.new_member(name, where) for name, where in zip("abc", directories, strict=True)]
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> Self:
        with ExitStack() as starting, ThreadPoolExecutor(3) as pool:
            starting.push(self._closing.pop_all())
            for member in self.members:
                starting.callback(member.kill)
            for started in [pool.submit(member.__enter__) for member in self.members]:
                starting.push(started.result().__exit__)
            starting.callback(self.etcd.restore)
            starting.callback(self.heal)
            self._closing = starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.__exit__(kind, error, trace)

    def new_member(self, name: str, directory: Path, **settings: object) -> Member:
        """One that is not started yet, nor ended when the cluster is."""
        return Member(
            directory,
            Site(self._host(), self.outside, free_port()),
            name,
            **{**self._on_etcd(), **_IMPATIENT, **self._settings, **settings},
        )

    def live(self) -> list[Member]:
        """Those that run and are not frozen."""
        return [member for member in self.members if member.answers]

    def start(self) -> None:
        """Starts the members that do not run, and lets the frozen go on; returns when all are ready."""
        for member in self.members:
            member.cont()
            if not member.runs:
                member.start(wait=False)
        for member in self.members:
            member.wait_listening()
            wait_for(member.is_ready, _READY_SECONDS, f"{member.name} is ready")

    # Partitions, which take a network.

    def cut_from_etcd(self, member: Member) -> None:
        """From now on the member hears nothing of etcd, and etcd nothing of it; nobody is told."""
        for place in self.etcd.places:
            self._network.cut(member.place, place)

    def cut_from_peers(self, member: Member) -> None:
        """As `cut_from_etcd`, from the other members."""
        for other in self.members:
            if other is not member:
                self._network.cut(member.place, other.place)

    def cut(self, one: Member, other: Member) -> None:
        self._network.cut(one.place, other.place)

    def join(self, member: Member) -> None:
        """From now on it reaches everybody, and is reached."""
        for place in [*self.etcd.places, *(other.place for other in self.members)]:
            self._network.join(member.place, place)

    def heal(self) -> None:
        """Undoes every cut."""
        if self.network is not None:
            self.network.heal()

    def slow(self, member: Member, bytes_per_second: int) -> None:
        """What it sends to whomever takes this long from now on."""
        self._network.slow(member.place, bytes_per_second)

    def connected(self, one: Member, other: Member) -> bool:
        """Whether `one` has a connection open that it made to `other`. Each must have a network place of its own."""
        wanted = _as_in_proc(other.place.address, other.port)
        lines = Path(f"/proc/{one.pid}/net/tcp").read_text().splitlines()[1:]
        return any(line.split()[2:4] == [wanted, _ESTABLISHED] for line in lines)

    def reaches(self, one: Member, other: Member) -> bool:
        return self.network is None or self.network.reaches(one.place, other.place)

    def reaches_etcd(self, member: Member) -> bool:
        """Whether it reaches those members of etcd that answer, and they are more than half."""
        answering = self.etcd.answering()
        reached = [i for i in answering if self.reaches_place(member, self.etcd.places[i])]
        return len(answering) > 1 and bool(reached)

    def reaches_place(self, member: Member, place: Place) -> bool:
        return self.network is None or self.network.reaches(member.place, place)

    # What etcd has.

    def stored(self) -> dict[str, Stored]:
        """What it has of each image. Raises OSError when it does not answer."""
        layout = Layout(self.prefix)
        found: dict[str, Stored] = {}
        for key, value in self._range(layout.images):
            image_id, rest = layout.split(key)
            stored = found.setdefault(image_id, Stored())
            if rest == RECORD:
                stored.image = Image.from_json(value, 0)
            elif rest == OWNER:
                stored.owner = value.decode()
            elif rest == "transfer":
                stored.waits_until = json.loads(value)["until"]
            elif rest.startswith(f"{REPLICAS}/"):
                stored.replicas.append(rest.removeprefix(f"{REPLICAS}/"))
        return found

    def live_in_etcd(self) -> set[str]:
        """The members that it takes for live. Raises OSError when it does not answer."""
        start = Layout(self.prefix).members
        return {key.removeprefix(start) for key, _ in self._range(start)}

    def _range(self, start: str) -> Iterator[tuple[str, bytes]]:
        wanted = {"key": _base64(start), "range_end": _base64(end_of(start))}
        trouble: Exception = ConnectionError("no member of etcd runs")
        for i in self.etcd.answering():
            try:
                answer = self.etcd.call("/v3/kv/range", wanted, i)
            except (OSError, http.client.HTTPException) as error:
                trouble = error
                continue
            for item in answer.get("kvs", []):
                yield base64.b64decode(item["key"]).decode(), base64.b64decode(item["value"])
            return
        raise ConnectionError(f"etcd does not answer: {trouble}")

    @property
    def _network(self) -> Network:
        assert self.network is not None, "there are no partitions without a network"
        return self.network

    def _host(self) -> Place:
        return self.network.host() if self.network is not None else HERE

    def _on_etcd(self) -> Settings:
        return {
            "metadata_store_type": "etcd",
            "metadata_store_config_machines": self.etcd.endpoints,
            "metadata_store_config_prefix": self.prefix,
        }


# What takes a minute in a data centre takes a moment here.
_IMPATIENT: Settings = {
    "cluster_lease_ttl": LEASE,
    "cluster_replicas": 2,
    "cluster_rebalance_delay": 0,
    "cluster_secret": SECRET,
    "cluster_peer_timeout": 1,
    "cluster_etcd_grace": 3,
    "cluster_copy_bytes_per_second": 0,
}

StartCluster = Callable[..., ClusterOfThree]


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[StartCluster]:
    """Starts a cluster of the test's own, with these settings of its members."""
    with ExitStack() as running:
        yield lambda **settings: running.enter_context(ClusterOfThree(_directories(tmp_path), **settings))


@pytest.fixture
def start_cut_cluster(network: Network, tmp_path: Path) -> Iterator[StartCluster]:
    """As `start_cluster`, in a network with partitions; skips where there can be none."""
    with ExitStack() as running:
        yield lambda **settings: running.enter_context(ClusterOfThree(_directories(tmp_path), network, **settings))


def _directories(parent: Path) -> Sequence[Path]:
    return [parent / name for name in "abc"]


def _as_in_proc(address: str, port: int) -> str:
    """As /proc/net/tcp has it."""
    return f"{int.from_bytes(ipaddress.ip_address(address).packed, sys.byteorder):08X}:{port:04X}"


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
