"""Metadata store type "sqlite": records in one SQLite file, for a service that shares them with no other."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import structlog

from imgsvc.errors import ConfigError, Conflict, Invalid, NoSpace, NotFound, SourceTaken, Unavailable
from imgsvc.metadata.ballast import BALLAST_SIZE, Ballast
from imgsvc.metadata.documents import Documents
from imgsvc.metadata.image import Image, ImageType, Status
from imgsvc.metadata.recent import Page, Recent
from imgsvc.metadata.store import Entry, Member
from imgsvc.metadata.unshared import Unshared

_T = TypeVar("_T")
_log = structlog.get_logger()

_SCHEMA = "1"
_PAGE = 1_000
_READERS = 4
_BUSY_SECONDS = 5.0
# How often other processes are looked for, and how long that holds.
_WATCH_SECONDS = 0.3
_TRUST_SECONDS = 0.9

# SQLite's default of 1,000 pages lets the log grow to 4 MiB. It must fit into the ballast, so that on a full disk it
# can come round to its beginning again and again, and any number of records can be finished and deleted.
_LOG_PAGES = 100

_CREATE_META = "CREATE TABLE IF NOT EXISTS imgsvc_meta (key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL)"
_CREATE_IMAGES = """
    CREATE TABLE IF NOT EXISTS imgsvc_images (
        id TEXT PRIMARY KEY NOT NULL,
        type TEXT NOT NULL,
        source TEXT UNIQUE,
        document TEXT NOT NULL,
        revision INTEGER NOT NULL
    )"""
_CREATE_TYPE_INDEX = "CREATE INDEX IF NOT EXISTS imgsvc_images_type ON imgsvc_images (type, id)"

_BY_ID = "SELECT id, document, revision FROM imgsvc_images WHERE id = ?"
_BY_SOURCE = "SELECT id, document, revision FROM imgsvc_images WHERE source = ?"
_AFTER = "SELECT id, document, revision FROM imgsvc_images WHERE id > ? ORDER BY id LIMIT ?"
_UPDATE = """
    UPDATE imgsvc_images SET document = :document, revision = :revision + 1
    WHERE id = :id AND revision = :revision"""
_TYPE_AFTER = "SELECT id, document, revision FROM imgsvc_images WHERE type = ? AND id > ? ORDER BY id LIMIT ?"


class SqliteMetadataStore(Unshared):
    """Records in one file, in tables whose names begin with `imgsvc_`; a `MetadataStore`.

    What a call has written is on the disk when it returns. `take_over` runs in the transaction that makes the tables,
    at every opening: what another program left is imported whole or not at all. A file that is refused stays as it
    was. The directory must exist.
    """

    def __init__(
        self, filename: Path, member: Member, take_over: Callable[[sqlite3.Connection], None] | None = None
    ) -> None:
        """Raises ConfigError when the file cannot be used."""
        self._filename = filename.absolute()
        self._member = member
        self._lock = threading.Lock()
        self._documents = Documents()
        self._recent = Recent()
        self._closing = threading.Event()
        try:
            self._ballast = Ballast(Path(f"{self._filename}.ballast"))
            self._open(take_over)
            self._ballast.restore()
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"{filename} cannot hold the metadata: {error}") from error
        self._watch = threading.Thread(target=self._watch_others, name="records-watch")
        self._watch.start()

    @property
    def identity(self) -> str:
        return self._identity

    def list(self, image_type: ImageType | None = None) -> Iterator[Sequence[str]]:
        after: str | None = ""
        while after is not None:
            state = self._recent.state
            page = self._recent.page((image_type, after))
            if page is None:
                page = self._read_page(image_type, after)
                self._recent.keep_page((image_type, after), page, state)
            documents, after = page
            if documents:
                yield documents

    def survey(self) -> Iterator[Sequence[Entry]]:
        after = ""
        while rows := self._rows(None, after):
            yield [self._entry(image) for image in _readable(rows, _image)]
            after = rows[-1][0]

    def get(self, image_id: str) -> Image:
        state = self._recent.state
        with self._translated(), self._reader() as reader:
            image = _find(reader, _BY_ID, image_id)
        self._recent.keep(image, state)
        return image

    def peek(self, image_id: str) -> str | None:
        return self._recent.get(image_id)

    def get_by_source(self, source: str) -> Image:
        with self._translated(), self._reader() as reader:
            return _find(reader, _BY_SOURCE, source)

    def create(self, image: Image) -> Image:
        created = dataclasses.replace(image, revision=1)

        def insert(writer: sqlite3.Connection) -> Image:
            stored = _search(writer, _BY_ID, image.id)
            if stored is not None:
                if dataclasses.replace(stored, revision=1) == created:
                    return stored  # the same call, once more
                raise Conflict(f"the id {image.id} is in use")
            claimant = _search(writer, _BY_SOURCE, image.source)
            if claimant is not None:
                raise SourceTaken(claimant)
            insert_record(writer, created, claimed_source=image.source or None)
            return created

        return self._write(insert, image.id)

    def update(self, image: Image) -> Image:
        updated = dataclasses.replace(image, revision=image.revision + 1)
        change = {"id": image.id, "revision": image.revision, "document": image.to_json()}

        def replace(writer: sqlite3.Connection) -> Image:
            done = writer.execute(_UPDATE, change)
            if done.rowcount or _find(writer, _BY_ID, image.id) == updated:  # now, or by the same call before
                return updated
            raise Conflict(f"image {image.id} has changed since it was read")

        return self._write(replace, image.id, may_need_ballast=image.status is not Status.DOWNLOADING)

    def delete(self, image_id: str) -> Image:
        def remove(writer: sqlite3.Connection) -> Image:
            image = _find(writer, _BY_ID, image_id)
            writer.execute("DELETE FROM imgsvc_images WHERE id = ?", (image_id,))
            return image

        return self._write(remove, image_id, may_need_ballast=True)

    def ping(self) -> None:
        def note(writer: sqlite3.Connection) -> None:
            set_meta(writer, "pinged", datetime.now(UTC).isoformat())

        with self._translated(), self._reader() as reader:
            reader.execute("SELECT id FROM imgsvc_images LIMIT 1").fetchone()
        # On a full disk images can be read and deleted, and a host that is taken out of service cannot be tidied up.
        with contextlib.suppress(NoSpace):
            self._write(note)

    def close(self) -> None:
        """Waits for the calls under way; a later one raises Unavailable."""
        self._closing.set()
        self._watch.join()
        self._recent.forget()
        with self._lock:
            readers = [self._readers.get() for _ in range(_READERS)]
            for connection in (*readers, self._writer):
                connection.close()
            for connection in readers:
                self._readers.put(connection)

    def _open(self, take_over: Callable[[sqlite3.Connection], None] | None) -> None:
        """Opens the file, with the ballast's room when the disk is too full even for that."""
        try:
            self._connect_all(take_over)
        except sqlite3.Error as error:
            if not (self._is_no_space(error) and self._ballast.drop()):
                raise
            self._connect_all(take_over)

    def _connect_all(self, take_over: Callable[[sqlite3.Connection], None] | None) -> None:
        with contextlib.ExitStack() as opened:

            def connect() -> sqlite3.Connection:
                connection = sqlite3.connect(
                    self._filename, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
                )
                opened.enter_context(contextlib.closing(connection))
                connection.execute("PRAGMA synchronous = FULL")
                return connection

            self._writer = connect()
            self._identity = self._commit(lambda writer: _prepare(writer, self._filename, take_over))
            # SQLite says nothing of it: a file that may only be read it opens as such.
            if not os.access(self._filename, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                raise ConfigError(f"{self._filename} cannot hold the metadata: it may not be written")
            # Only now: this writes to the file, and one that _prepare refuses may be somebody else's.
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
            self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
            for _ in range(_READERS):
                self._readers.put(connect())
            opened.pop_all()

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """One of a few connections that read while the writer writes."""
        connection = self._readers.get()
        try:
            yield connection
        finally:
            self._readers.put(connection)

    def _write(
        self, change: Callable[[sqlite3.Connection], _T], image_id: str = "", *, may_need_ballast: bool = False
    ) -> _T:
        """Commits `change`. One that deletes or settles a record gets the ballast's room when it needs it; a new
        record or a transfer's progress does not: it would use up the room and free nothing."""
        with self._lock, self._recent.writing(image_id) if image_id else contextlib.nullcontext(), self._translated():
            try:
                result = self._commit(change)
            except sqlite3.Error as error:
                if not (may_need_ballast and self._is_no_space(error) and self._ballast.drop()):
                    raise
                result = self._commit(change)
            self._ballast.restore()
            return result

    def _commit(self, change: Callable[[sqlite3.Connection], _T]) -> _T:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            result = change(self._writer)
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:  # SQLite itself rolls back after some errors
                self._writer.execute("ROLLBACK")
            raise
        return result

    def _watch_others(self) -> None:
        """What other processes write, such as `imgsvc scrub`, is seen by who reads the file, but not by `peek`."""
        version = None
        while not self._closing.is_set():
            # The writer's: that number changes by no commit of its own, and all of ours are.
            with self._lock, contextlib.suppress(sqlite3.Error):
                now = time.monotonic()
                found = self._writer.execute("PRAGMA data_version").fetchone()
                if found != version:
                    self._recent.forget()
                    version = found
                self._recent.trust(now + _TRUST_SECONDS)
            self._closing.wait(_WATCH_SECONDS)

    def _read_page(self, image_type: ImageType | None, after: str) -> Page:
        rows = self._rows(image_type, after)
        documents = [row[1] for row in rows]
        if not self._documents.know(documents):
            documents = [*_readable(rows, lambda row: self._documents.checked(row[1]))]
        return documents, rows[-1][0] if len(rows) == _PAGE else None

    def _rows(self, image_type: ImageType | None, after: str) -> Sequence[Any]:
        """Of one page, ordered by id. Each page is a read of its own: one that lasted as long as a slow client takes
        would keep the log from being reused."""
        with self._translated(), self._reader() as reader:
            if image_type is None:
                return reader.execute(_AFTER, (after, _PAGE)).fetchall()
            return reader.execute(_TYPE_AFTER, (image_type.value, after, _PAGE)).fetchall()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Clients read these sentences, so they name no path."""
        try:
            yield
        except UnicodeEncodeError as error:
            raise Invalid("the text of an image must be Unicode without lone surrogates") from error
        except sqlite3.Error as error:
            if self._is_no_space(error):
                raise NoSpace("no space left for the records of images") from error
            raise Unavailable(f"the records of images cannot be used now: {error}") from error

    def _is_no_space(self, error: sqlite3.Error) -> bool:
        """SQLite calls only a write's ENOSPC full. A quota (EDQUOT, which is what ZFS says), and a full disk met
        while syncing, are input/output errors to it; then the file system is asked."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest is SQLite's detail
        if code != sqlite3.SQLITE_IOERR:
            return code == sqlite3.SQLITE_FULL
        with contextlib.suppress(OSError):
            disk = os.statvfs(self._filename.parent)
            return disk.f_bavail * disk.f_frsize < BALLAST_SIZE
        return False


def insert_record(connection: sqlite3.Connection, image: Image, *, claimed_source: str | None) -> None:
    """Stores `image` as it is, at its revision. Raises ValueError when its text is no Unicode."""
    connection.execute(
        "INSERT INTO imgsvc_images (id, type, source, document, revision) VALUES (?, ?, ?, ?, ?)",
        (image.id, image.type.value, claimed_source, image.to_json(), image.revision),
    )


def get_meta(connection: sqlite3.Connection, key: str) -> str | None:
    row = connection.execute("SELECT value FROM imgsvc_meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def set_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
    connection.execute("INSERT OR REPLACE INTO imgsvc_meta (key, value) VALUES (?, ?)", (key, value))


def _prepare(
    connection: sqlite3.Connection, filename: Path, take_over: Callable[[sqlite3.Connection], None] | None
) -> str:
    """Makes the tables where they are missing, and returns the identity of the records."""
    connection.execute(_CREATE_META)
    schema = get_meta(connection, "schema")
    if schema is None:
        set_meta(connection, "schema", _SCHEMA)
        set_meta(connection, "identity", str(uuid.uuid4()))
    elif schema != _SCHEMA:
        raise ConfigError(f"{filename} has schema {schema}, of a newer imgsvc; this one knows schema {_SCHEMA}")
    connection.execute(_CREATE_IMAGES)
    connection.execute(_CREATE_TYPE_INDEX)
    if take_over is not None:
        take_over(connection)
    identity = get_meta(connection, "identity")
    if identity is None:
        raise ConfigError(f"{filename} does not say which records it holds: its table imgsvc_meta has no identity")
    return identity


def _search(connection: sqlite3.Connection, query: str, wanted: str) -> Image | None:
    row = connection.execute(query, (wanted,)).fetchone()
    try:
        return None if row is None else _image(row)
    except ValueError as error:
        raise Unavailable(_unreadable(row, error)) from error


def _find(connection: sqlite3.Connection, query: str, wanted: str) -> Image:
    image = _search(connection, query, wanted)
    if image is None:
        raise NotFound(f"there is no image {wanted}")
    return image


def _readable(rows: Sequence[Any], read: Callable[[Any], _T]) -> Iterator[_T]:
    """Without the records that somebody has spoilt: one must not hide the others."""
    for row in rows:
        try:
            yield read(row)
        except ValueError as error:
            _log.warning("record left out", reason=_unreadable(row, error))


def _image(row: Any) -> Image:
    _, document, revision = row
    return Image.from_json(document, revision)


def _unreadable(row: Any, error: ValueError) -> str:
    return f"the record of image {row[0]} cannot be read: {error}"
