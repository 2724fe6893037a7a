"""What is said to etcd and what it answers, in types of our own. The one module that imports etcd3."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from imgsvc.foreign import read_json

# etcd3's generated code is older than what protobuf's compiled parser accepts; the one in pure Python still takes it.
# It is chosen when protobuf is first imported, so nothing else in this program may import that.
os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from etcd3 import Etcd3Client, etcdrpc

__all__ = ["Etcd3Client", "etcdrpc"]

Operation = Any
Comparison = Any


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as it was read. `created` and `modified` are revisions."""

    key: str
    value: bytes
    created: int
    modified: int

    @property
    def text(self) -> str:
        """The value, for one that we compare with names of ours; what is no UTF-8 is none of them."""
        return self.value.decode(errors="replace")

    @property
    def document(self) -> dict[str, Any]:
        """The JSON object that the value is; an empty one when another program has written something else."""
        try:
            found = read_json(self.value)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class Page:
    """What a read found, in the order of keys; `more` when the limit cut it. `revision` is the cluster's."""

    items: Sequence[KeyValue]
    more: bool
    revision: int
    cluster: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a transaction did: which branch ran, and what each of its operations read or deleted.

    `repeated`: an attempt before this one got no answer, so that its doing may be what this one found.
    """

    succeeded: bool
    revision: int
    found: Sequence[Sequence[KeyValue]]
    repeated: bool


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a key at a revision; `item` is None when it was deleted."""

    key: str
    item: KeyValue | None
    revision: int


@dataclass(frozen=True, slots=True)
class Changes:
    """In the order in which they happened; `revision` is the one up to which all were told."""

    changes: Sequence[Change]
    revision: int


def put(key: str, value: str, lease: int = 0) -> Operation:
    return etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=raw(key), value=value.encode(), lease=lease))


def read(key: str, end: str = "") -> Operation:
    return etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=raw(key), range_end=raw(end)))


def delete(key: str, end: str = "") -> Operation:
    """Deletes the key, or all from it up to `end`; the outcome has what they were."""
    return etcdrpc.RequestOp(
        request_delete_range=etcdrpc.DeleteRangeRequest(key=raw(key), range_end=raw(end), prev_kv=True)
    )


def when(comparison: Comparison, operation: Operation) -> Operation:
    """The operation, if the comparison holds; else nothing."""
    return etcdrpc.RequestOp(request_txn=etcdrpc.TxnRequest(compare=[comparison], success=[operation]))


def exists(key: str) -> Comparison:
    return etcdrpc.Compare(
        target=etcdrpc.Compare.CREATE, result=etcdrpc.Compare.GREATER, key=raw(key), create_revision=0
    )


def created_at(key: str, revision: int) -> Comparison:
    """Whether the key is the one that was created at this revision; 0 is a key that does not exist."""
    return etcdrpc.Compare(target=etcdrpc.Compare.CREATE, key=raw(key), create_revision=revision)


def modified_at(key: str, revision: int) -> Comparison:
    """Whether the key was last written at this revision; 0 is a key that does not exist."""
    return etcdrpc.Compare(target=etcdrpc.Compare.MOD, key=raw(key), mod_revision=revision)


def none_between(key: str, end: str) -> Comparison:
    """Whether there is no key from `key` up to `end`."""
    return etcdrpc.Compare(target=etcdrpc.Compare.CREATE, key=raw(key), range_end=raw(end), create_revision=0)


def has_value(key: str, value: str) -> Comparison:
    """Whether the key exists and has this value."""
    return etcdrpc.Compare(target=etcdrpc.Compare.VALUE, key=raw(key), value=value.encode())


def raw(text: str) -> bytes:
    """Keys are bytes to etcd; those that are no UTF-8 survive the way there and back."""
    return text.encode(errors="surrogateescape")


def text(raw_key: bytes) -> str:
    return raw_key.decode(errors="surrogateescape")


def key_values(found: Iterable[Any]) -> list[KeyValue]:
    return [KeyValue(text(kv.key), kv.value, kv.create_revision, kv.mod_revision) for kv in found]


def found_by(response: Any) -> list[KeyValue]:
    """What one operation of a transaction read or deleted."""
    return key_values(response.response_range.kvs) or key_values(response.response_delete_range.prev_kvs)


def changes_by(answer: Any) -> Changes:
    """What one message of a watch tells: events, or without any how far it is."""
    changes = []
    for event in answer.events:
        (item,) = key_values([event.kv])
        changes.append(Change(item.key, None if event.type == event.DELETE else item, item.modified))
    return Changes(changes, changes[-1].revision if changes else answer.header.revision)
