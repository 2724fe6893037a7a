"""Every metadata store there is, for the tests that all of them pass."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgsvc.metadata.image import new_id
from imgsvc.metadata.kvite import open_kvite
from imgsvc.metadata.memory import MemoryMetadataStore
from imgsvc.metadata.sqlite import SqliteMetadataStore
from imgsvc.metadata.store import Member, MetadataStore
from tests.etcd_cluster import EtcdCluster
from tests.metadata.etcd_store import open_store

MEMBER = Member(id=new_id(), site="one.example:/images", url="http://one.example:20000")

Opener = Callable[[], MetadataStore]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A store type. `places` gives a maker of places, each an empty set of records; what a place is given as opens
    it, as MEMBER, as often as it is called. `shared` is whether other hosts can use the same records: then a member
    that has gone owns nothing, and members say themselves what they hold. `examples` bounds hypothesis, which takes a
    new place for each."""

    places: Callable[[pytest.FixtureRequest], Callable[[], Opener]]
    keeps_records: bool
    examples: int
    shared: bool = False


def _memory_places(_request: pytest.FixtureRequest) -> Callable[[], Opener]:
    return lambda: lambda: MemoryMetadataStore(MEMBER)


def _sqlite_places(request: pytest.FixtureRequest) -> Callable[[], Opener]:
    files = _new_files(request)

    def place() -> Opener:
        filename = next(files)
        return lambda: SqliteMetadataStore(filename, MEMBER)

    return place


def _kvite_places(request: pytest.FixtureRequest) -> Callable[[], Opener]:
    files = _new_files(request)

    def place() -> Opener:
        filename = next(files)
        with contextlib.closing(sqlite3.connect(filename)) as connection:
            connection.execute("CREATE TABLE 'images' (key text not null, bucket text not null, value blob not null)")
        return lambda: open_kvite(filename, "images", MEMBER)

    return place


def _etcd_places(request: pytest.FixtureRequest) -> Callable[[], Opener]:
    cluster: EtcdCluster = request.getfixturevalue("etcd_cluster")

    def place() -> Opener:
        prefix = f"/test-{new_id()}"
        return lambda: open_store(cluster.endpoints, prefix, MEMBER)

    return place


def _new_files(request: pytest.FixtureRequest) -> Iterator[Path]:
    directory: Path = request.getfixturevalue("tmp_path")
    return (directory / f"{number}.db" for number in itertools.count())


# By type, as the settings name them.
KINDS: dict[str, Kind] = {
    "memory": Kind(_memory_places, keeps_records=False, examples=100),
    "sqlite": Kind(_sqlite_places, keeps_records=True, examples=25),
    "kvite": Kind(_kvite_places, keeps_records=True, examples=10),
    "etcd": Kind(_etcd_places, keeps_records=True, examples=15, shared=True),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def new_place(kind: Kind, request: pytest.FixtureRequest) -> Callable[[], Opener]:
    return kind.places(request)


@pytest.fixture
def store(new_place: Callable[[], Opener]) -> Iterator[MetadataStore]:
    """An empty store of each type."""
    with contextlib.closing(new_place()()) as store:
        yield store


@pytest.fixture(params=[name for name, kind in KINDS.items() if kind.keeps_records])
def reopen(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opens one empty place of each type that keeps records; every call closes the store that the last one gave."""
    opener = KINDS[request.param].places(request)()
    with contextlib.ExitStack() as current:

        def close_and_open() -> MetadataStore:
            current.close()
            return current.enter_context(contextlib.closing(opener()))

        yield close_and_open
