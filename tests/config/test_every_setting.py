"""Each setting can be set everywhere, and is in the config file that is shipped, conf/imgsvc.toml."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from imgsvc.config import Settings, flag, load
from imgsvc.settings import SETTINGS
from tests.config.helpers import TLS, Write, write_json

ROOT = Path(__file__).parent.parent.parent

OTHER_VALUES: dict[str, object] = {
    "uploads.expire": 9.5,
    "scrub.bytesPerSecond": 5,
    "scrub.interval": 7.5,
    "host": "::1",
    "port": 1,
    "dataDir": "other",
    "logLevel": "error",
    "logFormat": "json",
    "maxImageSize": 5,
    "diskReserve": "2%",
    "idleTimeout": 7.5,
    "shutdownTimeout": 7.5,
    "exposeStack": True,
    "imageStoreType": "memory",
    "imageStoreConfig.dir": "other",
    "metadataStoreType": "memory",
    "metadataStoreConfig.filename": "other",
    "metadataStoreConfig.table": "other",
    "metadataStoreConfig.machines": ["http://10.0.0.1:2379", "http://10.0.0.2:2379"],
    "metadataStoreConfig.prefix": "/other",
    "metadataStoreConfig.cert": "other",
    "metadataStoreConfig.key": "other",
    "metadataStoreConfig.caCert": "other",
    "metadataStoreConfig.user": "other",
    "metadataStoreConfig.password": "other",
    "fetch.concurrency": 2,
    "fetch.connectTimeout": 7.5,
    "fetch.stallTimeout": 7.5,
    "fetch.retries": 2,
    "fetch.connections": 2,
    "fetch.splitSize": 5,
    "fetch.maxBytesPerSecond": 5,
    "fetch.maxRedirects": 2,
    "fetch.denyNetworks": ["10.0.0.0/8", "fc00::/7"],
    "cluster.memberId": "other",
    "cluster.advertiseUrl": "http://10.0.0.1:1",
    "cluster.leaseTtl": 5,
    "cluster.replicas": 2,
    "cluster.secret": "other",
    "cluster.rebalanceDelay": 7.5,
    "cluster.copyBytesPerSecond": 5,
    "cluster.cacheHighWater": "80%",
    "cluster.peerTimeout": 7.5,
    "cluster.etcdGrace": 7.5,
}


@pytest.mark.parametrize("key", [setting.key for setting in SETTINGS])
def test_each_setting_can_be_set_everywhere_with_one_effect(toml: Write, key: str) -> None:
    """In TOML, in JSON, in the environment and, those that are flags, on the command line."""
    value = OTHER_VALUES[key]
    group, _, name = key.rpartition(".")
    text = ",".join(value) if isinstance(value, list) else str(value)
    variable = next(setting.variable for setting in SETTINGS if setting.key == key)

    # Not "", so that the host does not depend on there being a file.
    base = plain = {} if key == "host" else {"IMGSVC_HOST": "h"}
    if group == "cluster":
        base = plain = base | {"IMGSVC_METADATA_STORE_TYPE": "etcd"}
    if name in TLS:  # all three or none
        others = (setting for setting in SETTINGS if setting.key.rpartition(".")[2] in TLS and setting.key != key)
        base = base | {setting.variable: "others" for setting in others}
    from_toml = load(
        toml(f"[{group}]\n{name} = {json.dumps(value)}" if group else f"{name} = {json.dumps(value)}"), {}, base
    )
    from_json = load(write_json({group: {name: value}} if group else {name: value}), {}, base)
    from_variable = load(None, {}, base | {variable: text})
    from_flag = load(None, {key: text}, base)

    assert from_toml == from_json == from_variable == from_flag
    assert from_toml != load(None, {}, plain)


def test_names_of_variables_and_flags_follow_the_keys() -> None:
    variables = {setting.key: setting.variable for setting in SETTINGS}

    assert variables["metadataStoreConfig.caCert"] == "IMGSVC_METADATA_STORE_CONFIG_CA_CERT"
    assert variables["fetch.maxRedirects"] == "IMGSVC_FETCH_MAX_REDIRECTS"
    assert flag("logLevel") == "--log-level"
    assert len(set(variables.values())) == len(SETTINGS)


def test_each_field_is_a_setting_or_a_group_of_them() -> None:
    groups = [field.name for field in dataclasses.fields(Settings) if "setting" not in field.metadata]

    assert groups == ["fetch", "uploads", "scrub", "image_store", "metadata_store", "cluster"]
    assert set(OTHER_VALUES) == {setting.key for setting in SETTINGS}


# conf/imgsvc.toml


def shipped() -> str:
    return (ROOT / "conf/imgsvc.toml").read_text()


def test_the_shipped_file_loads_as_it_is_and_changes_nothing() -> None:
    assert load(ROOT / "conf/imgsvc.toml", {"host": "h"}, {}) == load(None, {"host": "h"}, {})
    groups = ("imageStoreConfig", "metadataStoreConfig", "cluster", "fetch", "uploads", "scrub")
    assert tomllib.loads(shipped()) == {group: {} for group in groups}


def test_the_shipped_file_shows_every_setting_with_its_default() -> None:
    document = tomllib.loads(re.sub(r"^#(?=\w+ = )", "", shipped(), flags=re.MULTILINE))
    shown: dict[str, Any] = {}
    for key, value in document.items():
        shown |= (
            {f"{key}.{name}": member for name, member in value.items()} if isinstance(value, dict) else {key: value}
        )

    assert shown == {setting.key: setting.default for setting in SETTINGS}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_the_shipped_file_says_of_each_setting_why(setting: Any) -> None:
    name = setting.key.rpartition(".")[2]

    assert f"# {setting.why}\n#{name} = " in shipped()
