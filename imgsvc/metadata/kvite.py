"""Metadata store type "kvite": the sqlite store on the file of the Go program, whose records it first takes over."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import structlog

from imgsvc.errors import ConfigError
from imgsvc.foreign import read_json
from imgsvc.metadata.go_program import taken_over
from imgsvc.metadata.image import Image, Status, is_id
from imgsvc.metadata.sqlite import SqliteMetadataStore, get_meta, insert_record, set_meta
from imgsvc.metadata.store import Member

_log = structlog.get_logger()

_BUCKET = "images"
_NOTE = "kvite_import"
# The keys of all records that were imported or left out.
_KEYS = "imgsvc_kvite"


def open_kvite(filename: Path, table: str, member: Member) -> SqliteMetadataStore:
    """Opens the Go program's file, importing those of its records that were not imported before; its table stays as it
    was.

    Raises ConfigError when the file or the table is missing: what starts without the old records takes their images
    for orphans.
    """
    try:
        filename.stat()
    except OSError as error:
        raise ConfigError(f"there is no kvite file {filename}: {error.strerror}") from error
    return SqliteMetadataStore(filename, member, lambda connection: import_kvite(connection, filename, table))


def import_kvite(connection: sqlite3.Connection, filename: Path, table: str) -> None:
    """Copies the records of the Go program's table into ours, within the caller's transaction: all, and at a later
    start those that the Go program has added since, for their images are in the directory too. What was deleted or
    changed here stays so.

    A record that cannot be read is left out, with a warning.
    """
    noted = get_meta(connection, _NOTE)
    if noted is None:
        _require_table(connection, filename, table)
    elif not _exists(connection, table):
        return  # it is not needed any more
    first = not _exists(connection, _KEYS)
    connection.execute(f"CREATE TABLE IF NOT EXISTS {_KEYS} (key BLOB PRIMARY KEY NOT NULL) WITHOUT ROWID")
    quoted = '"' + table.replace('"', '""') + '"'
    added = 0
    if noted is None or not first:  # else an earlier version imported them, and noted no keys
        added = _import(connection, filename, table, quoted, read_json(noted or "{}"))
    if added or first:
        connection.execute(
            f"INSERT OR IGNORE INTO {_KEYS} SELECT CAST(key AS BLOB) FROM {quoted} WHERE bucket = ?",  # noqa: S608 quoted, and SQL has no parameter for a table
            (_BUCKET,),
        )


def _import(connection: sqlite3.Connection, filename: Path, table: str, quoted: str, noted: dict[str, Any]) -> int:
    """How many records were not known yet."""
    imported = left_out = 0
    claims: dict[str, Image] = {}
    # As bytes: a record whose text is broken must not hide the others.
    rows = connection.execute(
        f"SELECT CAST(key AS BLOB), CAST(value AS BLOB) FROM {quoted} WHERE bucket = ?"  # noqa: S608 as above
        f" AND CAST(key AS BLOB) NOT IN (SELECT key FROM {_KEYS}) ORDER BY rowid",
        (_BUCKET,),
    ).fetchall()
    for key, value in rows:
        try:
            image = taken_over(_parsed(key, value))
            _insert(connection, image)
        except ValueError as error:
            left_out += 1
            _log.warning("kvite record left out", key=key.decode(errors="replace"), reason=str(error))
            continue
        imported += 1
        if image.source and _outranks(image, claims.get(image.source)):
            claims[image.source] = image
    # Not where another image has the source by now.
    connection.executemany(
        "UPDATE OR IGNORE imgsvc_images SET source = ? WHERE id = ?",
        [(source, image.id) for source, image in claims.items()],
    )
    if rows or not noted:
        total = {"imported": imported + noted.get("imported", 0), "left_out": left_out + noted.get("left_out", 0)}
        set_meta(connection, _NOTE, json.dumps({"table": table} | total))
        _log.info("kvite file imported", filename=str(filename), table=table, imported=imported, left_out=left_out)
    return len(rows)


def _insert(connection: sqlite3.Connection, image: Image) -> None:
    """Raises ValueError when it cannot be."""
    try:
        insert_record(connection, image, claimed_source=None)
    except sqlite3.IntegrityError as error:
        raise ValueError("another image has its id") from error


def _exists(connection: sqlite3.Connection, table: str) -> bool:
    found = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name = ? COLLATE NOCASE", (table,)
    )
    return found.fetchone() is not None


def _require_table(connection: sqlite3.Connection, filename: Path, table: str) -> None:
    if not _exists(connection, table):
        raise ConfigError(f"{filename} has no table {table!r} to import images from")


def _parsed(key: bytes, value: bytes) -> Image:
    """Raises ValueError when there is no image in it."""
    image = Image.from_json(value, revision=1)
    if not is_id(image.id) or image.id.encode() != key:
        raise ValueError(f"its id is {image.id!r}")
    return image


def _outranks(image: Image, claimant: Image | None) -> bool:
    """Parallel requests made the Go program keep two images of one source; a whole one is worth more."""
    if claimant is None:
        return True
    return image.status is Status.COMPLETE and claimant.status is not Status.COMPLETE
