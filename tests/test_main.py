"""The command line, as a person or an old unit file types it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import imgsvc

BIN = Path(sys.executable).parent
SERVE = (
    [str(BIN / "imgsvc"), "serve"],
    [sys.executable, "-m", "imgsvc", "serve"],
    [str(BIN / "mistify-image-service")],
)
BAD_CONFIG = "port = 1\nhost = 2\n"


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("IMGSVC_"):
            monkeypatch.delenv(name)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(str(BIN / "imgsvc"), *arguments)


@pytest.mark.parametrize("serve", SERVE, ids=lambda serve: Path(serve[0]).name)
def test_a_wrong_setting_ends_with_one_sentence_and_status_2(serve: list[str]) -> None:
    Path("bad.toml").write_text(BAD_CONFIG)
    done = run(*serve, "-c", "bad.toml")

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "imgsvc: host in bad.toml must be a string, not 2\n"


@pytest.mark.parametrize("serve", SERVE, ids=lambda serve: Path(serve[0]).name)
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["-a", "70000"], "--port must be an integer from 0 to 65535"),
        (["-a70000"], "--port must be an integer from 0 to 65535"),
        (["-a=70000"], "--port must be an integer from 0 to 65535"),
        (["--port", "70000"], "--port must be an integer from 0 to 65535"),
        (["--port=70000"], "--port must be an integer from 0 to 65535"),
        (["-l", "loud"], "--log-level must be one of debug, "),
        (["--log-level=loud"], "--log-level must be one of debug, "),
        (["--data-dir", "/gone/data"], "--data-dir is /gone/data, but there is no directory /gone"),
        (["--config-file=gone.json"], "the config file gone.json cannot be read: "),
        (["-cgone.json"], "the config file gone.json cannot be read: "),
        (["--host", "::1%gone", "--port=0"], "cannot listen on "),
        (["--host", "x" * 64, "--port=0"], "cannot listen on "),
    ],
)
def test_flags_are_taken_in_each_form_that_the_go_program_took(
    serve: list[str], flags: list[str], complaint: str
) -> None:
    done = run(*serve, *flags)

    assert done.returncode == 2
    assert done.stderr.startswith(f"imgsvc: {complaint}")
    assert done.stderr.count("\n") == 1


def test_an_address_that_is_not_there_yet() -> None:
    """The unit starts it again: on a machine that is being booted the address may come a little later."""
    done = cli("serve", "--host", "192.0.2.1", "--port=0")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("imgsvc: cannot listen on host '192.0.2.1', port 0: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["serve", "--prot=1"], ["serve", "--por=1"], ["start"], ["config"]])
def test_what_is_no_command_and_no_flag_is_refused(arguments: list[str]) -> None:
    """Flags cannot be cut short: a later version may have two that begin so."""
    done = cli(*arguments)

    assert done.returncode == 2
    assert done.stderr.startswith("usage: imgsvc")


@pytest.mark.parametrize("serve", SERVE, ids=lambda serve: Path(serve[0]).name)
def test_it_serves_until_it_is_asked_to_stop(serve: list[str], tmp_path: Path) -> None:
    Path("config.json").write_text('{"port": 1, "logLevel": "critical"}')
    command = [*serve, "-a0", "--host=127.0.0.1", "-c", "config.json", "-l", "INFO", "--data-dir", "data"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            lines = map(json.loads, process.stderr)
            listening = next(line for line in lines if line["event"] == "listening")
            assert any(line["event"] == "ready" for line in lines)
            assert listening["host"] == "127.0.0.1"
            with urllib.request.urlopen(f"http://127.0.0.1:{listening['port']}/images", timeout=10) as answer:
                assert json.load(answer) == []
            assert (tmp_path / "data" / "images").is_dir()
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_check_says_ok() -> None:
    Path("good.toml").write_text("port = 1\n")
    done = cli("config", "check", "good.toml")

    assert (done.returncode, done.stdout, done.stderr) == (0, "good.toml: ok\n", "")


def test_check_says_what_is_wrong() -> None:
    Path("bad.toml").write_text(BAD_CONFIG)
    done = cli("config", "check", "bad.toml")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "imgsvc: host in bad.toml must be a string, not 2\n"


def test_check_looks_at_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the service does, for a password is better kept there than in the file."""
    Path("good.toml").write_text('metadataStoreType = "etcd"\n[metadataStoreConfig]\nuser = "guest"\n')
    assert cli("config", "check", "good.toml").returncode == 1
    monkeypatch.setenv("IMGSVC_METADATA_STORE_CONFIG_PASSWORD", "secret")
    assert cli("config", "check", "good.toml").returncode == 0


def test_the_version_is_that_of_the_package() -> None:
    assert cli("--version").stdout == f"imgsvc {imgsvc.__version__}\n"


def test_help_names_each_flag() -> None:
    flags = re.findall(r"(?<![\w-])--?[a-z-]+", cli("serve", "--help").stdout)
    flags_of_go = re.findall(r"(?<![\w-])--?[a-z-]+", run(str(BIN / "mistify-image-service"), "-h").stdout)

    assert {"-a", "--port", "--host", "-c", "--config-file", "-l", "--log-level", "--data-dir"} <= set(flags)
    assert set(flags_of_go) == set(flags)


@pytest.mark.parametrize("arguments", [["serve", "--help"], ["--version"], ["config", "check", "good.toml"]])
def test_an_answer_needs_neither_tornado_nor_curl_nor_etcd(arguments: list[str]) -> None:
    Path("good.toml").touch()
    program = (
        "import sys; from imgsvc.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'tornado', 'pycurl', 'etcd3', 'grpc'} & set(sys.modules)"
    )

    assert run(sys.executable, "-c", program, *arguments).stderr == ""
