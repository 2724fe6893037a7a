"""What somebody else wrote: the one way to read JSON, which may be any bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def read_json(text: str | bytes | bytearray, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value that the text is; `pairs` makes an object of its keys and values. Raises ValueError when it is none, or
    has brackets of such a depth that Python does not follow."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
