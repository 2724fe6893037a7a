"""One connection to another member."""

from __future__ import annotations

import pytest

from imgsvc.cluster.line import Line
from imgsvc.errors import PeerFailed


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "http://",
        "http://[::1",
        "http://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://\udcff:80",
        "http://\u20ac.example:80",
        "http://" + "a" * 300 + ":80",
        "http://\u20ac@127.0.0.1:1",
        "http://0.0.0.0\0:80",
    ],
    ids=ascii,
)
def test_what_is_no_url(url: str) -> None:
    """A member that says so of itself fails as any other that does not answer."""
    with pytest.raises(PeerFailed):
        Line(url, 0.5, lambda: None).get("/", {})
