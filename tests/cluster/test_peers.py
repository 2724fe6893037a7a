"""What members sign, and what is refused."""

from __future__ import annotations

import time

import pytest

from imgsvc.cluster.peers import PEER, SIGNATURE, TIME, WINDOW, Signatures
from imgsvc.errors import Forbidden

SECRET = "schlüssel"
PATH = "/images/8a4b1d9e-9c0f-4e62-9d6c-1d5c2d1f0a3b/download?x=1"


@pytest.fixture
def fields() -> dict[str, str]:
    """Of a right request, sent now."""
    return Signatures(SECRET, "a").fields("GET", PATH)


def asked(fields: dict[str, str], method: str = "GET", path: str = PATH, secret: str = SECRET) -> str:
    """Who asks, as another member sees it."""
    return Signatures(secret, "b").peer(fields, method, path)


def signed_at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> dict[str, str]:
    """The fields that a member makes whose clock is so far from ours."""
    now = time.time()
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now + seconds)
        return Signatures(SECRET, "a").fields("GET", PATH)


class TestSignatures:
    def test_right(self, fields: dict[str, str]) -> None:
        assert set(fields) == {PEER, TIME, SIGNATURE}
        assert SECRET not in str(fields)
        assert asked(fields) == "a"

    def test_an_ordinary_client(self) -> None:
        """Who does not say that it is a member is not taken for one."""
        assert asked({}) == ""
        assert asked({TIME: "1", SIGNATURE: "0"}) == ""

    @pytest.mark.parametrize(
        ("method", "path"), [("POST", PATH), ("GET", PATH + "0"), ("GET", PATH.partition("?")[0]), ("GET\n" + PATH, "")]
    )
    def test_of_another_request(self, fields: dict[str, str], method: str, path: str) -> None:
        """A signature is good for nothing else."""
        with pytest.raises(Forbidden, match="wrong"):
            asked(fields, method, path)

    @pytest.mark.parametrize(
        ("name", "value"),
        [(PEER, "c"), (TIME, "0"), (TIME, ""), (SIGNATURE, "0" * 64), (SIGNATURE, "ü"), (PEER, "a\nGET")],
    )
    def test_changed(self, fields: dict[str, str], name: str, value: str) -> None:
        """No field of it can be another one's."""
        with pytest.raises(Forbidden):
            asked(fields | {name: value})

    def test_made_younger(self, fields: dict[str, str]) -> None:
        """Nobody can use it for longer than it was meant for."""
        with pytest.raises(Forbidden, match="wrong"):
            asked(fields | {TIME: str(int(fields[TIME]) + 5)})

    def test_in_capitals(self, fields: dict[str, str]) -> None:
        """There is one way to write it."""
        with pytest.raises(Forbidden, match="wrong"):
            asked(fields | {SIGNATURE: fields[SIGNATURE].upper()})

    def test_no_secret_there(self) -> None:
        """A member that was not given the secret is told so."""
        with pytest.raises(Forbidden, match=r"has member a the cluster\.secret"):
            asked(Signatures("", "a").fields("GET", PATH))

    def test_another_secret(self, fields: dict[str, str]) -> None:
        with pytest.raises(Forbidden, match=r"same cluster\.secret"):
            asked(fields, secret="other")

    @pytest.mark.parametrize("apart", [-WINDOW + 5, WINDOW - 5])
    def test_clocks_that_agree(self, monkeypatch: pytest.MonkeyPatch, apart: int) -> None:
        assert asked(signed_at(monkeypatch, apart)) == "a"

    @pytest.mark.parametrize(("apart", "said"), [(-WINDOW - 5, "behind"), (WINDOW + 5, "ahead of")])
    def test_clocks_that_do_not(self, monkeypatch: pytest.MonkeyPatch, apart: int, said: str) -> None:
        """Whoever reads the error learns what is to be set right."""
        with pytest.raises(Forbidden, match=f"6[456] seconds {said} the clock here: the clocks of members must agree"):
            asked(signed_at(monkeypatch, apart))


class TestWithoutSecret:
    def test_fields(self) -> None:
        assert set(Signatures("", "a").fields("GET", PATH)) == {PEER, TIME}

    @pytest.mark.parametrize("fields", [{PEER: "a"}, {PEER: "a", SIGNATURE: "0", TIME: "x"}])
    def test_all_are_believed(self, fields: dict[str, str]) -> None:
        assert asked(fields, secret="") == "a"

    def test_but_not_what_is_no_id(self) -> None:
        with pytest.raises(Forbidden, match="no id"):
            asked({PEER: "a/b"}, secret="")
