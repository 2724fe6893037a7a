"""What the rows about a cluster share: its members, and an etcd that is full of records."""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime

import grpc

from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import Layout
from imgsvc.etcd_messages import put
from imgsvc.metadata.image import Image, ImageType, format_time, new_id
from tests.bench.stage import Stage
from tests.harness import Service

_BYTES = b"the bytes of a small image"
# etcd takes 128 operations in a transaction by default.
_PUTS = 99
# ext4 takes 65,000 for a file.
_LINKS = 60_000
# Of transactions.
_AHEAD = 8
_PUT_SECONDS = 60.0


def member(stage: Stage, prefix: str, name: str, **settings: object) -> Service:
    """One that is not started yet, with this id, and its images in a directory of that name."""
    return Service(
        stage.directory / name,
        metadata_store_type="etcd",
        metadata_store_config_machines=stage.etcd.endpoints,
        metadata_store_config_prefix=prefix,
        cluster_member_id=name,
        cluster_secret="known to the members of a benchmark",
        **settings,
    )


def fill(stage: Stage, prefix: str, members: Sequence[Service], count: int) -> None:
    """So many complete images, spread evenly over the members, which do not run: records, claims and notes in etcd, and
    the few bytes of each on the disk."""
    homes: list[Mapping[str, str]] = []
    for each in members:
        each.images_dir.mkdir(parents=True, exist_ok=True)
        homes.append({"member": each.data_dir.name, "site": f"{socket.gethostname()}:{each.images_dir}"})
    layout, digest = Layout(prefix), hashlib.sha256(_BYTES).hexdigest()

    def puts() -> Iterator[bytes]:
        for number, (home, each) in zip(range(count), itertools.cycle(zip(homes, members, strict=True)), strict=False):
            image = _image(number, digest)
            if number % _LINKS < len(members):
                (each.data_dir / "bytes").unlink(missing_ok=True)
                (each.data_dir / "bytes").write_bytes(_BYTES)
            # A link, for to make a file takes some file systems a millisecond.
            (each.images_dir / image.id).hardlink_to(each.data_dir / "bytes")
            note = {"verified": format_time(image.download_end), "site": home["site"], "url": "http://127.0.0.1:20000"}
            yield _put(layout.record(image.id), image.to_json())
            yield _put(layout.source(image.source), image.id)
            yield _put(layout.replica(image.id, home["member"]), json.dumps(note))

    pending = puts()
    transactions = iter(lambda: b"".join(itertools.islice(pending, _PUTS)), b"")
    with grpc.insecure_channel(stage.etcd.endpoints[0].removeprefix("http://")) as channel:
        transact = channel.unary_unary("/etcdserverpb.KV/Txn", request_serializer=None, response_deserializer=None)
        under_way: deque[grpc.CallFuture[bytes]] = deque()
        for transaction in transactions:
            under_way.append(transact.future(transaction, timeout=_PUT_SECONDS))
            if len(under_way) > _AHEAD:
                under_way.popleft().result()
        for each_left in under_way:
            each_left.result()


def stand_in(stage: Stage, prefix: str, each: Service) -> None:
    """Has a member that does not run look like one that does, so that nobody copies what it is to hold."""
    description = {"url": "http://127.0.0.1:9", "version": "", "free": None, "started": format_time(datetime.now(UTC))}
    with closing(Etcd(stage.etcd.endpoints)) as etcd:
        etcd.transact([], [put(Layout(prefix).member(each.data_dir.name), json.dumps(description))])


def database_bytes(stage: Stage) -> int:
    """How large the file of etcd's database is."""
    return int(stage.etcd.call("/v3/maintenance/status", {})["dbSize"])


def _image(number: int, digest: str) -> Image:
    source = f"http://mirror.example.com/images/debian-12-generic-amd64-{number}.img"
    image = Image(new_id(), ImageType.KVM, source, comment=f"image {number} of a benchmark")
    return image.started(len(_BYTES)).completed(len(_BYTES), digest)


def _put(key: str, value: str) -> bytes:
    """One operation of etcd's TxnRequest, as protobuf encodes it: in its pure Python, which the service's own client
    has to use, 300,000 of them take minutes."""
    put = _field(1, key.encode()) + _field(2, value.encode())
    return _field(2, _field(2, put))


def _field(number: int, content: bytes) -> bytes:
    size, rest = b"", len(content)
    while rest >= 0x80:
        size += bytes([rest & 0x7F | 0x80])
        rest >>= 7
    return bytes([number << 3 | 2]) + size + bytes([rest]) + content
