"""What the settings are when nothing is wrong: defaults, which source wins, and what a value means."""

from __future__ import annotations

import dataclasses
import ipaddress
from pathlib import Path

import pytest

from imgsvc.config import FetchSettings, Reserve, load
from tests.config.helpers import Write, write_json


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
