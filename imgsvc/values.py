"""Kinds of values: how a setting's value is written in a file, and in an environment variable or a flag."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Kind:
    """`expects` completes the sentence "it must be …". `read` takes what a file holds and `from_text` makes that
    out of one string; both raise ValueError. `shown` is False for what no log and no error message may quote."""

    expects: str
    read: Callable[[object], Any]
    from_text: Callable[[str], object] = str
    shown: bool = True


@dataclass(frozen=True, slots=True)
class Reserve:
    """Space to leave free: a number of bytes, or a part of the file system's size."""

    bytes: int = 0
    part: float = 0.0

    def of(self, total: int) -> int:
        """Bytes to leave free on a file system of `total` bytes."""
        return self.bytes + math.ceil(total * self.part)

    @classmethod
    def parse(cls, value: object) -> Self:
        """Bytes as an integer, or a percentage below 100 as text: "1%"."""
        if isinstance(value, str) and value.endswith("%"):
            percent = float(value[:-1])
            if not 0 <= percent < 100:  # noqa: PLR2004 - a percentage
                raise ValueError(value)
            return cls(part=percent / 100)
        return cls(bytes=_integer(value))


def integer(low: int, high: int) -> Kind:
    def read(value: object) -> int:
        number = _integer(value)
        if not low <= number <= high:
            raise ValueError(number)
        return number

    return Kind(f"an integer from {low} to {high}", read, int)


def size() -> Kind:
    return Kind("a number of bytes, 0 or more", _integer, int)


def seconds(low: float, high: float) -> Kind:
    def read(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(value)
        # Written so that NaN is out of range.
        if not low <= value <= high:
            raise ValueError(value)
        return float(value)

    return Kind(f"a number of seconds from {low:g} to {high:.12g}", read, float)


def boolean() -> Kind:
    words = {"true": True, "1": True, "false": False, "0": False}

    def read(value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError(value)
        return value

    def from_text(text: str) -> bool:
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]

    return Kind("true or false", read, from_text)


def text() -> Kind:
    return Kind("a string", _text)


def secret() -> Kind:
    return Kind("a string", _text, shown=False)


def choice(*words: str) -> Kind:
    def read(value: object) -> str:
        word = _text(value)
        if word not in words:
            raise ValueError(value)
        return word

    return Kind(f"one of {', '.join(words)}", read)


def log_level() -> Kind:
    """A level by the name that Python's logging has for it, from that or any name that the Go program took."""
    names = {"warn": "warning", "fatal": "critical", "panic": "critical"}
    levels = choice("debug", "info", "warning", "error", "critical")

    def read(value: object) -> object:
        word = _text(value).lower()
        return levels.read(names.get(word, word))

    return Kind(f"{levels.expects}, fatal", read)


def path() -> Kind:
    """An absolute path, or one that starts at the working directory; empty is None."""

    def read(value: object) -> Path | None:
        name = _text(value)
        return Path(name).absolute() if name else None

    return Kind("a path", read)


def prefix() -> Kind:
    """The front of a key in etcd: begins with a slash and does not end with one, or is empty."""

    def read(value: object) -> str:
        name = _text(value).strip("/")
        return f"/{name}" if name else ""

    return Kind("a string", read)


def reserve() -> Kind:
    def from_text(text: str) -> object:
        return text if text.endswith("%") else int(text)

    return Kind('a number of bytes, or a percentage below 100 such as "1%"', Reserve.parse, from_text)


def percentage() -> Kind:
    """Read as the part that it is."""

    def read(value: object) -> float:
        text = _text(value)
        part = float(text.removesuffix("%")) / 100
        if not text.endswith("%") or not 0 < part <= 1:
            raise ValueError(value)
        return part

    return Kind('a percentage such as "90%"', read)


def is_name(word: str) -> bool:
    """Whether it may be part of a key and of a log line."""
    return _NAME.fullmatch(word) is not None


def name() -> Kind:
    """What may be part of a key and of a log line; or empty."""

    def read(value: object) -> str:
        word = _text(value)
        if word and not is_name(word):
            raise ValueError(value)
        return word

    return Kind("at most 64 of the characters A-Z a-z 0-9 . _ -", read)


def networks() -> Kind:
    def read(value: object) -> tuple[IPv4Network | IPv6Network, ...]:
        return tuple(ip_network(item) for item in _texts(value))

    return Kind('a list of networks such as "10.0.0.0/8" or "fe80::/10"', read, _split)


def url() -> Kind:
    """Scheme, host and port; or empty."""

    def read(value: object) -> str:
        text = _text(value)
        return _url(text) if text else ""

    return Kind('a URL such as "http://10.0.0.1:20000"', read, shown=False)


def urls() -> Kind:
    def read(value: object) -> tuple[str, ...]:
        return tuple(_url(item) for item in _texts(value))

    # One with a password in it is refused, and must not be quoted for that.
    return Kind('a list of URLs such as "http://10.0.0.1:2379"', read, _split, shown=False)


def _integer(value: object) -> int:
    """Not negative. True and False are integers to Python, and mistakes in a setting."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(value)
    return value


def _text(value: object) -> str:
    # The operating system ends a path, a host name and a user name at NUL.
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(value)
    return value


def _texts(value: object) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(value)
    return [_text(item) for item in value]


def _split(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _url(item: str) -> str:
    """Scheme, host and port only: user and password have settings of their own, which logs leave out."""
    parts = urlsplit(item)
    # Reading `port` raises ValueError when it is no port.
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(item)
    if parts.username is not None or parts.query or parts.fragment or parts.path not in ("", "/"):
        raise ValueError(item)
    return f"{parts.scheme}://{parts.netloc}"
