"""Opens the stores that the settings name. The one place that knows which concrete store stands behind a protocol."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import structlog

from imgsvc.cluster.this_member import ThisMember
from imgsvc.errors import ConfigError
from imgsvc.images.directory import sync_directory
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.memory import MemoryImageStore
from imgsvc.images.store import ImageStore
from imgsvc.metadata.kvite import open_kvite
from imgsvc.metadata.memory import MemoryMetadataStore
from imgsvc.metadata.mirror import Mirror
from imgsvc.metadata.sqlite import SqliteMetadataStore
from imgsvc.metadata.store import Member, MetadataStore
from imgsvc.settings import Settings

if TYPE_CHECKING:
    from imgsvc.cluster.membership import Membership

log = structlog.get_logger()


class _Closable(Protocol):
    def close(self) -> None: ...


Closing = TypeVar("Closing", bound=_Closable)


@contextlib.contextmanager
def opened_beside(settings: Settings) -> Iterator[tuple[ImageStore, MetadataStore]]:
    """The stores, for a short work on complete images beside a service that uses them, if one runs: nothing is locked,
    nobody is told of another member, and no image can come in. Raises ConfigError unless a service has used them."""
    files = settings.metadata_store.type in ("sqlite", "kvite")
    if settings.image_store.type == "memory" or settings.metadata_store.type == "memory":
        raise ConfigError("what is kept in memory is seen by the service alone")
    if files and not settings.metadata_store.filename.exists():
        raise ConfigError(f"there are no records in {settings.metadata_store.filename}")
    with contextlib.ExitStack() as opened:
        images = closed_by(opened, FilesystemImageStore(settings.image_store.directory, beside=True))
        member = Member(id=images.member, site=_site(images), url="")
        yield images, open_records(settings, member, opened)[0]


def this_member(settings: Settings, images: ImageStore, port: int) -> Member:
    """As records name it; it listens on this port."""
    return Member(
        id=settings.cluster.member_id or images.member,
        site=_site(images),
        url=settings.cluster.advertise_url or f"http://{reachable(settings.host)}:{port}",
    )


def _site(images: ImageStore) -> str:
    return f"{socket.gethostname()}:{images.place}"


def _seat(settings: Settings) -> str:
    """Names the place of this process: the directory that it has locked, on this machine since it was booted."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    if settings.image_store.type == "memory":
        return f"{boot}/{os.getpid()}"
    found = settings.image_store.directory.stat()
    return f"{boot}/{found.st_dev}:{found.st_ino}"


def reachable(host: str) -> str:
    """What other hosts may find in a URL for the address that the service listens on."""
    if host in ("", "0.0.0.0", "::"):  # noqa: S104 - compared, not listened on
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def closed_by(stack: contextlib.ExitStack, thing: Closing) -> Closing:
    stack.callback(thing.close)
    return thing


def open_images(settings: Settings) -> ImageStore:
    if settings.image_store.type == "memory":
        return MemoryImageStore()
    _make_data_dir(settings, settings.image_store.directory)
    return FilesystemImageStore(settings.image_store.directory)


def open_records(
    settings: Settings,
    member: Member,
    opened: contextlib.ExitStack,
    this: ThisMember | None = None,
    mirror: Mirror | None = None,
    *,
    position: str = "",
) -> tuple[MetadataStore, Membership | None]:
    """`this` is the member that transfers, `mirror` is what is to be filled; None for a work beside it. `position` is
    how far the last run had come. Where records are not shared, there is no membership."""
    wanted = settings.metadata_store
    if wanted.type == "etcd":
        return _open_etcd(settings, member, opened, this, mirror, position=position)
    if wanted.type == "memory":
        return MemoryMetadataStore(member), None
    _make_data_dir(settings, wanted.filename)
    store = (
        open_kvite(wanted.filename, wanted.table, member)
        if wanted.type == "kvite"
        else SqliteMetadataStore(wanted.filename, member)
    )
    opened.callback(store.close)
    return store, None


def _open_etcd(
    settings: Settings,
    member: Member,
    opened: contextlib.ExitStack,
    this: ThisMember | None,
    mirror: Mirror | None,
    *,
    position: str,
) -> tuple[MetadataStore, Membership | None]:
    # Late: who does without etcd need not load gRPC.
    from imgsvc.cluster.membership import Membership, NoLease  # noqa: PLC0415
    from imgsvc.etcd import Etcd  # noqa: PLC0415
    from imgsvc.metadata.etcd import EtcdMetadataStore  # noqa: PLC0415

    wanted = settings.metadata_store
    etcd = closed_by(
        opened,
        Etcd(
            wanted.machines,
            cert=wanted.cert,
            key=wanted.key,
            ca_cert=wanted.ca_cert,
            user=wanted.user,
            password=wanted.password,
        ),
    )
    membership: Membership | None = None
    if this is not None:
        if not settings.cluster.secret:
            log.warning(
                "without cluster.secret, whoever reaches this service is believed to be a member of the cluster"
            )
        ttl = settings.cluster.lease_ttl
        membership = closed_by(opened, Membership(etcd, wanted.prefix, this, seat=_seat(settings), ttl=ttl))
    store = EtcdMetadataStore(etcd, wanted.prefix, member, membership or NoLease(), mirror, position=position)
    return closed_by(opened, store), membership


def _make_data_dir(settings: Settings, path: Path) -> None:
    """Only where this path is to be in it; its parent is the operator's business."""
    if path.parent == settings.data_dir:
        try:
            if not settings.data_dir.exists():
                settings.data_dir.mkdir()
                sync_directory(settings.data_dir.parent)
        except OSError as error:
            raise ConfigError(f"dataDir {settings.data_dir} cannot be made: {error.strerror}") from error
