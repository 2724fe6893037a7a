"""The only reader of the config file, the environment and the flags: makes Settings of them, or one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from imgsvc.errors import ConfigError
from imgsvc.foreign import read_json
from imgsvc.settings import (
    SETTINGS,
    VARIABLE_PREFIX,
    ClusterSettings,
    FetchSettings,
    ImageStoreSettings,
    MetadataStoreSettings,
    ScrubSettings,
    Setting,
    Settings,
    UploadSettings,
)
from imgsvc.values import Reserve

__all__ = [
    "ClusterSettings",
    "FetchSettings",
    "ImageStoreSettings",
    "MetadataStoreSettings",
    "Reserve",
    "ScrubSettings",
    "Settings",
    "UploadSettings",
    "load",
]

# The Go program took keys in any case, so its config files may be written that way.
_BY_KEY = {setting.key.lower(): setting for setting in SETTINGS}
_GROUPS = {setting.key.lower().partition(".")[0] for setting in SETTINGS if "." in setting.key}
_BY_VARIABLE = {setting.variable: setting for setting in SETTINGS}

_Group = TypeVar(
    "_Group",
    bound=Settings
    | FetchSettings
    | UploadSettings
    | ScrubSettings
    | ImageStoreSettings
    | MetadataStoreSettings
    | ClusterSettings,
)


@dataclass(frozen=True, slots=True)
class _Given:
    """A value as it was set, in the form that a file has; `name` says which it is and where, for error messages."""

    value: object
    name: str


def load(config_file: Path | None, flags: Mapping[str, str], environ: Mapping[str, str]) -> Settings:
    """The settings of this run: `flags` (text by key) win over `environ`, that over the file, that over defaults.

    Raises ConfigError, a sentence that names the setting and where it was set, when a value cannot be, when there is
    no such key or IMGSVC_ variable, and when a file or directory is missing that must be there. A key of a store
    type that was not chosen is read and then left alone, so that one word switches the store; but half a TLS set is a
    mistake whatever the type.
    """
    given = {} if config_file is None else _from_file(config_file)
    given |= _from_environment(environ)
    for key, text in flags.items():
        given[key] = _from_text(_BY_KEY[key.lower()], text, flag(key))
    settings = _settings(given, default_host="127.0.0.1" if config_file is None else "")

    def name(key: str) -> str:
        if key in given:
            return given[key].name
        return key if config_file is None else f"{key} in {config_file}"

    _check_image_store(settings, name)
    _check_metadata_store(settings, name)
    _check_cluster(settings, given)
    return settings


def flag(key: str) -> str:
    """The command line's name for a setting: --data-dir for dataDir."""
    return "--" + re.sub("[A-Z]", lambda capital: f"-{capital[0].lower()}", key)


def _from_file(file: Path) -> dict[str, _Given]:
    given = dict[str, _Given]()
    for key, value in _flatten(_document(file), file):
        setting = _BY_KEY.get(key.lower())
        if setting is None:
            raise ConfigError(f"{key} in {file} is no setting{_resembling(key, (setting.key for setting in SETTINGS))}")
        if setting.key in given:
            raise ConfigError(f"{key} is in {file} twice")
        given[setting.key] = _Given(value, f"{setting.key} in {file}")
    return given


def _document(file: Path) -> dict[str, Any]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"the config file {file} cannot be read: {error.strerror}") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"the config file {file} is not UTF-8 in line {line}") from error
    if file.suffix == ".json" or text.lstrip().startswith("{"):
        return _json(text, file)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the config file {file} is not TOML: {error}") from error


def _json(text: str, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConfigError(f"{twice} is in {file} twice")
        return document

    try:
        document = read_json(text, unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config file {file} is not JSON: {error.msg} (at line {error.lineno})") from error
    except ValueError as error:  # a number of thousands of digits, or brackets as deep
        raise ConfigError(f"the config file {file} is not JSON that can be read: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"the config file {file} is not a JSON object")
    return document


def _flatten(document: dict[str, Any], file: Path) -> Iterator[tuple[str, object]]:
    for key, value in document.items():
        if key.lower() not in _GROUPS:
            yield key, value
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", member) for name, member in value.items())
        else:
            raise ConfigError(f"{key} in {file} must be a table of settings, not {_quoted(value)}")


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Given]:
    given = dict[str, _Given]()
    for variable, text in environ.items():
        if not variable.startswith(VARIABLE_PREFIX):
            continue
        setting = _BY_VARIABLE.get(variable)
        if setting is None:
            raise ConfigError(f"{variable} in the environment is no setting{_resembling(variable, _BY_VARIABLE)}")
        given[setting.key] = _from_text(setting, text, f"{variable} in the environment")
    return given


def _from_text(setting: Setting, text: str, name: str) -> _Given:
    try:
        return _Given(setting.kind.from_text(text), name)
    except ValueError as error:
        raise _refusal(setting, _Given(text, name)) from error


def _refusal(setting: Setting, given: _Given) -> ConfigError:
    value = f", not {_quoted(given.value)}" if setting.kind.shown else ""
    return ConfigError(f"{given.name} must be {setting.kind.expects}{value}")


def _quoted(value: object) -> str:
    """As TOML and JSON write it: true, not True. Only a TOML date has to become text for that."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _resembling(word: str, names: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in names}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[found[0]]}?" if found else ""


def _settings(given: Mapping[str, _Given], default_host: str) -> Settings:
    values = {setting.key: _value(setting, given) for setting in SETTINGS}
    data_dir: Path = values["dataDir"]
    return _group(
        Settings,
        values,
        host=values["host"] if "host" in given else default_host,
        fetch=_group(FetchSettings, values),
        uploads=_group(UploadSettings, values),
        scrub=_group(ScrubSettings, values),
        cluster=_group(ClusterSettings, values),
        image_store=_group(
            ImageStoreSettings,
            values,
            directory=values["imageStoreConfig.dir"] or data_dir / "images",
        ),
        metadata_store=_group(
            MetadataStoreSettings,
            values,
            filename=values["metadataStoreConfig.filename"] or data_dir / "imgsvc.db",
        ),
    )


def _value(setting: Setting, given: Mapping[str, _Given]) -> Any:
    if setting.key not in given:
        return setting.kind.read(setting.default)
    try:
        return setting.kind.read(given[setting.key].value)
    except ValueError as error:
        raise _refusal(setting, given[setting.key]) from error


def _group(group: type[_Group], values: Mapping[str, Any], **derived: Any) -> _Group:
    settings = {field.name: field.metadata.get("setting") for field in dataclasses.fields(group)}
    return group(**{name: values[setting.key] for name, setting in settings.items() if setting} | derived)


def _check_image_store(settings: Settings, name: Callable[[str], str]) -> None:
    store = settings.image_store
    if store.type == "fs":
        _check_place(store.directory, "imageStoreConfig.dir", settings.data_dir, name)
        if store.directory.exists() and not store.directory.is_dir():
            raise ConfigError(f"{name('imageStoreConfig.dir')} is {store.directory}, which is no directory")


def _check_metadata_store(settings: Settings, name: Callable[[str], str]) -> None:
    store = settings.metadata_store
    if store.type in ("sqlite", "kvite"):
        _check_place(store.filename, "metadataStoreConfig.filename", settings.data_dir, name)
        if store.filename.is_dir():
            raise ConfigError(f"{name('metadataStoreConfig.filename')} is {store.filename}, which is a directory")
    if store.type == "kvite" and not store.table:
        raise ConfigError(f"{name('metadataStoreConfig.table')} must name the table in the Go program's file")
    tls = {"cert": store.cert, "key": store.key, "caCert": store.ca_cert}
    for key, file in tls.items():
        if file is None and any(tls.values()):
            raise ConfigError(f"{name(f'metadataStoreConfig.{key}')} is missing: cert, key and caCert go together")
    if store.type == "etcd":
        _check_etcd(store, tls, name)


def _check_cluster(settings: Settings, given: Mapping[str, _Given]) -> None:
    """Unlike a store's, these settings say that there are others to share with."""
    wanted = [given[key].name for key in given if key.startswith("cluster.")]
    if wanted and settings.metadata_store.type != "etcd":
        raise ConfigError(
            f"{wanted[0]} is for members that share their records in etcd, and metadataStoreType is"
            f" {settings.metadata_store.type}"
        )


def _check_place(place: Path, key: str, data_dir: Path, name: Callable[[str], str]) -> None:
    """The directory around `place` must be there. Only dataDir may be missing: it is created, its parent is not."""
    try:
        if place.parent == data_dir and not data_dir.exists():
            key, place = "dataDir", data_dir
        if not place.parent.is_dir():
            raise ConfigError(f"{name(key)} is {place}, but there is no directory {place.parent}")
    except OSError as error:
        raise ConfigError(f"{name(key)} cannot be used: {error}") from error


def _check_etcd(store: MetadataStoreSettings, tls: Mapping[str, Path | None], name: Callable[[str], str]) -> None:
    if not store.machines:
        raise ConfigError(f"{name('metadataStoreConfig.machines')} must name a member of etcd")
    for key, file in tls.items():
        if file is not None:
            _check_readable(file, name(f"metadataStoreConfig.{key}"))
    scheme = "https" if store.cert else "http"
    for machine in store.machines:
        if not machine.startswith(f"{scheme}://"):
            raise ConfigError(
                f"{name('metadataStoreConfig.machines')} has {machine}, and must have {scheme} URLs only:"
                " https needs cert, key and caCert, and they need https"
            )
    for key, value, other in (("user", store.user, store.password), ("password", store.password, store.user)):
        if other and not value:
            raise ConfigError(f"{name(f'metadataStoreConfig.{key}')} is missing: user and password go together")


def _check_readable(file: Path, name: str) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error}") from error
