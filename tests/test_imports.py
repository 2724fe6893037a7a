"""Imports point down only: which arrows there may be, and what is wrong with any other."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Only:
    """Nobody but `importers` imports `imported`, `besides` excepted. All are patterns of dotted names."""

    imported: tuple[str, ...]
    importers: tuple[str, ...]
    why: str
    besides: tuple[str, ...] = ()

    def forbids(self, importer: str, imported: str) -> bool:
        guarded = _any(imported, self.imported) and not _any(imported, self.besides)
        return guarded and not _any(importer, self.importers)


@dataclass(frozen=True)
class AtMost:
    """Of ours, `importers` import nothing but `imported`."""

    importers: tuple[str, ...]
    imported: tuple[str, ...]
    why: str
    besides: tuple[str, ...] = ()

    def forbids(self, importer: str, imported: str) -> bool:
        bound = _any(importer, self.importers) and not _any(importer, self.besides)
        return bound and _any(imported, ("imgsvc", "imgsvc.*")) and not _any(imported, self.imported)


RULES: tuple[Only | AtMost, ...] = (
    Only(("tornado", "tornado.*"), ("imgsvc.api.*", "imgsvc.serve"), "HTTP is an edge, and nothing below knows of it"),
    Only(
        ("asyncio", "asyncio.*"),
        ("imgsvc.api.*", "imgsvc.serve", "imgsvc.context", "imgsvc.pools"),
        "what is below the pools runs in threads, and knows of no event loop",
    ),
    Only(("pycurl",), ("imgsvc.source_curl",), "curl's numbers are translated where curl is called"),
    Only(
        ("etcd3", "etcd3.*"), ("imgsvc.etcd_messages",), "etcd3 needs protobuf in pure Python, chosen before its import"
    ),
    Only(("grpc", "grpc.*"), ("imgsvc.etcd",), "gRPC's errors are translated where etcd is called"),
    Only(("sqlite3",), ("imgsvc.metadata.*",), "SQLite's errors are translated where SQLite is called"),
    Only(("imgsvc.__main__",), (), "it is the very top"),
    Only(("imgsvc.main",), ("imgsvc.__main__",), "the command line is the top"),
    Only(("imgsvc.config",), ("imgsvc.main",), "settings are read once; what is below gets them from above"),
    Only(("imgsvc.serve", "imgsvc.scrub_now"), ("imgsvc.main",), "the process is around the service, not below it"),
    Only(
        ("imgsvc.api", "imgsvc.api.*"),
        ("imgsvc.api.*", "imgsvc.serve"),
        "HTTP is an edge, and nothing below knows of it",
    ),
    Only(
        ("imgsvc.context", "imgsvc.stores"),
        ("imgsvc.context", "imgsvc.api.*", "imgsvc.serve", "imgsvc.scrub_now"),
        "services get what they need from it, and do not ask it",
    ),
    Only(
        ("imgsvc.images.*",),
        ("imgsvc.images.*", "imgsvc.stores"),
        "only one room names a concrete store; all others know the protocol",
        besides=("imgsvc.images.store",),
    ),
    Only(
        ("imgsvc.metadata.*",),
        ("imgsvc.metadata.*", "imgsvc.stores"),
        "only one room names a concrete store; all others know the protocol",
        besides=("imgsvc.metadata.store", "imgsvc.metadata.image", "imgsvc.metadata.mirror"),
    ),
    Only(
        ("imgsvc.etcd*", "imgsvc.cluster.membership", "imgsvc.cluster.member_key", "imgsvc.cluster.renaming"),
        (
            "imgsvc.etcd*",
            "imgsvc.cluster.membership",
            "imgsvc.cluster.member_key",
            "imgsvc.cluster.renaming",
            "imgsvc.metadata.etcd*",
            "imgsvc.stores",
        ),
        "who keeps records elsewhere need not load gRPC",
    ),
    Only(
        ("imgsvc.cluster.line", "imgsvc.cluster.choice"),
        ("imgsvc.cluster.supply", "imgsvc.cluster.pull*", "imgsvc.context"),
        "who is asked for bytes, and how, is decided in one place",
    ),
    AtMost(
        ("imgsvc.cluster.course",),
        ("imgsvc.blocks", "imgsvc.errors", "imgsvc.images.store"),
        "it stands between a pull and its followers, and knows neither",
    ),
    AtMost(
        ("imgsvc.images.*",),
        ("imgsvc.images.*", "imgsvc.metadata.image", "imgsvc.errors", "imgsvc.foreign", "imgsvc.values"),
        "an image store knows bytes and ids, and nothing of who uses it",
    ),
    AtMost(
        ("imgsvc.metadata.*",),
        ("imgsvc.metadata.*", "imgsvc.errors", "imgsvc.foreign"),
        "a metadata store knows records, and nothing of who uses it",
        besides=("imgsvc.metadata.etcd*",),
    ),
    AtMost(
        ("imgsvc.metadata.etcd*",),
        ("imgsvc.metadata.*", "imgsvc.errors", "imgsvc.etcd*", "imgsvc.deadline", "imgsvc.foreign"),
        "a metadata store knows records, and nothing of who uses it",
    ),
    AtMost(
        (
            "imgsvc.errors",
            "imgsvc.foreign",
            "imgsvc.values",
            "imgsvc.etcd_layout",
            "imgsvc.cluster.rendezvous",
        ),
        (),
        "it is the very bottom",
    ),
    AtMost(("imgsvc.metadata.image", "imgsvc.etcd_messages"), ("imgsvc.foreign",), "it is right above the bottom"),
)


def wrong_arrows(sources: Mapping[str, str]) -> list[str]:
    """What is wrong with the imports of these modules, given as text by dotted name: one sentence each."""
    imports = {name: set(_imports(name, text, sources.keys())) for name, text in sources.items()}
    wrong = [
        f"{importer} imports {imported}: {rule.why}"
        for importer, found in sorted(imports.items())
        for imported in sorted(found)
        for rule in RULES
        if rule.forbids(importer, imported)
    ]
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        wrong.append(f"a cycle: {' -> '.join(reversed(error.args[1]))}")
    return wrong


def _imports(name: str, text: str, ours: Collection[str]) -> Iterator[str]:
    """The modules that one imports anywhere in its text, but for what only type checkers read."""
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            within = f"{node.module}."
            modules = {within + alias.name for alias in node.names}.intersection(ours)
            yield from modules
            if len(modules) < len(node.names):
                yield str(node.module)


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@pytest.fixture(scope="module")
def product() -> dict[str, str]:
    """The text of every module that is installed, by name."""
    files = sorted((ROOT / "imgsvc").rglob("*.py"))
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file.read_text()
        for file in files
    }


def test_imports_point_down(product: dict[str, str]) -> None:
    """No module of the service imports what it should not."""
    wrong = wrong_arrows(product)
    assert not wrong, "\n".join(wrong)


def test_json_is_read_in_one_place(product: dict[str, str]) -> None:
    """Anywhere else, brackets thousands deep would be an error that nobody expects."""
    readers = re.compile(r"json\.loads?\(|JSONDecoder\(|json_decode|import loads?\b")
    assert [name for name, text in product.items() if readers.search(text)] == ["imgsvc.foreign"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{rule.importers}-{rule.imported}")
def test_every_rule_speaks_of_what_there_is(product: dict[str, str], rule: Only | AtMost) -> None:
    """A rule whose patterns match no module any more guards nothing."""
    foreign = ("tornado", "asyncio", "pycurl", "etcd3", "grpc", "sqlite3")
    for pattern in (*rule.importers, *rule.imported, *rule.besides):
        if pattern.split(".")[0] not in foreign:
            assert any(fnmatchcase(name, pattern) for name in product), pattern


@pytest.mark.parametrize(
    ("importer", "text", "imported"),
    [
        ("imgsvc.service", "import tornado.web", "tornado.web"),
        ("imgsvc.transfer", "from asyncio import Lock", "asyncio"),
        ("imgsvc.fetcher", "import pycurl", "pycurl"),
        ("imgsvc.metadata.etcd", "from etcd3.client import Etcd3Client", "etcd3.client"),
        ("imgsvc.metadata.etcd", "import grpc", "grpc"),
        ("imgsvc.maintenance", "import json, sqlite3", "sqlite3"),
        ("imgsvc.serve", "from imgsvc import main", "imgsvc.main"),
        ("imgsvc.fetcher", "from imgsvc.config import load", "imgsvc.config"),
        ("imgsvc.service", "def f():\n    from imgsvc.api.errors import status_of", "imgsvc.api.errors"),
        ("imgsvc.service", "from imgsvc.context import Context", "imgsvc.context"),
        ("imgsvc.api.images", "from imgsvc.metadata import sqlite", "imgsvc.metadata.sqlite"),
        ("imgsvc.api.images", "from imgsvc.images.filesystem import FilesystemImageStore", "imgsvc.images.filesystem"),
        ("imgsvc.maintenance", "from imgsvc.images.files import disk_full", "imgsvc.images.files"),
        ("imgsvc.metadata.sqlite", "from imgsvc.etcd_layout import Layout", "imgsvc.etcd_layout"),
        ("imgsvc.images.filesystem", "from imgsvc.settings import Settings", "imgsvc.settings"),
        ("imgsvc.metadata.sqlite", "try:\n    from imgsvc.pools import Pool\nfinally: pass", "imgsvc.pools"),
        ("imgsvc.metadata.etcd", "from imgsvc import service", "imgsvc.service"),
        ("imgsvc.errors", "from imgsvc.metadata.image import Image", "imgsvc.metadata.image"),
        ("imgsvc.metadata.image", "if not TYPE_CHECKING:\n    from imgsvc import errors", "imgsvc.errors"),
    ],
)
def test_a_wrong_arrow_is_named(product: dict[str, str], importer: str, text: str, imported: str) -> None:
    """One import too many, wherever it stands, is named with the reason."""
    wrong = wrong_arrows(product | {importer: f"{product[importer]}\n{text}\n"})
    assert any(sentence.startswith(f"{importer} imports {imported}: ") for sentence in wrong), wrong


def test_a_cycle_is_named(product: dict[str, str]) -> None:
    """Two modules that need each other are one; the sentence shows the way round."""
    room = f"{product['imgsvc.room']}\nimport imgsvc.transfer\n"
    assert wrong_arrows(product | {"imgsvc.room": room}) in (
        ["a cycle: imgsvc.room -> imgsvc.transfer -> imgsvc.room"],
        ["a cycle: imgsvc.transfer -> imgsvc.room -> imgsvc.transfer"],
    )


def test_type_checkers_may_see_more(product: dict[str, str]) -> None:
    """What is imported for types alone, and not at run time, is no arrow."""
    text = f"{product['imgsvc.errors']}\nif TYPE_CHECKING:\n    import imgsvc.service\n"
    assert wrong_arrows(product | {"imgsvc.errors": text}) == []
