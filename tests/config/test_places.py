"""Whether what the settings name is there, and what goes together: TLS, users, tables, directories, members."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgsvc.config import load
from imgsvc.errors import ConfigError
from tests.config.helpers import TLS, Write, refused

# TLS, and who may ask etcd


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


@pytest.mark.parametrize(("there", "missing"), [("user", "password"), ("password", "user")])
def test_user_and_password_go_together(toml: Write, there: str, missing: str) -> None:
    file = toml(f'metadataStoreType = "etcd"\nmetadataStoreConfig.{there} = "x"')

    assert refused(file).startswith(f"metadataStoreConfig.{missing} in {file} is missing")


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


# Stores, and where they are


def test_kvite_needs_its_table(toml: Write) -> None:
    file = toml('metadataStoreType = "kvite"')

    assert refused(file).startswith(f"metadataStoreConfig.table in {file} must name")


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


def test_keys_of_another_store_type_are_left_alone(toml: Write) -> None:
    """One word, or one variable, switches the store."""
    files = "\n".join(f'{name} = "gone"' for name in TLS)
    file = toml(f'[metadataStoreConfig]\nmachines = ["https://a:1"]\ntable = "x"\n{files}')

    assert load(file, {}, {}).metadata_store.type == "sqlite"
    with pytest.raises(ConfigError):
        load(file, {}, {"IMGSVC_METADATA_STORE_TYPE": "etcd"})


@pytest.mark.parametrize("given", ["secret", "memberId"])
@pytest.mark.parametrize("kind", ["sqlite", "kvite", "memory"])
def test_a_cluster_needs_records_that_are_shared(toml: Write, kind: str, given: str) -> None:
    """Who sets up a cluster on records of its own would have no cluster."""
    file = toml(f'metadataStoreType = "{kind}"\nmetadataStoreConfig.table = "x"\ncluster.{given} = "x"')
    assert refused(file) == (
        f"cluster.{given} in {file} is for members that share their records in etcd, and metadataStoreType is {kind}"
    )


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
