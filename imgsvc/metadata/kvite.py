"""Metadata store type "kvite": the sqlite store on the file of the Go program, whose records it first takes over."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import structlog

from imgsvc.errors import ConfigError
from imgsvc.metadata.go_program import taken_over
from imgsvc.metadata.image import Image, Status, is_id
from imgsvc.metadata.sqlite import SqliteMetadataStore, get_meta, insert_record, set_meta
from imgsvc.metadata.store import Member

_log = structlog.get_logger()

_BUCKET = "images"
_NOTE = "kvite_import"


def open_kvite(filename: Path, table: str, member: Member) -> SqliteMetadataStore:
    """Opens the Go program's file, importing its records unless that was done before; its table stays as it was.

    Raises ConfigError when the file or the table is missing: what starts without the old records takes their images
    for orphans.
    """
    try:
        filename.stat()
    except OSError as error:
        raise ConfigError(f"there is no kvite file {filename}: {error.strerror}") from error
    return SqliteMetadataStore(filename, member, lambda connection: import_kvite(connection, filename, table))


def import_kvite(connection: sqlite3.Connection, filename: Path, table: str) -> None:
    """Copies the records of the Go program's table into ours, once, within the caller's transaction.

    A record that cannot be read is left out, with a warning.
    """
    if get_meta(connection, _NOTE) is not None:
        return
    imported = left_out = 0
    claims: dict[str, Image] = {}
    for key, value in _rows(connection, filename, table):
        try:
            image = taken_over(_parsed(key, value))
            insert_record(connection, image, claimed_source=None)
        except ValueError as error:
            left_out += 1
            _log.warning("kvite record left out", key=key.decode(errors="replace"), reason=str(error))
            continue
        imported += 1
        if image.source and _outranks(image, claims.get(image.source)):
            claims[image.source] = image
    connection.executemany(
        "UPDATE imgsvc_images SET source = ? WHERE id = ?", [(source, image.id) for source, image in claims.items()]
    )
    set_meta(connection, _NOTE, json.dumps({"table": table, "imported": imported, "left_out": left_out}))
    _log.info("kvite file imported", filename=str(filename), table=table, imported=imported, left_out=left_out)


def _rows(connection: sqlite3.Connection, filename: Path, table: str) -> sqlite3.Cursor:
    """(key, value) of every record, as bytes: a record whose text is broken must not hide the others."""
    known = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name = ? COLLATE NOCASE", (table,)
    ).fetchone()
    if known is None:
        raise ConfigError(f"{filename} has no table {table!r} to import images from")
    quoted = '"' + table.replace('"', '""') + '"'
    return connection.execute(
        f"SELECT CAST(key AS BLOB), CAST(value AS BLOB) FROM {quoted} WHERE bucket = ? ORDER BY rowid",  # noqa: S608 quoted, and SQL has no parameter for a table
        (_BUCKET,),
    )


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
