"""Every setting there is, declared once: a field with its key in the file, its kind, its default, and why one would
change it. Parsing, the names of environment variables, and the test that holds `conf/imgsvc.toml` against the code
follow from that.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

from imgsvc.values import (
    Kind,
    Reserve,
    boolean,
    choice,
    integer,
    log_level,
    name,
    networks,
    path,
    percentage,
    prefix,
    reserve,
    seconds,
    secret,
    size,
    text,
    url,
    urls,
)

VARIABLE_PREFIX = "IMGSVC_"

_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Setting:
    """`default` is as a file would have it; `why` is a line for the person who is about to change it."""

    key: str
    kind: Kind
    default: object
    why: str

    @property
    def variable(self) -> str:
        """The environment variable: IMGSVC_FETCH_MAX_REDIRECTS for fetch.maxRedirects."""
        words = re.sub("(?<=[a-z])(?=[A-Z])", "_", self.key).replace(".", "_")
        return f"{VARIABLE_PREFIX}{words.upper()}"


def _setting(key: str, kind: Kind, default: object, why: str, *, derived: bool = False) -> Any:
    """A dataclass field that is a setting. The default of a derived one depends on others, so the field has none."""
    setting = Setting(key, kind, default, why)
    start = dataclasses.MISSING if derived else kind.read(default)
    return dataclasses.field(default=start, repr=kind.shown, metadata={"setting": setting})


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchSettings:
    """Times are seconds. `deny_networks`: no source is fetched from an address in one of them."""

    concurrency: int = _setting(
        "fetch.concurrency",
        integer(1, 64),
        4,
        "Fetches at once; the others wait as pending, so that a hundred sources do not share one disk.",
    )
    connect_timeout: float = _setting(
        "fetch.connectTimeout", seconds(0.1, _DAY), 10.0, "Seconds that a source has to accept the connection."
    )
    stall_timeout: float = _setting(
        "fetch.stallTimeout",
        seconds(1, _DAY),
        60.0,
        "Seconds without a byte after which a fetch tries again, as its source has hung.",
    )
    retries: int = _setting(
        "fetch.retries",
        integer(0, 1000),
        5,
        "Retries in a row without a byte of progress, after which a fetch from a source that broke off fails.",
    )
    connections: int = _setting(
        "fetch.connections",
        integer(1, 16),
        4,
        "Connections to a source with ranges, for an image above splitSize; each takes 8 MiB of memory, a fetch 16 more.",
    )
    split_size: int = _setting(
        "fetch.splitSize",
        size(),
        64 * 1024 * 1024,
        "Bytes; a smaller image is not worth more than one connection.",
    )
    max_bytes_per_second: int = _setting(
        "fetch.maxBytesPerSecond", size(), 0, "What all fetches together may take of the line. 0: all that there is."
    )
    max_redirects: int = _setting(
        "fetch.maxRedirects",
        integer(0, 100),
        10,
        "Redirects that a fetch follows, so that a loop of them ends; 0 follows none.",
    )
    deny_networks: tuple[IPv4Network | IPv6Network, ...] = _setting(
        "fetch.denyNetworks",
        networks(),
        ["169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128"],
        "No fetch connects to these, whatever name leads there: clouds keep a host's secrets on link-local addresses.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubSettings:
    """The pass in the background; it is off when either of these is 0."""

    bytes_per_second: int = _setting(
        "scrub.bytesPerSecond",
        size(),
        20_000_000,
        "Images are read again at this rate, to find bits that rot; 0: never. It must do for all within the interval.",
    )
    interval: float = _setting(
        "scrub.interval",
        seconds(0, 366 * _DAY),
        30 * _DAY,
        "Seconds from the beginning of one such pass to that of the next; 0: none.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadSettings:
    expire: float = _setting(
        "uploads.expire",
        seconds(1, 366 * _DAY),
        _DAY,
        "Seconds without a byte after which a resumable upload is given up, and its space given back.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageStoreSettings:
    type: str = _setting(
        "imageStoreType",
        choice("fs", "memory"),
        "fs",
        "fs keeps images as files; memory is for trying things out, and loses them at the end.",
    )
    directory: Path = _setting(
        "imageStoreConfig.dir",
        path(),
        "",
        "One flat directory, best a file system or ZFS dataset of its own. Empty: images in dataDir.",
        derived=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataStoreSettings:
    """`filename` is for sqlite and kvite, `table` for kvite, the rest for etcd. `prefix` begins with a slash, and
    does not end with one; it may be empty. TLS is used when `cert`, `key` and `ca_cert` are there: all or none."""

    type: str = _setting(
        "metadataStoreType",
        choice("sqlite", "kvite", "etcd", "memory"),
        "sqlite",
        "sqlite, etcd (for a cluster), kvite (sqlite that takes over the Go program's file) or memory.",
    )
    filename: Path = _setting(
        "metadataStoreConfig.filename",
        path(),
        "",
        "The file of sqlite and kvite, on a local disk. Empty: imgsvc.db in dataDir.",
        derived=True,
    )
    table: str = _setting(
        "metadataStoreConfig.table", text(), "", "kvite: the table in the Go program's file, which is left as it was."
    )
    machines: tuple[str, ...] = _setting(
        "metadataStoreConfig.machines",
        urls(),
        ["http://127.0.0.1:2379"],
        "etcd: name all of its machines, as any of them may be down.",
    )
    prefix: str = _setting(
        "metadataStoreConfig.prefix",
        prefix(),
        "/lochness",
        "etcd: where the records are; hosts with the same prefix are one cluster.",
    )
    cert: Path | None = _setting(
        "metadataStoreConfig.cert",
        path(),
        "",
        "etcd over https: cert, key and caCert are files in PEM, all three or none. This is our certificate,",
    )
    key: Path | None = _setting("metadataStoreConfig.key", path(), "", "its private key,")
    ca_cert: Path | None = _setting("metadataStoreConfig.caCert", path(), "", "and the authority that signed etcd's.")
    user: str = _setting(
        "metadataStoreConfig.user", text(), "", "etcd with authentication: user and password go together."
    )
    password: str = _setting(
        "metadataStoreConfig.password",
        secret(),
        "",
        "Better in IMGSVC_METADATA_STORE_CONFIG_PASSWORD, where only this service can read it.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """For members that share their records in etcd. Times are seconds, `cache_high_water` a part of the file system.
    Where `member_id` or `advertise_url` is "", the image store's marker and the address listened on say them."""

    member_id: str = _setting(
        "cluster.memberId",
        name(),
        "",
        "What records call this member, never another one. Empty: the id in the image store's marker file.",
    )
    advertise_url: str = _setting(
        "cluster.advertiseUrl",
        url(),
        "",
        "Where the other members reach this one. Empty: http, the host name or host, and port.",
    )
    lease_ttl: int = _setting(
        "cluster.leaseTtl",
        integer(2, 3600),
        10,
        "Seconds without a word to etcd after which a member is taken for dead, and its transfers for lost.",
    )
    replicas: int = _setting(
        "cluster.replicas",
        integer(1, 16),
        1,
        "Live members that are to hold each complete image; 1: no copies ahead of a download. The same on every member.",
    )
    secret: str = _setting(
        "cluster.secret",
        secret(),
        "",
        "What members know each other by; the same on every member. Better in IMGSVC_CLUSTER_SECRET.",
    )
    rebalance_delay: float = _setting(
        "cluster.rebalanceDelay",
        seconds(0, _DAY),
        60.0,
        "Seconds that a member is dead before others copy what it held: a restart should not move terabytes.",
    )
    copy_bytes_per_second: int = _setting(
        "cluster.copyBytesPerSecond",
        size(),
        100_000_000,
        "What copies in the background may take of the line, at each member. 0: all that there is.",
    )
    cache_high_water: float = _setting(
        "cluster.cacheHighWater",
        percentage(),
        "90%",
        "The part of the file system in use above which copies beyond the wanted number are dropped.",
    )
    peer_timeout: float = _setting(
        "cluster.peerTimeout",
        seconds(0.1, _DAY),
        5.0,
        "Seconds without a byte from a member after which another one is asked.",
    )
    etcd_grace: float = _setting(
        "cluster.etcdGrace",
        seconds(0, 3600),
        15.0,
        "Seconds that an upload whose bytes are all here waits for etcd before it is answered 503.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes are bytes, times are seconds. `host` is empty for all interfaces; `port` is 0 for any free one;
    `max_image_size` is 0 for no limit. `data_dir` may not exist yet, and is not needed when both stores are
    elsewhere."""

    host: str = _setting(
        "host",
        text(),
        "",
        "The address to listen on. Empty: all of them; with no config file at all, 127.0.0.1.",
        derived=True,
    )
    port: int = _setting(
        "port", integer(0, 65_535), 20_000, "Hypervisors know the service by it, or by an SRV record. 0: any free port."
    )
    data_dir: Path = _setting(
        "dataDir",
        path(),
        "./imgsvc-data",
        "Where stores are that are put nowhere else. It is created when it is missing; its parent is not.",
        derived=True,
    )
    log_level: str = _setting(
        "logLevel",
        log_level(),
        "info",
        "debug, info, warning, error, critical or fatal; a line for each request and transfer is info.",
    )
    log_format: str = _setting(
        "logFormat",
        choice("auto", "json", "console"),
        "auto",
        "auto is console on a terminal and json elsewhere, one object a line.",
    )
    max_image_size: int = _setting(
        "maxImageSize", size(), 0, "Bytes; a larger image is refused before it takes the disk. 0: no limit."
    )
    disk_reserve: Reserve = _setting(
        "diskReserve",
        reserve(),
        "1%",
        "Images leave this free, in bytes or as a part of the file system: a full one is slow, or cannot even delete.",
    )
    idle_timeout: float = _setting(
        "idleTimeout",
        seconds(1, _DAY),
        60.0,
        "Seconds without a byte, either way, after which a client is taken for gone.",
    )
    shutdown_timeout: float = _setting(
        "shutdownTimeout",
        seconds(0, _DAY),
        20.0,
        "Seconds that uploads and downloads get to end when the service stops; systemd must wait longer.",
    )
    expose_stack: bool = _setting(
        "exposeStack",
        boolean(),
        default=False,
        why="Shows stack traces, and so paths on this host, to anyone who causes an error.",
    )
    fetch: FetchSettings
    uploads: UploadSettings
    scrub: ScrubSettings
    image_store: ImageStoreSettings
    metadata_store: MetadataStoreSettings
    cluster: ClusterSettings


SETTINGS: tuple[Setting, ...] = tuple(
    field.metadata["setting"]
    for group in (
        Settings,
        ImageStoreSettings,
        MetadataStoreSettings,
        ClusterSettings,
        FetchSettings,
        UploadSettings,
        ScrubSettings,
    )
    for field in dataclasses.fields(group)
    if "setting" in field.metadata
)
