"""What the SQLite metadata store promises beyond the common suite."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from imgsvc.errors import ConfigError, NotFound, Unavailable
from imgsvc.metadata.image import Image, ImageType, new_id
from imgsvc.metadata.sqlite import SqliteMetadataStore, insert_record
from tests.harness import wait_for
from tests.metadata.conftest import MEMBER
from tests.mounts import Mount


def image(source: str = "") -> Image:
    return Image(id=new_id(), type=ImageType.KVM, source=source)


@pytest.fixture
def filename(tmp_path: Path) -> Path:
    return tmp_path / "imgsvc.db"


@pytest.fixture
def store(filename: Path) -> Iterator[SqliteMetadataStore]:
    with contextlib.closing(SqliteMetadataStore(filename, MEMBER)) as store:
        yield store


def execute(filename: Path, statement: str, *parameters: object) -> None:
    """As an operator does with the sqlite3 program."""
    with contextlib.closing(sqlite3.connect(filename)) as connection, connection:
        connection.execute(statement, parameters)


def query(filename: Path, statement: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(filename)) as connection:
        return connection.execute(statement).fetchall()


def documents(store: SqliteMetadataStore, image_type: ImageType | None = None) -> list[str]:
    return [document for page in store.list(image_type) for document in page]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  a count needs no paths


class TestRefusedFiles:
    """Each is a ConfigError in one sentence that names the file, and the file stays as it was."""

    def refused(self, filename: Path) -> str:
        with pytest.raises(ConfigError) as refusal:
            SqliteMetadataStore(filename, MEMBER)
        assert str(filename) in str(refusal.value)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    def test_not_sqlite(self, filename: Path) -> None:
        filename.write_bytes(b"an operator's notes, not a database\n" * 100)
        self.refused(filename)
        assert filename.read_bytes() == b"an operator's notes, not a database\n" * 100
        assert [path.name for path in filename.parent.iterdir()] == [filename.name]

    def test_newer_schema(self, filename: Path) -> None:
        SqliteMetadataStore(filename, MEMBER).close()
        execute(filename, "UPDATE imgsvc_meta SET value = '2' WHERE key = 'schema'")
        assert "schema 2" in self.refused(filename)

    def test_no_identity(self, filename: Path) -> None:
        SqliteMetadataStore(filename, MEMBER).close()
        execute(filename, "DELETE FROM imgsvc_meta WHERE key = 'identity'")
        self.refused(filename)

    def test_directory(self, tmp_path: Path) -> None:
        self.refused(tmp_path)

    def test_missing_directory(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "missing" / "imgsvc.db")

    def test_unwritable(self) -> None:
        """Whoever may only read the file is told so at the start, not at the first upload."""
        with TemporaryDirectory() as directory:  # not tmp_path, into which nobody else may look
            Path(directory).chmod(0o755)
            filename = Path(directory, "imgsvc.db")
            with unprivileged(Path(directory)):
                SqliteMetadataStore(filename, MEMBER).close()
                filename.chmod(0o444)
                assert filename.read_bytes()
                self.refused(filename)

    def test_read_only_file_system(self, tmpfs: Path, mount: Mount) -> None:
        SqliteMetadataStore(tmpfs / "imgsvc.db", MEMBER).close()
        mount("-o", "remount,ro", tmpfs)
        self.refused(tmpfs / "imgsvc.db")


@contextlib.contextmanager
def unprivileged(directory: Path) -> Iterator[None]:
    """As a user to whom file modes apply, which they do not to root, and whose the directory is."""
    user = os.geteuid()
    if user == 0:
        os.chown(directory, 65534, -1)
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


class TestTrouble:
    @pytest.mark.parametrize("document", ['{"id": 7}', "[" * 5_000], ids=["number", "lists"])
    def test_unreadable_record(self, store: SqliteMetadataStore, filename: Path, document: str) -> None:
        """A record that somebody has spoilt is Unavailable under its id; lists go on without it."""
        spoilt, sound = store.create(image("http://a.example/")), store.create(image())
        execute(filename, "UPDATE imgsvc_images SET document = ? WHERE id = ?", document, spoilt.id)
        calls: list[Callable[[], object]] = [
            lambda: store.get(spoilt.id),
            lambda: store.get_by_source("http://a.example/"),
            lambda: store.delete(spoilt.id),
        ]
        for call in calls:
            with pytest.raises(Unavailable, match=spoilt.id):
                call()
        assert store.get(sound.id) == sound
        assert [list(page) for page in store.list()] == [[sound.to_json()]]
        assert [[entry.image for entry in page] for page in store.survey()] == [[sound]]

    def test_a_record_spoilt_after_it_was_listed(self, store: SqliteMetadataStore, filename: Path) -> None:
        """What was found sound once is looked at again when it has changed, whoever changed it."""
        spoilt, sound = sorted((store.create(image()), store.create(image())), key=lambda each: each.id)
        for _ in range(2):
            assert documents(store) == [spoilt.to_json(), sound.to_json()]
        execute(filename, "UPDATE imgsvc_images SET document = replace(document, 'pending', 7) WHERE id = ?", spoilt.id)
        wait_for(lambda: documents(store) == [sound.to_json()], 1, "it is left out")

    def test_a_document_of_another_shape(self, store: SqliteMetadataStore, filename: Path) -> None:
        """What another program wrote with blanks, another order, or no more than an image needs is listed as ours are."""
        image_id = store.create(image()).id
        other = f'{{ "status": "pending", "type": "kvm", "colour": 7, "comment": "\\u00e9\\ud800", "id": "{image_id}"}}'
        execute(filename, "UPDATE imgsvc_images SET document = ? WHERE id = ?", other, image_id)
        for _ in range(2):
            assert documents(store) == [store.get(image_id).to_json()]
            store.delete(store.create(image()).id)  # so that it is read again

    def test_file_locked_by_another_program(self, store: SqliteMetadataStore, filename: Path) -> None:
        """While somebody else holds the write lock, writes and ping are Unavailable after a wait, and reads work."""
        created = store.create(image())
        store._writer.execute("PRAGMA busy_timeout = 100")
        with contextlib.closing(sqlite3.connect(filename, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for call in (lambda: store.delete(created.id), store.ping):
                with pytest.raises(Unavailable) as unavailable:
                    call()
                assert str(filename) not in str(unavailable.value)
            assert store.get(created.id) == created
        store.delete(created.id)

    def test_closed(self, filename: Path) -> None:
        """A closed store is Unavailable."""
        store = SqliteMetadataStore(filename, MEMBER)
        store.close()
        for call in (lambda: store.get(new_id()), lambda: store.create(image()), lambda: list(store.list())):
            with pytest.raises(Unavailable):
                call()

    def test_failed_take_over(self, filename: Path) -> None:
        """What fails while the file is made ready leaves nothing of it, and no open file."""

        def fail(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO imgsvc_meta VALUES ('half', 'done')")
            raise RuntimeError

        before = open_files()
        with pytest.raises(RuntimeError):
            SqliteMetadataStore(filename, MEMBER, take_over=fail)
        assert open_files() == before
        assert query(filename, "SELECT name FROM sqlite_master") == []


class TestFile:
    def test_every_commit_is_synced(self, store: SqliteMetadataStore) -> None:
        """The log is synced with each commit (FULL is 2): a lost power supply loses nothing acknowledged."""
        assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)

    def test_descriptors(self, filename: Path) -> None:
        """Opening, working and closing leaves no file open."""
        before = open_files()
        for _ in range(3):
            store = SqliteMetadataStore(filename, MEMBER)
            store.create(image())
            list(store.list())
            store.close()
        assert open_files() == before

    def test_foreign_tables_stay(self, filename: Path) -> None:
        """A file may have other tables; they are left alone."""
        execute(filename, "CREATE TABLE images (note TEXT)")
        execute(filename, "INSERT INTO images VALUES ('mine')")
        SqliteMetadataStore(filename, MEMBER).close()
        assert query(filename, "SELECT note FROM images") == [("mine",)]

    def test_documents_are_the_wire_form(self, store: SqliteMetadataStore, filename: Path) -> None:
        """What is stored is the image JSON, to the byte."""
        created = store.create(Image(id=new_id(), type=ImageType.KVM, comment="é"))
        assert query(filename, "SELECT document FROM imgsvc_images") == [(created.to_json(),)]

    def test_a_waiting_list_does_not_hold_the_log(self, store: SqliteMetadataStore, filename: Path) -> None:
        """While a slow client takes its time over a list, the log is reused and does not grow without end."""
        current = store.create(image())
        pages = iter(store.list())
        next(pages)
        for size in range(400):
            current = store.update(current.progressed(size))
        log = filename.with_name(filename.name + "-wal")
        assert log.stat().st_size < 1_000_000


def test_killed_at_any_moment(filename: Path) -> None:
    """With kill -9 in a stream of writes, whatever was acknowledged is there, ten times over."""
    acknowledged: dict[str, str] = {}
    for _ in range(10):
        command = [sys.executable, "-m", "tests.metadata.acknowledging_writer", str(filename)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline()]
            time.sleep(random.uniform(0, 0.1))
            writer.kill()
            lines += writer.stdout.readlines()
        for line in lines:
            if line.endswith("\n"):
                state, image_id = line.split()
                acknowledged[image_id] = state
        under_way = lines[-1].split()[-1]
        with contextlib.closing(SqliteMetadataStore(filename, MEMBER)) as store:
            acknowledged[under_way] = state_of(store, under_way, at_least=acknowledged[under_way])
            for image_id, state in acknowledged.items():
                assert state_of(store, image_id, at_least=state) == state
    assert len(acknowledged) > 50


def state_of(store: SqliteMetadataStore, image_id: str, *, at_least: str) -> str:
    """The state that an image is in, which must not come before the acknowledged one."""
    try:
        found = store.get(image_id)
    except NotFound:
        state = "deleted"
    else:
        assert store.get_by_source(found.source) == found
        state = found.status.value
    order = ["pending", "complete", "deleted"]
    assert order.index(state) >= order.index(at_least)
    return state


def test_100_000_images(tmp_path: Path) -> None:
    """Among 100,000 images, finding and creating one costs about what it costs among ten."""
    few = costs(tmp_path / "few.db", 10)
    many = costs(tmp_path / "many.db", 100_000)
    assert all(slow < 10 * fast for fast, slow in zip(few, many, strict=True)), (few, many)


def costs(filename: Path, count: int) -> list[float]:
    """What get, get_by_source and create cost among `count` images."""
    with contextlib.closing(SqliteMetadataStore(filename, MEMBER)) as store:
        images = [image(f"http://source.example/{number}") for number in range(count)]
        with contextlib.closing(sqlite3.connect(filename)) as connection, connection:
            for each in images:
                insert_record(connection, each, claimed_source=each.source)
        some = images[:: max(1, count // 100)]
        return [
            cost([partial(store.get, each.id) for each in some]),
            cost([partial(store.get_by_source, each.source) for each in some]),
            cost([partial(store.create, image(f"http://new.example/{number}")) for number in range(30)]),
        ]


def cost(calls: list[Callable[[], Image]]) -> float:
    """The median of the seconds that the calls take."""
    times = []
    for call in calls:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
