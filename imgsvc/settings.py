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
    networks,
    path,
    prefix,
    reserve,
    seconds,
    secret,
    size,
    text,
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
        "fetch.concurrency", integer(1, 64), 4, "Fetches at once, each a thread; the others wait as pending."
    )
    connect_timeout: float = _setting(
        "fetch.connectTimeout", seconds(0.1, _DAY), 10.0, "Seconds until a source must have accepted the connection."
    )
    stall_timeout: float = _setting(
        "fetch.stallTimeout", seconds(1, _DAY), 60.0, "Seconds without a byte after which a fetch fails."
    )
    max_redirects: int = _setting(
        "fetch.maxRedirects", integer(0, 100), 10, "Redirects that a fetch follows; 0 follows none."
    )
    deny_networks: tuple[IPv4Network | IPv6Network, ...] = _setting(
        "fetch.denyNetworks",
        networks(),
        ["169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128"],
        "Addresses that no fetch connects to. These are where clouds keep a host's secrets.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageStoreSettings:
    type: str = _setting(
        "imageStoreType", choice("fs", "memory"), "fs", "fs keeps images as files; memory loses them at the end."
    )
    directory: Path = _setting(
        "imageStoreConfig.dir", path(), "", "Where fs keeps images. Empty: images in dataDir.", derived=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataStoreSettings:
    """`filename` is for sqlite and kvite, `table` for kvite, the rest for etcd. `prefix` begins with a slash, and
    does not end with one; it may be empty. TLS is used when `cert`, `key` and `ca_cert` are there: all or none."""

    type: str = _setting(
        "metadataStoreType",
        choice("sqlite", "kvite", "etcd", "memory"),
        "sqlite",
        "etcd shares records among hosts; kvite is sqlite that first takes over the Go program's file.",
    )
    filename: Path = _setting(
        "metadataStoreConfig.filename",
        path(),
        "",
        "The file of sqlite and kvite. Empty: imgsvc.db in dataDir.",
        derived=True,
    )
    table: str = _setting("metadataStoreConfig.table", text(), "", "The table in the Go program's kvite file.")
    machines: tuple[str, ...] = _setting(
        "metadataStoreConfig.machines",
        urls(),
        ["http://127.0.0.1:2379"],
        "The members of the etcd cluster; when one does not answer, another is asked.",
    )
    prefix: str = _setting(
        "metadataStoreConfig.prefix", prefix(), "/lochness", "Where in etcd the records are; all hosts need the same."
    )
    cert: Path | None = _setting(
        "metadataStoreConfig.cert", path(), "", "The certificate that etcd is shown. cert, key, caCert: all or none."
    )
    key: Path | None = _setting("metadataStoreConfig.key", path(), "", "The certificate's private key.")
    ca_cert: Path | None = _setting("metadataStoreConfig.caCert", path(), "", "Who has signed etcd's certificates.")
    user: str = _setting("metadataStoreConfig.user", text(), "", "The user in etcd, where it asks for one.")
    password: str = _setting("metadataStoreConfig.password", secret(), "", "The password of that user.")


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
    port: int = _setting("port", integer(0, 65_535), 20_000, "Where hypervisors find the service. 0: any free port.")
    data_dir: Path = _setting(
        "dataDir",
        path(),
        "./imgsvc-data",
        "Where stores are that say nothing else. It is created; its parent must exist.",
        derived=True,
    )
    log_level: str = _setting(
        "logLevel",
        choice(
            "debug",
            "info",
            "warning",
            "error",
            "critical",
            aliases={"warn": "warning", "fatal": "critical", "panic": "critical"},
        ),
        "info",
        "debug, info, warning, error, critical or fatal; requests and transfers are info.",
    )
    log_format: str = _setting(
        "logFormat", choice("auto", "json", "console"), "auto", "auto: console on a terminal, JSON lines elsewhere."
    )
    max_image_size: int = _setting("maxImageSize", size(), 0, "The largest image in bytes. 0: no limit but the disk.")
    disk_reserve: Reserve = _setting(
        "diskReserve", reserve(), "1%", "Space that images leave free: bytes, or a part of the file system."
    )
    idle_timeout: float = _setting(
        "idleTimeout", seconds(1, _DAY), 60.0, "Seconds without a byte, either way, after which a client is dropped."
    )
    shutdown_timeout: float = _setting(
        "shutdownTimeout", seconds(0, _DAY), 20.0, "Seconds that running transfers get to end when the service stops."
    )
    expose_stack: bool = _setting(
        "exposeStack", boolean(), default=False, why="Shows stack traces in errors, to anyone. For debugging alone."
    )
    fetch: FetchSettings
    image_store: ImageStoreSettings
    metadata_store: MetadataStoreSettings


SETTINGS: tuple[Setting, ...] = tuple(
    field.metadata["setting"]
    for group in (Settings, ImageStoreSettings, MetadataStoreSettings, FetchSettings)
    for field in dataclasses.fields(group)
    if "setting" in field.metadata
)
