"""What is wrong with a config file, a variable or a flag, and what a person is told of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from imgsvc.config import load
from imgsvc.errors import ConfigError
from tests.config.helpers import Write, refused, write_json

# A file


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_config_file_without_permission_is_named(toml: Write) -> None:
    file = toml("")
    file.chmod(0)

    assert refused(file) == f"the config file {file} cannot be read: Permission denied"


# The environment and the flags


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
