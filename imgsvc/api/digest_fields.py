"""What a request's headers say that the digest of its body must be."""

from __future__ import annotations

import base64
import binascii
import re

from tornado.httputil import HTTPHeaders

from imgsvc.errors import Invalid
from imgsvc.metadata.image import sha256_in_hex

_OURS = "X-Image-Sha256"
# A body here is its whole representation, so both mean the same bytes (RFC 9530, sections 2 and 3).
_STANDARD = ("Content-Digest", "Repr-Digest")
# One member of a dictionary whose values are byte sequences (RFC 8941, sections 3.2 and 3.3.5).
_MEMBER = re.compile(r"[ \t]*([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/=]*):[ \t]*(?:;[^,]*)?")
_LENGTH = 32


def announced_digest(headers: HTTPHeaders) -> str:
    """The SHA-256 in hex that the sender says the body has, "" when it does not say. Raises Invalid when a header is
    no digest, or two say different things."""
    said = [digest_in_hex(text, f"{_OURS} header") for text in headers.get_list(_OURS)]
    said += [digest for name in _STANDARD if (digest := _standard_digest(name, headers.get_list(name)))]
    if len(set(said)) > 1:
        raise Invalid("the headers announce different digests")
    return said[0] if said else ""


def digest_in_hex(text: str, name: str) -> str:
    """In lower case. Raises Invalid, with the name of what was wrong."""
    try:
        return sha256_in_hex(text)
    except ValueError as error:
        raise Invalid(f"invalid {name}: a SHA-256 is 64 hex digits") from error


def _standard_digest(name: str, lines: list[str]) -> str:
    """Of several algorithms the one that we know; "" when it is not among them (RFC 9530, section 5)."""
    digest = ""
    for member in ",".join(lines).split(",") if lines else ():
        match = _MEMBER.fullmatch(member)
        if match is None:
            raise Invalid(f"invalid {name} header")
        if match[1] == "sha-256":
            digest = _decoded(match[2], name)
    return digest


def _decoded(text: str, name: str) -> str:
    try:
        digest = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise Invalid(f"invalid {name} header") from error
    if len(digest) != _LENGTH:
        raise Invalid(f"invalid {name} header: a SHA-256 has {_LENGTH} bytes")
    return digest.hex()
