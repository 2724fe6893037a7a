"""What a person can write into the config file, the environment and the flags, and what they are told."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgsvc.config import FetchSettings, Reserve, Settings, flag, load
from imgsvc.errors import ConfigError
from imgsvc.settings import SETTINGS

ROOT = Path(__file__).parent.parent
TLS = ("cert", "key", "caCert")

Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def toml(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        file = tmp_path / "imgsvc.toml"
        file.write_text(text)
        return file

    return write


def write_json(document: object) -> Path:
    file = Path("config.json")
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def refused(file: Path | None, **environ: str) -> str:
    """The sentence with which the start ends."""
    with pytest.raises(ConfigError) as caught:
        load(file, {}, environ)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# What is wrong with a file


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("port = true", "port"),
        ('port = "20000"', "port"),
        ("port = 1.5", "port"),
        ("port = -1", "port"),
        ("port = 65536", "port"),
        ("port = 2026-11-23", "port"),
        ("host = 1", "host"),
        ('host = "a\\u0000b"', "host"),
        ("dataDir = 1", "dataDir"),
        ('logLevel = "loud"', "logLevel"),
        ('logFormat = "JSON"', "logFormat"),
        ("maxImageSize = -1", "maxImageSize"),
        ("maxImageSize = true", "maxImageSize"),
        ('diskReserve = "1"', "diskReserve"),
        ('diskReserve = "100%"', "diskReserve"),
        ('diskReserve = "-1%"', "diskReserve"),
        ('diskReserve = "nan%"', "diskReserve"),
        ('diskReserve = "some%"', "diskReserve"),
        ("diskReserve = 0.01", "diskReserve"),
        ("idleTimeout = 0", "idleTimeout"),
        ("idleTimeout = nan", "idleTimeout"),
        ("idleTimeout = inf", "idleTimeout"),
        ("idleTimeout = true", "idleTimeout"),
        ("shutdownTimeout = -0.1", "shutdownTimeout"),
        ("exposeStack = 1", "exposeStack"),
        ('exposeStack = "true"', "exposeStack"),
        ("fetch.concurrency = 0", "fetch.concurrency"),
        ("fetch.connectTimeout = 0", "fetch.connectTimeout"),
        ("fetch.stallTimeout = 0", "fetch.stallTimeout"),
        ("fetch.maxRedirects = -1", "fetch.maxRedirects"),
        ('fetch.denyNetworks = "10.0.0.0/8"', "fetch.denyNetworks"),
        ('fetch.denyNetworks = ["10.0.0.1/8"]', "fetch.denyNetworks"),
        ("fetch.denyNetworks = [10]", "fetch.denyNetworks"),
        ("fetch = 4", "fetch"),
        ('imageStoreType = "s3"', "imageStoreType"),
        ('metadataStoreType = "mysql"', "metadataStoreType"),
        ('imageStoreConfig = "images"', "imageStoreConfig"),
        ('metadataStoreConfig.machines = "http://127.0.0.1:2379"', "metadataStoreConfig.machines"),
        ('metadataStoreConfig.machines = ["127.0.0.1:2379"]', "metadataStoreConfig.machines"),
        ('metadataStoreConfig.machines = ["ftp://127.0.0.1"]', "metadataStoreConfig.machines"),
        ('metadataStoreConfig.machines = ["http://"]', "metadataStoreConfig.machines"),
        ('metadataStoreConfig.machines = ["http://[::1"]', "metadataStoreConfig.machines"),
        ('metadataStoreConfig.machines = ["http://a:port"]', "metadataStoreConfig.machines"),
        ('metadataStoreConfig.machines = ["http://a:0"]', "metadataStoreConfig.machines"),
        ('metadataStoreConfig.machines = ["http://a:1/v2"]', "metadataStoreConfig.machines"),
        ("metadataStoreConfig.password = 1", "metadataStoreConfig.password"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_key_and_file(toml: Write, text: str, key: str) -> None:
    file = toml(text)

    assert refused(file).startswith(f"{key} in {file} must be ")


def test_what_was_written_is_quoted_as_it_was(toml: Write) -> None:
    assert refused(toml("port = true")).endswith("must be an integer from 0 to 65535, not true")


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("prot = 1", "prot", "port"),
        ("fetch.concurency = 1", "fetch.concurency", "fetch.concurrency"),
        ('fetch.nested.deep = "x"', "fetch.nested", ""),
        ("[metadataStoreConfig]\nfilepath = 'etcd.json'", "metadataStoreConfig.filepath", ""),
    ],
)
def test_an_unknown_key_is_named_and_the_one_that_was_meant(toml: Write, text: str, key: str, meant: str) -> None:
    file = toml(text)
    sentence = refused(file)

    assert sentence.startswith(f"{key} in {file} is no setting")
    assert meant in sentence


@pytest.mark.parametrize("document", ['{"port": 1, "port": 2}', '{"port": 1, "Port": 2}'])
def test_a_key_that_is_there_twice_is_named(document: str) -> None:
    assert re.fullmatch("[pP]ort is in config.json twice", refused(write_json(document)))


def test_a_key_that_is_twice_in_a_table_is_named() -> None:
    assert refused(write_json('{"fetch": {"maxRedirects": 1, "maxRedirects": 1}}')).startswith("maxRedirects is in")


def test_what_is_no_json_is_named_with_its_line() -> None:
    assert re.search("config.json is not JSON.* line 2", refused(write_json('{\n"port": 1,}')))


@pytest.mark.parametrize("document", ["[]", "[" * 100_000, "1" * 5_000, ""])
def test_json_that_is_no_object_is_refused(document: str) -> None:
    assert "config.json is not" in refused(write_json(document))


def test_what_is_no_toml_is_named_with_its_line(toml: Write) -> None:
    file = toml("port = 1\nport = 2\nhost = \n")

    assert re.search(f"{file} is not TOML: .*line 2", refused(file))


def test_a_file_in_another_encoding_is_named_with_the_line() -> None:
    file = Path("latin1.toml")
    file.write_bytes("port = 1\nhost = 'é'\n".encode("latin-1"))

    assert refused(file) == "the config file latin1.toml is not UTF-8 in line 2"


@pytest.mark.parametrize(("file", "reason"), [("gone.toml", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(file: str, reason: str) -> None:
    assert re.match(f"the config file {file} cannot be read: {reason}", refused(Path(file)))


# What is wrong with the environment and the flags


def test_a_wrong_variable_is_named() -> None:
    assert refused(None, IMGSVC_FETCH_CONCURRENCY="many").startswith(
        "IMGSVC_FETCH_CONCURRENCY in the environment must be an integer from 1 to 64"
    )


def test_a_misspelt_variable_is_named_and_the_one_that_was_meant() -> None:
    sentence = refused(None, IMGSVC_FETCH_CONCURENCY="1")

    assert sentence.startswith("IMGSVC_FETCH_CONCURENCY in the environment is no setting")
    assert "IMGSVC_FETCH_CONCURRENCY" in sentence


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--port must be an integer from 0 to 65535, not "):
        load(None, {"port": "http"}, {})


@pytest.mark.parametrize("text", ["", "maybe", "yes"])
def test_a_switch_is_true_or_false(text: str) -> None:
    assert "must be true or false" in refused(None, IMGSVC_EXPOSE_STACK=text)


# What is wrong with what the settings name


@pytest.mark.parametrize("there", [keys for n in (1, 2) for keys in (TLS[:n], TLS[n:])])
def test_half_a_tls_set_is_refused_and_what_is_missing_named(toml: Write, there: tuple[str, ...]) -> None:
    Path("file").touch()
    given = "\n".join(f'{key} = "file"' for key in there)
    file = toml(f'metadataStoreType = "etcd"\n[metadataStoreConfig]\nmachines = ["https://a:1"]\n{given}')
    missing = next(key for key in TLS if key not in there)

    assert refused(file).startswith(f"metadataStoreConfig.{missing} in {file} is missing")


@pytest.mark.parametrize("gone", TLS)
def test_a_tls_file_that_is_not_there_is_named(toml: Write, gone: str) -> None:
    Path("file").touch()
    given = "\n".join(f'{key} = "{"gone" if key == gone else "file"}"' for key in TLS)
    file = toml(f'metadataStoreType = "etcd"\n[metadataStoreConfig]\nmachines = ["https://a:1"]\n{given}')

    sentence = refused(file)

    assert sentence.startswith(f"metadataStoreConfig.{gone} in {file} cannot be read: ")
    assert "No such file" in sentence


@pytest.mark.parametrize(
    ("machines", "tls"), [("https://a:1", False), ("http://a:1", True), ("https://a:1,http://b:1", True)]
)
def test_https_and_a_tls_set_go_together(machines: str, tls: bool) -> None:
    Path("file").touch()
    files = {f"IMGSVC_METADATA_STORE_CONFIG_{name}": "file" for name in ("CERT", "KEY", "CA_CERT")} if tls else {}
    environ = {"IMGSVC_METADATA_STORE_TYPE": "etcd", "IMGSVC_METADATA_STORE_CONFIG_MACHINES": machines} | files

    assert refused(None, **environ).startswith("IMGSVC_METADATA_STORE_CONFIG_MACHINES in the environment has http")


@pytest.mark.parametrize(("there", "missing"), [("user", "password"), ("password", "user")])
def test_user_and_password_go_together(toml: Write, there: str, missing: str) -> None:
    file = toml(f'metadataStoreType = "etcd"\nmetadataStoreConfig.{there} = "x"')

    assert refused(file).startswith(f"metadataStoreConfig.{missing} in {file} is missing")


def test_kvite_needs_its_table(toml: Write) -> None:
    file = toml('metadataStoreType = "kvite"')

    assert refused(file).startswith(f"metadataStoreConfig.table in {file} must name")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('dataDir = "gone/data"', "dataDir"),
        ('dataDir = "file/data"', "dataDir"),
        ('imageStoreConfig.dir = "gone/images"', "imageStoreConfig.dir"),
        ('metadataStoreConfig.filename = "gone/imgsvc.db"', "metadataStoreConfig.filename"),
        ('metadataStoreConfig.filename = "imgsvc-data/gone/imgsvc.db"', "metadataStoreConfig.filename"),
        ('dataDir = "file"', "imageStoreConfig.dir"),
    ],
)
def test_a_directory_without_a_parent_is_named(toml: Write, text: str, key: str) -> None:
    Path("file").touch()
    file = toml(text)
    sentence = refused(file)

    assert sentence.startswith(f"{key} in {file} is ")
    assert ", but there is no directory " in sentence


def test_a_path_that_the_system_refuses_is_named(toml: Write) -> None:
    file = toml(f'imageStoreConfig.dir = "{"x" * 300}/images"')

    assert refused(file).startswith(f"imageStoreConfig.dir in {file} cannot be used: ")


def test_a_data_directory_that_nothing_is_put_into_is_not_needed(toml: Write) -> None:
    settings = load(
        toml('dataDir = "gone/data"\nimageStoreConfig.dir = "images"\nmetadataStoreConfig.filename = "x.db"'), {}, {}
    )

    assert settings.image_store.directory == Path.cwd() / "images"


# Secrets


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('metadataStoreConfig.password = ["swordfish"]', "password"),
        ('metadataStoreConfig.machines = ["http://me:swordfish@a:1"]', "machines"),
    ],
)
def test_no_error_shows_a_password(toml: Write, text: str, wanted: str) -> None:
    sentence = refused(toml(text))

    assert wanted in sentence
    assert "swordfish" not in sentence


def test_settings_can_be_logged_without_the_password() -> None:
    environ = {"IMGSVC_METADATA_STORE_CONFIG_PASSWORD": "swordfish", "IMGSVC_METADATA_STORE_CONFIG_USER": "me"}
    settings = load(None, {}, environ)

    assert settings.metadata_store.password == "swordfish"
    assert "swordfish" not in repr(settings)


# What is right


def test_the_defaults_are_what_the_documentation_says(tmp_path: Path) -> None:
    settings = load(None, {}, {})

    assert settings.host == "127.0.0.1"
    assert settings.port == 20_000
    assert settings.data_dir == tmp_path / "imgsvc-data"
    assert settings.disk_reserve.of(1_000) == 10
    assert settings.idle_timeout == 60
    assert settings.shutdown_timeout == 20
    assert (settings.image_store.type, settings.image_store.directory) == ("fs", tmp_path / "imgsvc-data/images")
    assert settings.metadata_store.type == "sqlite"
    assert settings.metadata_store.filename == tmp_path / "imgsvc-data/imgsvc.db"
    assert settings.metadata_store.machines == ("http://127.0.0.1:2379",)
    assert settings.metadata_store.prefix == "/lochness"
    assert settings.fetch == FetchSettings()


def test_reading_settings_makes_no_directory(tmp_path: Path) -> None:
    load(None, {}, {})

    assert not list(tmp_path.iterdir())


def test_with_a_config_file_that_does_not_say_it_listens_on_all_addresses(toml: Write) -> None:
    assert load(toml(""), {}, {}).host == ""
    assert load(toml('host = "10.0.0.1"'), {}, {}).host == "10.0.0.1"
    assert load(toml(""), {"host": "::1"}, {}).host == "::1"


def test_a_flag_wins_over_the_environment_and_that_over_the_file(toml: Write) -> None:
    file = toml("port = 1")

    assert load(file, {}, {}).port == 1
    assert load(file, {}, {"IMGSVC_PORT": "2"}).port == 2
    assert load(file, {"port": "3"}, {"IMGSVC_PORT": "2"}).port == 3


def test_variables_of_other_programs_are_left_alone() -> None:
    load(None, {}, {"PATH": "/bin", "IMGSVCX": "1", "imgsvc_port": "x"})


def test_a_list_in_the_environment_is_separated_by_commas() -> None:
    environ = {"IMGSVC_FETCH_DENY_NETWORKS": "10.0.0.0/8, ::1", "IMGSVC_METADATA_STORE_CONFIG_MACHINES": "http://a:1"}
    settings = load(None, {}, environ)

    assert settings.fetch.deny_networks == (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128"))
    assert settings.metadata_store.machines == ("http://a:1",)
    assert load(None, {}, {"IMGSVC_FETCH_DENY_NETWORKS": ""}).fetch.deny_networks == ()


@pytest.mark.parametrize("word", ["debug", "INFO", "Warning", "warn", "error", "critical", "fatal", "panic"])
def test_the_go_programs_log_levels_are_taken_in_any_case(word: str) -> None:
    level = load(None, {"logLevel": word}, {}).log_level

    assert level == {"warn": "warning", "fatal": "critical", "panic": "critical"}.get(word, word.lower())


def test_the_go_programs_config_works_as_it_is(tmp_path: Path) -> None:
    """Its JSON library took keys in any case, and empty TLS settings for none."""
    document = {
        "ImageStoreType": "fs",
        "imageStoreConfig": {"dir": str(tmp_path / "images")},
        "metadataStoreType": "kvite",
        "metadataStoreConfig": {"Filename": str(tmp_path / "images.db"), "table": "test", "cert": "", "cacert": ""},
    }
    settings = load(write_json(document), {}, {})

    assert settings.host == ""
    assert settings.image_store.directory == tmp_path / "images"
    assert settings.metadata_store.type == "kvite"
    assert settings.metadata_store.filename == tmp_path / "images.db"
    assert settings.metadata_store.table == "test"
    assert settings.metadata_store.cert is None


def test_json_needs_no_particular_name() -> None:
    Path("conf").write_text('\n {"port": 7}')

    assert load(Path("conf"), {}, {}).port == 7


def test_keys_of_another_store_type_are_left_alone(toml: Write) -> None:
    """One word, or one variable, switches the store."""
    files = "\n".join(f'{name} = "gone"' for name in TLS)
    file = toml(f'[metadataStoreConfig]\nmachines = ["https://a:1"]\ntable = "x"\n{files}')

    assert load(file, {}, {}).metadata_store.type == "sqlite"
    with pytest.raises(ConfigError):
        load(file, {}, {"IMGSVC_METADATA_STORE_TYPE": "etcd"})


def test_half_a_tls_set_is_a_mistake_whatever_the_type(toml: Write) -> None:
    file = toml('[metadataStoreConfig]\ncert = "file"')
    assert refused(file) == f"metadataStoreConfig.key in {file} is missing: cert, key and caCert go together"


def test_a_whole_tls_set_is_taken(toml: Write, tmp_path: Path) -> None:
    for name in TLS:
        Path(name).touch()
    files = "\n".join(f'{name} = "{name}"' for name in TLS)
    store = load(
        toml(
            f'metadataStoreType = "etcd"\n[metadataStoreConfig]\nmachines = ["https://a:1", "https://[::1]:2/"]\n{files}'
        ),
        {},
        {},
    ).metadata_store

    assert store.machines == ("https://a:1", "https://[::1]:2")
    assert (store.cert, store.key, store.ca_cert) == (tmp_path / "cert", tmp_path / "key", tmp_path / "caCert")


@pytest.mark.parametrize("given", ["secret", "memberId"])
@pytest.mark.parametrize("kind", ["sqlite", "kvite", "memory"])
def test_a_cluster_needs_records_that_are_shared(toml: Write, kind: str, given: str) -> None:
    """Who sets up a cluster on records of its own would have no cluster."""
    file = toml(f'metadataStoreType = "{kind}"\nmetadataStoreConfig.table = "x"\ncluster.{given} = "x"')
    assert refused(file) == (
        f"cluster.{given} in {file} is for members that share their records in etcd, and metadataStoreType is {kind}"
    )


@pytest.mark.parametrize(("text", "prefix"), [("/lochness", "/lochness"), ("a/b/", "/a/b"), ("/", ""), ("", "")])
def test_a_prefix_begins_with_a_slash_and_ends_without(text: str, prefix: str) -> None:
    assert load(None, {}, {"IMGSVC_METADATA_STORE_CONFIG_PREFIX": text}).metadata_store.prefix == prefix


@pytest.mark.parametrize(
    ("text", "bytes_of_1001"), [("0", 0), ("4096", 4096), ("0%", 0), ("1%", 11), ("12.5%", 126), ("99.9%", 1000)]
)
def test_a_reserve_is_bytes_or_a_part_of_the_file_system_rounded_up(text: str, bytes_of_1001: int) -> None:
    assert load(None, {}, {"IMGSVC_DISK_RESERVE": text}).disk_reserve.of(1001) == bytes_of_1001


def test_a_reserve_in_a_file_is_a_number_or_text(toml: Write) -> None:
    assert load(toml("diskReserve = 5"), {}, {}).disk_reserve == Reserve(bytes=5)
    assert load(toml('diskReserve = "5%"'), {}, {}).disk_reserve == Reserve(part=0.05)


def test_whole_seconds_need_no_decimal_point(toml: Write) -> None:
    assert load(toml("idleTimeout = 5"), {}, {}).idle_timeout == 5.0


def test_settings_do_not_change(toml: Write) -> None:
    settings = load(None, {}, {})

    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


# Every setting, everywhere


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_config_file_without_permission_is_named(toml: Write) -> None:
    file = toml("")
    file.chmod(0)

    assert refused(file) == f"the config file {file} cannot be read: Permission denied"


def test_what_a_store_needs_is_named(tmp_path: Path) -> None:
    """A file in a directory's place, a directory in a file's, and no member of etcd: each by its key and variable."""
    file = tmp_path / "file"
    file.touch()
    for variable, value in (
        ("IMGSVC_IMAGE_STORE_CONFIG_DIR", str(file)),
        ("IMGSVC_METADATA_STORE_CONFIG_FILENAME", str(tmp_path)),
    ):
        assert refused(None, **{variable: value}).startswith(f"{variable} in the environment is {value}, which is")
    configuration = tmp_path / "config.json"
    configuration.write_text('{"metadataStoreType": "etcd", "metadataStoreConfig": {"machines": []}}')
    assert refused(configuration).startswith(f"metadataStoreConfig.machines in {configuration} must name")
