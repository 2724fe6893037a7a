"""How the parts are put together, where that takes a decision."""

from __future__ import annotations

import socket

import pytest

from imgsvc.context import _reachable


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("images.example", "images.example"),
        ("fd00::1", "[fd00::1]"),
        *((every, socket.gethostname()) for every in ("", "0.0.0.0", "::")),
    ],
)
def test_what_other_hosts_are_told_of_the_address(host: str, shown: str) -> None:
    """It is for a URL, and an address that stands for all of them leads nowhere."""
    assert _reachable(host) == shown
