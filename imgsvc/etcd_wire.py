"""etcd's answer to a read, from its bytes. The generated code would do, but it parses in pure Python, message by message
and field by field, and a member reads some hundred thousand keys when it starts: this takes a quarter of that time.

Protobuf's encoding: https://protobuf.dev/programming-guides/encoding/; the numbers of fields are those of etcd's
`RangeResponse`, `ResponseHeader` and `mvccpb.KeyValue`, which never change.
"""

from __future__ import annotations

from collections.abc import Iterator

from imgsvc.etcd_messages import KeyValue, Page, text

# Of each byte of an integer, the bit that says that another one follows.
_MORE_BYTES = 0x80
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_KEY, _CREATED, _MODIFIED, _VALUE = 1, 2, 3, 5
_HEADER, _ITEMS, _MORE = 1, 2, 3
_CLUSTER, _REVISION = 1, 3


def page(message: bytes) -> Page:
    """What a `RangeResponse` says. Raises ValueError or IndexError when `message` is none."""
    items: list[KeyValue] = []
    more, revision, cluster = 0, 0, 0
    for number, value, content in _fields(message):
        if number == _ITEMS:
            items.append(_key_value(content))
        elif number == _MORE:
            more = value
        elif number == _HEADER:
            header = {number: value for number, value, _ in _fields(content)}
            revision, cluster = header.get(_REVISION, 0), header.get(_CLUSTER, 0)
    return Page(items, bool(more), revision, cluster)


def _key_value(message: bytes) -> KeyValue:
    key = value = b""
    created = modified = 0
    for number, integer, content in _fields(message):
        if number == _KEY:
            key = content
        elif number == _VALUE:
            value = content
        elif number == _CREATED:
            created = integer
        elif number == _MODIFIED:
            modified = integer
    return KeyValue(text(key), value, created, modified)


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The number of each field, with its value if it is an integer, or else its content."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(message, at)
            if at + size > end:
                raise ValueError("etcd's answer ends early")
            yield tag >> 3, 0, message[at : at + size]
            at += size
        elif kind == _VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value, b""
        elif kind in (_FIXED_32, _FIXED_64):
            at += 4 if kind == _FIXED_32 else 8
        else:
            raise ValueError(f"etcd's answer has a field of kind {kind}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The integer there, and where it ends."""
    value = message[at]
    at += 1
    if value < _MORE_BYTES:
        return value, at
    value, shift = value & ~_MORE_BYTES, 7
    while True:
        byte = message[at]
        at += 1
        value |= (byte & ~_MORE_BYTES) << shift
        if byte < _MORE_BYTES:
            return value, at
        shift += 7
