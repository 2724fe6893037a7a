"""The record of one image, its document form, and the steps that its status may take."""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self

from imgsvc.foreign import read_json

UNKNOWN_SIZE = -1
# What the programs that read records take for a number, and what can be reckoned with as one.
LARGEST = 2**63 - 1
# How the error of an image begins that was complete, and what a person may still find of it is worth a look.
LOST = "the image was lost: "
DAMAGED = "the image is damaged: "
# The errors of images that the Go program had not ended, as far as its records say. Their files may be whole.
INTERRUPTED = "mistify-image-service stopped before the image was whole"
NO_REASON = "mistify-image-service could not get the image, and did not record why"

# Go writes the zero time for one that has not happened, and its clients cannot decode anything else in its place.
_NEVER = "0001-01-01T00:00:00Z"
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class ImageType(StrEnum):
    KVM = "kvm"
    CONTAINER = "container"


class Status(StrEnum):
    PENDING = "pending"
    DOWNLOADING = "downloading"
    COMPLETE = "complete"
    ERROR = "error"


def new_id() -> str:
    """A fresh version 4 UUID; one is never used twice."""
    return str(uuid.uuid4())


def is_id(text: str) -> bool:
    """Whether text can name an image: a UUID in its canonical, lower-case form, and so also a safe file name."""
    return _ID.fullmatch(text) is not None


def sha256_in_hex(text: str) -> str:
    """The digest as records have it, in lower case. Raises ValueError unless text is a SHA-256 in hex."""
    if _SHA256.fullmatch(text) is None:
        raise ValueError(f"not a SHA-256 in hex: {text!r}")
    return text.lower()


@dataclass(frozen=True, slots=True)
class Image:
    """What is known about one image. Sizes are bytes; a time is UTC, or None when it has not happened yet.

    `sha256` is the digest of the stored bytes, "" until they are complete; `expected_sha256` is what the sender said
    that it must be, "" when nobody did.

    `revision` is the store's: it says which state of the record this is, and a store's `update` compares it. It is
    not part of the document. `replicas` are the members that hold the bytes, None in a store that has no members; they
    are shown, and not part of what is stored either.
    """

    id: str
    type: ImageType
    source: str = ""
    comment: str = ""
    status: Status = Status.PENDING
    size: int = 0
    expected_size: int = 0
    download_start: datetime | None = None
    download_end: datetime | None = None
    sha256: str = ""
    error: str = ""
    expected_sha256: str = ""
    revision: int = 0
    replicas: tuple[str, ...] | None = None

    @property
    def was_lost(self) -> bool:
        """It was complete once, and no member has its bytes any more."""
        return self.status is Status.ERROR and self.error.startswith((LOST, DAMAGED))

    @property
    def may_have_been_whole(self) -> bool:
        """It is in error, and what bytes of it are found are left to a person."""
        return self.was_lost or (self.status is Status.ERROR and self.error in (INTERRUPTED, NO_REASON))

    @property
    def in_transfer(self) -> bool:
        """Whether somebody must still bring this image to an end."""
        return self.status in (Status.PENDING, Status.DOWNLOADING)

    def started(self, expected_size: int, size: int = 0) -> Self:
        """Bytes are about to arrive, of `size` that are there to `expected_size` as announced, or UNKNOWN_SIZE."""
        return dataclasses.replace(
            self,
            status=Status.DOWNLOADING,
            size=size,
            expected_size=expected_size,
            download_start=self.download_start or datetime.now(UTC),
            download_end=None,
        )

    def progressed(self, size: int) -> Self:
        """`size` bytes are stored so far."""
        return dataclasses.replace(self, size=size)

    def completed(self, size: int, sha256: str) -> Self:
        """All bytes are on the disk; `sha256` is their digest in hex."""
        return dataclasses.replace(
            self,
            status=Status.COMPLETE,
            size=size,
            sha256=sha256,
            error="",
            download_end=datetime.now(UTC),
        )

    def failed(self, reason: str) -> Self:
        """The image has no bytes and will get none by itself; `reason` is a sentence for a person."""
        return dataclasses.replace(self, status=Status.ERROR, sha256="", error=reason, download_end=datetime.now(UTC))

    def requeued(self) -> Self:
        """To be fetched from the beginning."""
        return dataclasses.replace(
            self,
            status=Status.PENDING,
            size=0,
            expected_size=0,
            download_start=None,
            download_end=None,
            sha256="",
            error="",
        )

    def at_revision(self, revision: int) -> Self:
        """The same, to be written over the record's state of that revision."""
        return dataclasses.replace(self, revision=revision)

    def to_document(self) -> dict[str, Any]:
        """The record as the wire contract has it: the Go program's keys in their order, then the new ones."""
        document: dict[str, Any] = {
            "id": self.id,
            "source": self.source,
            "type": self.type.value,
            "comment": self.comment,
            "status": self.status.value,
            "size": self.size,
            "expected_size": self.expected_size,
            "download_start": format_time(self.download_start),
            "download_end": format_time(self.download_end),
            "sha256": self.sha256,
            "error": self.error,
        }
        if self.expected_sha256:
            document["expected_sha256"] = self.expected_sha256
        if self.replicas is not None:
            document["replicas"] = list(self.replicas)
        return document

    def to_json(self) -> str:
        """The document as compact JSON, the way Go's encoder spaces it, without the newline."""
        return json.dumps(self.to_document(), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes, revision: int = 0) -> Self:
        """The record that a document describes, one written by the Go program included.

        Raises ValueError when it is none: not JSON, a key without which there is no image, or a value out of range.
        """
        return cls.from_document(read_json(text), revision)

    @classmethod
    def from_document(cls, document: object, revision: int = 0) -> Self:
        """As `from_json`, of one that has been parsed."""
        if not isinstance(document, dict):
            raise ValueError("an image document is a JSON object")
        try:
            return cls(
                id=_text(document, "id"),
                type=ImageType(_text(document, "type")),
                source=_text(document, "source", ""),
                comment=_text(document, "comment", ""),
                status=Status(_text(document, "status")),
                size=_integer(document, "size"),
                expected_size=_integer(document, "expected_size"),
                download_start=parse_time(_text(document, "download_start", _NEVER)),
                download_end=parse_time(_text(document, "download_end", _NEVER)),
                sha256=_text(document, "sha256", ""),
                error=_text(document, "error", ""),
                expected_sha256=_text(document, "expected_sha256", ""),
                revision=revision,
            )
        except KeyError as error:
            raise ValueError(f"an image document needs the key {error}") from error


def format_time(moment: datetime | None) -> str:
    """RFC 3339 in UTC with `Z`, no trailing zeros in the fraction, as Go writes it; None is Go's zero time."""
    if moment is None:
        return _NEVER
    text = moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
    return text.rstrip("0").rstrip(".") + "Z"


def parse_time(text: str) -> datetime | None:
    """The moment that RFC 3339 text names, to the microsecond; Go's zero time is None. Raises ValueError."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"not an RFC 3339 time: {text!r}")
    seconds, fraction, offset = match.groups()
    moment = datetime.fromisoformat(f"{seconds}.{(fraction or '')[:6]:0<6}{'+00:00' if offset == 'Z' else offset}")
    # Go's zero time may carry any offset, and then has no UTC form that datetime can hold.
    if moment.year == 1:
        return None
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"not a time that has a UTC form: {text!r}") from error


def _text(document: dict[str, Any], key: str, default: str | None = None) -> str:
    value = document[key] if default is None else document.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{key} is not a string")
    return value


def _integer(document: dict[str, Any], key: str) -> int:
    value = document.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key} is not an integer")
    if abs(value) > LARGEST:
        raise ValueError(f"{key} is out of range")
    return value
