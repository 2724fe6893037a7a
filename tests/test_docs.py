"""The documents say what holds: the README's examples run, and routes, settings, files and modules are all in them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from tornado.routing import URLSpec

from imgsvc.api.app import make_app
from imgsvc.api.in_flight import InFlight
from imgsvc.config import load
from imgsvc.context import Context
from imgsvc.settings import SETTINGS
from tests.harness import Service
from tests.source import Source

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONF = (ROOT / "conf" / "imgsvc.toml").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
# What is shipped, and so read by people who have nothing but the project.
PRODUCT = [
    "imgsvc",
    "conf",
    ".ci",
    "systemd",
    "tests",
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "Makefile",
    "pyproject.toml",
]

SERVICE = "http://127.0.0.1:20000"
MIRROR = "http://mirror.example"
GUEST = os.urandom(1 << 20)
DEBIAN = os.urandom(300_000)

_BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```\n(?:^```(?:json|text)\n((?:.*\n)*?)```\n)?", re.MULTILINE)
_NEXT = "-- next example --"

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl here")


@dataclass(frozen=True)
class Example:
    """A block of the README marked `sh test`, and the block of output that follows it, if any."""

    script: str
    output: str

    def is_answered_by(self, printed: str) -> bool:
        """Whether this was printed: `…` stands for anything, and the README breaks lines where it likes."""
        expected = re.escape(_joined(self.output)).replace("…", ".*")
        return re.fullmatch(expected, _joined(printed)) is not None


def examples() -> list[Example]:
    return [Example(script, output) for kind, script, output in _BLOCK.findall(README) if kind == "sh test"]


@pytest.fixture
def printed(tmp_path: Path) -> Iterator[list[str]]:
    """What each example prints, when they are all run in one shell against a running service."""
    workplace = tmp_path / "workplace"
    workplace.mkdir()
    (workplace / "guest.img").write_bytes(GUEST)
    script = f"\necho '{_NEXT}'\n".join(example.script for example in examples())
    with Source() as source, Service(tmp_path / "data") as service:
        source.serve("/debian.img", DEBIAN)
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", script.replace(SERVICE, service.url).replace(MIRROR, source.url)],
            cwd=workplace,
            env={"PATH": os.environ["PATH"], "HOME": str(workplace)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        stored = {image["source"]: service.download(image["id"]).body for image in service.images()}
        assert stored == {"": GUEST, f"{source.url}/debian.img": DEBIAN}
        yield [output.replace(source.url, MIRROR) for output in done.stdout.split(f"{_NEXT}\n")]


@needs_curl
def test_examples(printed: list[str]) -> None:
    """Every example of the README runs as it stands there, and prints what stands below it."""
    assert len(printed) == len(examples()) > 8
    for example, output in zip(examples(), printed, strict=True):
        assert example.is_answered_by(output), f"{example.script}\nprints\n{output}\nand not\n{example.output}"


def test_an_example_can_fail() -> None:
    """An answer that differs anywhere but at `…` is not the one in the README."""
    example = Example("", '{"id":"…","status":"complete",\n "size":7}\n')
    assert example.is_answered_by('{"id":"x","status":"complete","size":7}\n')
    assert not example.is_answered_by('{"id":"x","status":"complete","size":70}\n')
    assert not example.is_answered_by('{"id":"x","status":"error","size":7}\n')
    assert not example.is_answered_by("")


def test_routes() -> None:
    """Every path with each of its methods heads a section of the README, and no other does. HEAD is GET."""
    settings = load(None, {}, {"IMGSVC_IMAGE_STORE_TYPE": "memory", "IMGSVC_METADATA_STORE_TYPE": "memory"})
    with closing(Context(settings, port=0)) as context:
        rules = make_app(context, InFlight()).wildcard_router.rules
    there = {
        f"{method} {_path(rule)}"
        for rule in rules
        if isinstance(rule, URLSpec)
        for method in rule.handler_class.allowed
        if method != "HEAD"
    }
    headings = "\n".join(re.findall("^### .*", README, re.MULTILINE))
    assert set(re.findall("`([A-Z]+ /[^`]*)`", headings)) == there


def test_settings() -> None:
    """conf/imgsvc.toml shows every setting and no other."""
    shown = tomllib.loads(re.sub(r"^#(?=\w+ = )", "", CONF, flags=re.MULTILINE))
    keys = {
        f"{key}.{name}" if name else key
        for key, value in shown.items()
        for name in (value if isinstance(value, dict) else [""])
    }
    assert keys == {setting.key for setting in SETTINGS}


def test_names_of_settings() -> None:
    """A setting has the variable that the README gives it, and each variable that the README names is one."""
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `(IMGSVC_\w+)` \|", README, re.MULTILINE))
    variables = {setting.key: setting.variable for setting in SETTINGS}
    assert len(rows) > 4
    assert rows.items() <= variables.items()
    assert set(re.findall(r"IMGSVC_\w+", README)) <= set(variables.values())


def test_defaults() -> None:
    """Where the README says what a setting is by default, that is the default."""
    defaults = {setting.key: str(setting.default).removesuffix(".0").removesuffix("%") for setting in SETTINGS}
    said = re.findall(r"`([\w.]+)` \((\d+)[ \u00a0][s%]\)", README)
    assert len(said) > 3
    assert [(key, defaults[key]) for key, _ in said] == said


def test_contents() -> None:
    """The list of contents leads to every section, in their order."""
    sections = re.findall("^## (.*)", README, re.MULTILINE)
    assert re.findall(r"^- \[(.*)\]\(#", README, re.MULTILINE) == sections
    anchors = [re.sub(r"[^\w\- ]", "", section).replace(" ", "-").lower() for section in sections]
    assert re.findall(r"^- \[.*\]\(#(.*)\)", README, re.MULTILINE) == anchors


def test_every_module_has_its_place_in_the_architecture() -> None:
    """ARCHITECTURE.md names every module, and nothing that is not there."""
    modules = {
        str(file.relative_to(ROOT / "imgsvc")) for file in (ROOT / "imgsvc").rglob("*.py") if file.name != "__init__.py"
    }
    named = set(_named_files())
    assert modules <= named
    assert [name for name in named - modules if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("words", [r"/work\b", r"\.\./shared", "DESIGN", "FACTS", "CONTRACT", r"STYLE\.md"])
def test_speaks_of_nothing_that_is_elsewhere(words: str) -> None:
    """Who reads the project has nothing but the project."""
    files = [file for place in PRODUCT for file in [ROOT / place, *(ROOT / place).rglob("*")] if file.is_file()]
    readable = [file for file in files if "__pycache__" not in file.parts and file != Path(__file__)]
    assert len(readable) > 50
    assert [str(file) for file in readable if re.search(words, file.read_text())] == []


def _joined(lines: str) -> str:
    return "".join(line.strip() for line in lines.splitlines())


def _path(rule: URLSpec) -> str:
    return rule.regex.pattern.removesuffix("$").removesuffix("/?").replace("([^/]+)", "{id}")


def _named_files() -> Iterator[str]:
    """The files and folders that ARCHITECTURE.md names, without `imgsvc/`. In a row of a table, the files of a folder
    stand behind its name."""
    for line in ARCHITECTURE.splitlines():
        folder = ""
        for name in re.findall(r"`((?:\w+/)*(?:\w+\.(?:py|md|toml))?)`", line):
            if line.startswith("|") and name.endswith("/"):
                folder = name
            elif name:
                yield folder + name
