"""The take-over of the Go program's kvite file."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from imgsvc.errors import ConfigError, SourceTaken
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from imgsvc.metadata.kvite import open_kvite
from imgsvc.metadata.sqlite import SqliteMetadataStore
from imgsvc.metadata.store import Entry
from tests.metadata.conftest import MEMBER

SOURCE = "http://source.example/image.gz"


def go_document(image_id: str, **changes: object) -> dict[str, Any]:
    """An image as the Go program wrote it."""
    return {
        "id": image_id,
        "source": "",
        "type": "kvm",
        "comment": "",
        "status": "complete",
        "size": 24,
        "expected_size": 24,
        "download_start": "2015-03-02T17:04:35.123456789-05:00",
        "download_end": "2015-03-02T17:04:36.5-05:00",
    } | changes


class KviteFile:
    """A file as the kvite library made it, open to the table of one name."""

    def __init__(self, filename: Path, table: str = "images") -> None:
        self.filename = filename
        self.table = table
        self.execute("CREATE TABLE {} (key text not null, bucket text not null, value blob not null)")
        self.execute("CREATE UNIQUE INDEX kvite_index ON {} (key, bucket)")

    def execute(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        table = '"' + self.table.replace('"', '""') + '"'
        with contextlib.closing(sqlite3.connect(self.filename)) as connection, connection:
            return connection.execute(statement.replace("{}", table), parameters).fetchall()

    def put(self, key: object, value: object, bucket: str = "images") -> None:
        self.execute("INSERT INTO {} VALUES (?, ?, ?)", key, bucket, value)

    def add(self, **changes: object) -> str:
        """Adds an image and returns its id."""
        image_id = new_id()
        self.put(image_id, json.dumps(go_document(image_id, **changes)).encode())
        return image_id

    def rows(self) -> list[tuple[Any, ...]]:
        return self.execute("SELECT rowid, key, bucket, value FROM {} ORDER BY rowid")

    def open(self) -> contextlib.closing[SqliteMetadataStore]:
        return contextlib.closing(open_kvite(self.filename, self.table, MEMBER))


@pytest.fixture
def kvite(tmp_path: Path) -> KviteFile:
    return KviteFile(tmp_path / "mistify.db")


def entries(store: SqliteMetadataStore) -> list[Entry]:
    return [entry for page in store.survey() for entry in page]


class TestRefused:
    """A ConfigError in one sentence names the file and the table, and the file stays as it was."""

    def test_missing_file(self, tmp_path: Path) -> None:
        """No file is made in its place: with none of the old records all images would look like orphans."""
        with pytest.raises(ConfigError, match=r"missing\.db"):
            open_kvite(tmp_path / "missing.db", "images", MEMBER)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("table", ["Bilder", "sqlite_master", "", "images; --", "a\0b", 'im"ages'])
    def test_missing_table(self, kvite: KviteFile, table: str) -> None:
        before = kvite.filename.read_bytes()
        with pytest.raises(ConfigError) as refusal:
            open_kvite(kvite.filename, table, MEMBER)
        assert str(kvite.filename) in str(refusal.value)
        assert repr(table) in str(refusal.value)
        assert kvite.filename.read_bytes() == before
        assert list(kvite.filename.parent.iterdir()) == [kvite.filename]

    def test_table_of_another_kind(self, kvite: KviteFile) -> None:
        kvite.execute("CREATE TABLE other (note TEXT)")
        before = kvite.filename.read_bytes()
        with pytest.raises(ConfigError, match=r"mistify\.db"):
            open_kvite(kvite.filename, "other", MEMBER)
        assert kvite.filename.read_bytes() == before

    def test_not_sqlite(self, tmp_path: Path) -> None:
        filename = tmp_path / "config.json"
        filename.write_text("{}" * 1000)
        with pytest.raises(ConfigError, match=r"config\.json"):
            open_kvite(filename, "images", MEMBER)


class TestLeftOut:
    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff\xfe\xfd",
            b'{"id": 7}',
            b"[" * 5_000,
            7,
            json.dumps(go_document("KEY", type="iso")),
            json.dumps(go_document("KEY", status="")),
            json.dumps(go_document("KEY", size="24")),
            json.dumps(go_document("KEY", size=2**63)),
            json.dumps(go_document("KEY", download_start="yesterday")),
            json.dumps(go_document("KEY", comment="\ud800")),
            json.dumps(go_document("00000000-0000-4000-8000-000000000000")),
        ],
        ids=lambda value: repr(value)[:40],
    )
    def test_value(self, kvite: KviteFile, value: object) -> None:
        """A record that makes no sense is left out with a warning that names it; the others come over."""
        key = new_id()
        first = kvite.add()
        kvite.put(key, value.replace("KEY", key) if isinstance(value, str) else value)
        last = kvite.add()
        before = kvite.rows()
        with capture_logs() as logs, kvite.open() as store:
            assert {entry.image.id for entry in entries(store)} == {first, last}
        (warning,) = [line for line in logs if line["log_level"] == "warning"]
        assert warning["key"] == key
        assert warning["reason"]
        (summary,) = [line for line in logs if line["event"] == "kvite file imported"]
        assert (summary["imported"], summary["left_out"]) == (2, 1)
        assert kvite.rows() == before

    @pytest.mark.parametrize("key", ["", "../../etc/passwd", "{B53C0000}", "0B53A3F2-5A0C-4B1E-9B1F-0C6D3E2F1A00"])
    def test_key(self, kvite: KviteFile, key: str) -> None:
        """An id that is no UUID in its one form never becomes an image's, and so no file's, name."""
        kvite.put(key, json.dumps(go_document(key)).encode())
        with capture_logs() as logs, kvite.open() as store:
            assert entries(store) == []
        assert [line["key"] for line in logs if line["log_level"] == "warning"] == [key]

    def test_key_that_is_no_text(self, kvite: KviteFile) -> None:
        """Not even a key that cannot be decoded hides the other records."""
        image_id = kvite.add()
        kvite.execute("INSERT INTO {} VALUES (CAST(x'ff' AS TEXT), 'images', '{}')")
        with kvite.open() as store:
            assert [entry.image.id for entry in entries(store)] == [image_id]

    def test_other_buckets(self, kvite: KviteFile) -> None:
        """Only the bucket of images is looked at."""
        image_id = new_id()
        kvite.put(image_id, json.dumps(go_document(image_id)), bucket="guests")
        with capture_logs() as logs, kvite.open() as store:
            assert entries(store) == []
        assert not [line for line in logs if line["log_level"] == "warning"]


class TestTakenOver:
    def test_complete(self, kvite: KviteFile) -> None:
        """A complete image stays complete, without a digest, and its file is expected here."""
        image_id = kvite.add(source=SOURCE, type="container", comment="é'\"\0")
        with kvite.open() as store:
            image = store.get(image_id)
            assert image == Image(
                id=image_id,
                type=ImageType.CONTAINER,
                source=SOURCE,
                comment="é'\"\0",
                status=Status.COMPLETE,
                size=24,
                expected_size=24,
                download_start=datetime(2015, 3, 2, 22, 4, 35, 123456, UTC),
                download_end=datetime(2015, 3, 2, 22, 4, 36, 500000, UTC),
                revision=image.revision,
            )
            assert entries(store) == [Entry(image, owner=None, here=True)]
            assert store.get_by_source(SOURCE) == image
            with pytest.raises(SourceTaken):
                store.create(Image(id=new_id(), type=ImageType.KVM, source=SOURCE))

    @pytest.mark.parametrize("status", ["pending", "downloading"])
    def test_interrupted(self, kvite: KviteFile, status: str) -> None:
        """What the Go program left unfinished is in error, and says why; it keeps its source, to be fetched again."""
        image_id = kvite.add(source=SOURCE, status=status, download_end="0001-01-01T00:00:00Z")
        with kvite.open() as store:
            image = store.get_by_source(SOURCE)
            assert (image.id, image.status) == (image_id, Status.ERROR)
            assert "mistify-image-service stopped" in image.error
            assert entries(store) == [Entry(image, owner=None, here=False)]

    def test_error(self, kvite: KviteFile) -> None:
        """An image in error stays there, and has a sentence for whoever asks."""
        kvite.add(source=SOURCE, status="error")
        with kvite.open() as store:
            image = store.get_by_source(SOURCE)
            assert image.status is Status.ERROR
            assert "mistify-image-service" in image.error

    @pytest.mark.parametrize(
        ("statuses", "claimant"),
        [
            (["complete"], 0),
            (["pending", "complete"], 1),
            (["complete", "pending"], 0),
            (["error", "downloading"], 0),
            (["complete", "complete"], 0),
            (["error", "complete", "complete", "pending"], 1),
        ],
    )
    def test_one_source_twice(self, kvite: KviteFile, statuses: list[str], claimant: int) -> None:
        """Of several images of one source the first complete one has it, else the first; all of them are kept."""
        ids = [kvite.add(source=SOURCE, status=status) for status in statuses]
        other = kvite.add(source="http://other.example/")
        with kvite.open() as store:
            assert {entry.image.id for entry in entries(store)} == {*ids, other}
            assert store.get_by_source(SOURCE).id == ids[claimant]
            assert store.get_by_source("http://other.example/").id == other
            for image_id in ids:
                assert store.delete(image_id).source == SOURCE
            store.create(Image(id=new_id(), type=ImageType.KVM, source=SOURCE))

    @pytest.mark.parametrize("table", ["images", "Bilder; DROP TABLE x", 'a"b', "select", "é 漢", "1", "[x]", "`"])
    def test_table_names(self, tmp_path: Path, table: str) -> None:
        """The table may have any name."""
        kvite = KviteFile(tmp_path / "mistify.db", table)
        image_id = kvite.add()
        with kvite.open() as store:
            assert store.get(image_id).size == 24

    def test_table_name_in_another_case(self, kvite: KviteFile) -> None:
        """SQLite does not tell upper from lower case in a table's name, and the Go program's settings may differ."""
        image_id = kvite.add()
        with contextlib.closing(open_kvite(kvite.filename, "IMAGES", MEMBER)) as store:
            assert store.get(image_id).id == image_id

    def test_many(self, kvite: KviteFile) -> None:
        """More images than fit on a page come over."""
        ids = [new_id() for _ in range(2_500)]
        with contextlib.closing(sqlite3.connect(kvite.filename)) as connection, connection:
            rows = [(image_id, json.dumps(go_document(image_id, source=image_id))) for image_id in ids]
            connection.executemany("INSERT INTO images VALUES (?, 'images', ?)", rows)
        with kvite.open() as store:
            assert [entry.image.id for entry in entries(store)] == sorted(ids)


class TestOnce:
    def test_second_start(self, kvite: KviteFile) -> None:
        """Each record is imported once: what was deleted or changed since stays so, also without the old table."""
        kept, deleted = kvite.add(source=SOURCE), kvite.add()
        before = kvite.rows()
        with kvite.open() as store:
            identity = store.identity
            store.delete(deleted)
            changed = store.update(store.get(kept).failed("its file is missing"))
        assert kvite.rows() == before
        with kvite.open() as store:
            assert store.identity == identity
            assert [entry.image for entry in entries(store)] == [changed]
        kvite.execute("DROP TABLE {}")
        with kvite.open() as store:
            assert store.get_by_source(SOURCE) == changed

    def test_back_and_once_more(self, kvite: KviteFile) -> None:
        """What the Go program has taken in since is taken over at the next start: without a record its file would go.
        A source stays with who has it by now."""
        kept, deleted = kvite.add(source=SOURCE), kvite.add()
        with kvite.open() as store:
            store.delete(deleted)
            ours = store.create(Image(new_id(), ImageType.KVM, source=SOURCE + "2"))
        kvite.execute("DELETE FROM {} WHERE key = ?", deleted)  # so that its row may have the same number as the next
        added, twice = kvite.add(source=SOURCE + "3"), kvite.add(source=SOURCE + "2")
        kvite.put("no id", b"{}")
        for _ in range(2):
            with kvite.open() as store:
                assert {entry.image.id for entry in entries(store)} == {kept, ours.id, added, twice}
                assert store.get_by_source(SOURCE).id == kept
                assert store.get_by_source(SOURCE + "2") == ours
                assert store.get_by_source(SOURCE + "3").id == added
        ((note,),) = kvite.execute("SELECT value FROM imgsvc_meta WHERE key = 'kvite_import'")
        assert json.loads(note) == {"table": "images", "imported": 4, "left_out": 1}

    def test_imported_by_an_earlier_version(self, kvite: KviteFile) -> None:
        """Which noted no keys: what is there by now counts as imported."""
        deleted = kvite.add()
        with kvite.open() as store:
            store.delete(deleted)
        kvite.execute("DROP TABLE imgsvc_kvite")
        with kvite.open() as store:
            assert entries(store) == []
        added = kvite.add()
        with kvite.open() as store:
            assert [entry.image.id for entry in entries(store)] == [added]

    def test_counts_are_noted(self, kvite: KviteFile) -> None:
        """The file itself says what was imported from where, and how much was not."""
        kvite.add()
        kvite.put("no id", b"{}")
        open_kvite(kvite.filename, "images", MEMBER).close()
        ((note,),) = kvite.execute("SELECT value FROM imgsvc_meta WHERE key = 'kvite_import'")
        assert json.loads(note) == {"table": "images", "imported": 1, "left_out": 1}

    def test_killed_in_the_middle(self, kvite: KviteFile) -> None:
        """A process killed after the import but before its commit leaves the file as it was; the next imports all."""
        ids = [kvite.add(source=SOURCE) for _ in range(50)]
        before = kvite.rows()
        program = """
import os, signal, sys
from pathlib import Path
from imgsvc.metadata.kvite import import_kvite
from imgsvc.metadata.sqlite import SqliteMetadataStore
from imgsvc.metadata.store import Member

def import_and_die(connection):
    # A cache of one page: the transaction's pages reach the file, and only its journal can undo that.
    connection.execute("PRAGMA cache_size = 1")
    import_kvite(connection, filename, "images")
    print(connection.execute("SELECT count(*) FROM imgsvc_images").fetchone()[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

filename = Path(sys.argv[1])
SqliteMetadataStore(filename, Member(id="", site="", url=""), import_and_die)
"""
        died = subprocess.run(
            [sys.executable, "-c", program, str(kvite.filename)], capture_output=True, text=True, check=False
        )
        assert (died.returncode, died.stdout.splitlines()[-1]) == (-signal.SIGKILL, "50"), died.stderr
        assert kvite.execute("SELECT name FROM sqlite_master WHERE name LIKE 'imgsvc%'") == []
        assert kvite.rows() == before
        with kvite.open() as store:
            assert [entry.image.id for entry in entries(store)] == sorted(ids)
