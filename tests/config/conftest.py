"""A directory of the test's own, and config files in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.helpers import Write


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
