"""What of a request's headers is taken for the digest of its body."""

from __future__ import annotations

import base64
import hashlib

import pytest
from tornado.httputil import HTTPHeaders

from imgsvc.api.digest_fields import announced_digest
from imgsvc.errors import Invalid

SHA256 = hashlib.sha256(b"image")
HEX = SHA256.hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


def field(digest: bytes = SHA256.digest(), algorithm: str = "sha-256") -> str:
    return f"{algorithm}=:{base64.b64encode(digest).decode()}:"


def headers(*lines: tuple[str, str]) -> HTTPHeaders:
    made = HTTPHeaders()
    for name, value in lines:
        made.add(name, value)
    return made


@pytest.mark.parametrize(
    "lines",
    [
        [("X-Image-Sha256", HEX)],
        [("X-Image-Sha256", HEX.upper())],
        [("Content-Digest", field())],
        [("Repr-Digest", field())],
        [("Content-Digest", f"{field(b'x' * 64, 'sha-512')}, {field()}")],
        [("Content-Digest", field(b"x" * 64, "sha-512")), ("Content-Digest", field())],
        [("Content-Digest", f"{field()};note=1")],
        [("X-Image-Sha256", HEX), ("Content-Digest", field()), ("Repr-Digest", field())],
    ],
)
def test_said(lines: list[tuple[str, str]]) -> None:
    """In each of the forms, alone and in agreement with others."""
    assert announced_digest(headers(*lines)) == HEX


@pytest.mark.parametrize("lines", [[], [("Content-Digest", field(b"x" * 64, "sha-512"))]])
def test_not_said(lines: list[tuple[str, str]]) -> None:
    """An algorithm that we do not know says nothing."""
    assert announced_digest(headers(*lines)) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Image-Sha256", ""),
        ("X-Image-Sha256", HEX[:-1]),
        ("X-Image-Sha256", HEX + "0"),
        ("X-Image-Sha256", "g" * 64),
        ("Content-Digest", HEX),
        ("Content-Digest", f"sha-256={HEX}"),
        ("Content-Digest", "sha-256=:!:"),
        ("Content-Digest", "sha-256=:abc:"),
        ("Content-Digest", field(SHA256.digest()[:-1])),
        ("Repr-Digest", f"{field()},"),
        ("Repr-Digest", ""),
    ],
)
def test_no_digest(name: str, value: str) -> None:
    """What is none is refused by the header's name."""
    with pytest.raises(Invalid, match=f"^invalid {name} header"):
        announced_digest(headers((name, value)))


def test_contradiction() -> None:
    with pytest.raises(Invalid, match="different digests"):
        announced_digest(headers(("X-Image-Sha256", OTHER), ("Repr-Digest", field())))
