"""What the headers of the tus protocol say, version 1.0.0 (https://tus.io/protocols/resumable-upload)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from email.utils import formatdate

from tornado.httputil import HTTPHeaders

from imgsvc.api.digest_fields import digest_in_hex
from imgsvc.api.images import parsed_type
from imgsvc.errors import Invalid
from imgsvc.metadata.image import Image, ImageType
from imgsvc.resumable import ALGORITHMS, Checksum

VERSION = "1.0.0"
EXTENSIONS = ("creation", "creation-with-upload", "termination", "expiration", "checksum")
CONTENT_TYPE = "application/offset+octet-stream"

_NUMBER = re.compile(r"[0-9]{1,18}")
_PAIR = re.compile(r"[ \t]*([^ ,\t]+)(?: ([A-Za-z0-9+/=]*))?[ \t]*")


@dataclass(frozen=True, slots=True)
class Creation:
    """What a client wants to upload. `metadata` is as it gave it."""

    image_type: ImageType
    comment: str
    length: int
    sha256: str
    metadata: str


def creation(headers: HTTPHeaders) -> Creation:
    """Raises Invalid, which says which header is wrong."""
    if "Upload-Defer-Length" in headers:
        raise Invalid("Upload-Defer-Length is not offered: Upload-Length must say how long the upload is")
    if "Upload-Concat" in headers:
        raise Invalid("Upload-Concat is not offered")
    text = ",".join(headers.get_list("Upload-Metadata"))
    metadata = _metadata(text)
    sha256 = metadata.get("sha256", b"").decode("latin-1")
    return Creation(
        parsed_type(metadata.get("type", b"").decode("latin-1"), "Upload-Metadata has no valid type: kvm or container"),
        metadata.get("comment", b"").decode("utf-8", "replace"),
        number(headers, "Upload-Length"),
        sha256 and digest_in_hex(sha256, "sha256 in Upload-Metadata"),
        text,
    )


def number(headers: HTTPHeaders, name: str) -> int:
    """Raises Invalid unless there is one such header, and it is a number of bytes."""
    found = headers.get_list(name)
    if len(found) != 1 or not _NUMBER.fullmatch(found[0]):
        raise Invalid(f"missing or invalid {name} header")
    return int(found[0])


def checksum(headers: HTTPHeaders) -> Checksum | None:
    """Of the body, None when it is not said. Raises Invalid when it is not to be understood."""
    found = headers.get_list("Upload-Checksum")
    if not found:
        return None
    algorithm, _, text = found[0].partition(" ")
    if algorithm not in ALGORITHMS:
        raise Invalid(f"the algorithm of Upload-Checksum is none of {', '.join(ALGORITHMS)}")
    try:
        digest = base64.b64decode(text, validate=True)
    except binascii.Error:
        digest = b""
    if len(found) > 1 or len(digest) != hashlib.new(algorithm, usedforsecurity=False).digest_size:
        raise Invalid("invalid Upload-Checksum header")
    return Checksum(algorithm, digest)


def metadata_of(image: Image) -> str:
    """Upload-Metadata of which only the image is left."""
    pairs = (("type", image.type.value), ("comment", image.comment), ("sha256", image.expected_sha256))
    return ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in pairs if value)


def expiry(moment: float) -> str:
    """A Unix time as Upload-Expires has it."""
    return formatdate(moment, usegmt=True)


def _metadata(text: str) -> dict[str, bytes]:
    metadata: dict[str, bytes] = {}
    for pair in text.split(",") if text.strip() else ():
        match = _PAIR.fullmatch(pair)
        if match is None or match[1] in metadata:
            raise Invalid("invalid Upload-Metadata header")
        try:
            metadata[match[1]] = base64.b64decode(match[2] or "", validate=True)
        except binascii.Error as error:
            raise Invalid("invalid Upload-Metadata header") from error
    return metadata
