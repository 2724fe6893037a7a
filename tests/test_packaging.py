"""What is shipped beside the code: the package, the Makefile, the systemd unit."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from imgsvc.config import load
from imgsvc.main import WRONG_SETTING

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "systemd" / "imgsvc.service"

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze here")
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")


def run(*command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=100, cwd=ROOT, env=os.environ | environ
    )


# The package


def modules() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "imgsvc").rglob("*.py")}


def test_the_wheel_has_every_module_the_type_marker_and_the_licence_and_nothing_else(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        scripts = archive.read(entry_points).decode()

    assert {name for name in names if ".dist-info/" not in name} == modules() | {"imgsvc/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert re.findall(r"^\S+", scripts, re.MULTILINE) == ["[console_scripts]", "imgsvc", "mistify-image-service"]


def test_the_source_package_has_the_config_file_and_the_unit(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.iterdir()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert {"conf/imgsvc.toml", "systemd/imgsvc.service", "CHANGELOG.md", "LICENSE"} <= names
    assert modules() <= names


@pytest.mark.release
@pytest.mark.timeout(600)
def test_a_plain_pip_install_works(tmp_path: Path) -> None:
    """Nothing but the default index and the wheels on it."""
    venv.create(tmp_path / "venv", with_pip=True)
    done = run(tmp_path / "venv/bin/pip", "install", "--quiet", ROOT)
    assert done.returncode == 0, done.stderr

    assert run(tmp_path / "venv/bin/imgsvc", "--version").stdout.startswith("imgsvc ")
    done = run(tmp_path / "venv/bin/python", "-W", "error", "-c", "import imgsvc.serve, imgsvc.etcd")
    assert (done.returncode, done.stderr) == (0, "")


# The Makefile


@needs_make
@pytest.mark.parametrize(
    ("patch", "complaint"),
    [
        ("import sys; sys.version_info = (3, 10, 0)", "imgsvc needs Python 3.11 or later"),
        ("import sys; sys.modules['ensurepip'] = None", "apt install python3-venv"),
    ],
)
def test_make_says_what_is_missing(tmp_path: Path, patch: str, complaint: str) -> None:
    """A Python that is too old, and one of Debian's that has venv without ensurepip."""
    (tmp_path / "sitecustomize.py").write_text(patch)
    done = run(
        "make", f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv", f"{tmp_path}/venv/.made", PYTHONPATH=str(tmp_path)
    )

    assert done.returncode != 0
    assert complaint in done.stderr
    assert not (tmp_path / "venv").exists()


@needs_make
def test_make_says_that_there_is_no_python(tmp_path: Path) -> None:
    done = run("make", "PYTHON=no-such-python", f"VENV={tmp_path}/venv", f"{tmp_path}/venv/.made")

    assert done.returncode != 0
    assert "there is no no-such-python" in done.stderr


@needs_make
def test_make_has_nothing_to_do_the_second_time(tmp_path: Path) -> None:
    """When there is an environment already, and its stamps are newer than pyproject.toml."""
    (tmp_path / "venv").mkdir()
    for stamp in (".made", ".installed-dev", ".installed"):
        (tmp_path / "venv" / stamp).touch()

    for target in ("installed", "installed-dev"):
        assert run("make", "-q", f"VENV={tmp_path}/venv", f"{tmp_path}/venv/.{target}").returncode == 0


# The systemd unit


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is there, as systemd-analyze looks for it."""
    copy = tmp_path / UNIT.name
    text, changed = re.subn(
        r"^ExecStart=/opt/imgsvc/bin/imgsvc ", f"ExecStart={sys.executable} ", UNIT.read_text(), flags=re.MULTILINE
    )
    assert changed == 1
    copy.write_text(text)
    return copy


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    done = run("systemd-analyze", "verify", unit)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_the_sandbox_is_rated_2_0_or_better(unit: Path) -> None:
    done = run("systemd-analyze", "security", "--offline=true", "--no-pager", unit)
    rating = re.search(r"Overall exposure level for imgsvc.service: ([0-9.]+)", done.stdout)

    assert rating is not None, done.stdout + done.stderr
    assert float(rating[1]) <= 2.0


def test_the_unit_agrees_with_the_program(tmp_path: Path) -> None:
    file = configparser.ConfigParser(strict=False, interpolation=None)
    file.optionxform = str  # type: ignore[assignment,method-assign]
    file.read(UNIT)
    service = file["Service"]
    name, _, directory = service["Environment"].partition("=")
    settings = load(None, {}, {name: str(tmp_path)})

    assert settings.data_dir == tmp_path
    assert directory == f"/var/lib/{service['StateDirectory']}" == file["Unit"]["RequiresMountsFor"]
    assert float(service["TimeoutStopSec"]) > settings.shutdown_timeout
    assert service["RestartPreventExitStatus"] == str(WRONG_SETTING)
    assert (service["Type"], service["NotifyAccess"], service["Restart"]) == ("notify", "main", "on-failure")
    assert float(service["WatchdogSec"]) > 0
