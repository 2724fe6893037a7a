"""How tests of the settings write them down, and what they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from imgsvc.config import load
from imgsvc.errors import ConfigError

TLS = ("cert", "key", "caCert")

Write = Callable[[str], Path]


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
