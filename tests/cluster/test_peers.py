"""What members sign, and what is refused; what they ask of each other, and of what does not answer well."""

from __future__ import annotations

import re
import time

import pytest

from imgsvc.cluster.peers import PEER, SIGNATURE, TIME, WINDOW, Peers, Signatures
from imgsvc.errors import Forbidden, Unavailable
from imgsvc.metadata.image import new_id
from imgsvc.metadata.mirror import LiveMember
from tests.raw_peer import Answer, RawPeer

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


HELD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
TAKEN = b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\n{}"
TIMEOUT = 0.5


@pytest.fixture
def member(peer: RawPeer) -> LiveMember:
    """One that answers as the peer does; nobody has asked it yet."""
    peer.requests.clear()
    return LiveMember("b", peer.url.removesuffix("/image"))


@pytest.fixture
def peers() -> Peers:
    return Peers(Signatures(SECRET, "a"), TIMEOUT)


def fields_of(request: bytes) -> dict[str, str]:
    lines = request.decode().split("\r\n")
    return dict(line.split(": ", 1) for line in lines[1:] if line)


class TestOrders:
    def test_check(self, peer: RawPeer, member: LiveMember, peers: Peers) -> None:
        """It is a signed POST."""
        peer.answer(Answer(TAKEN))
        image_id = new_id()
        peers.check(member, image_id)
        (request,) = peer.requests
        assert request.startswith(f"POST /peers/check/{image_id} HTTP/1.1\r\n".encode())
        assert Signatures(SECRET, "b").peer(fields_of(request), "POST", f"/peers/check/{image_id}") == "a"

    def test_copy(self, peer: RawPeer, member: LiveMember, peers: Peers) -> None:
        peer.answer(Answer(HELD))
        peers.copy(member, new_id())
        assert len(peer.requests) == 1

    def test_a_copy_that_takes_long(self, peer: RawPeer, member: LiveMember, peers: Peers) -> None:
        """It is asked for again, each time signed anew, for as long as wanted."""
        peer.answer(Answer(b"", (TAKEN,), pause=0.2))
        with pytest.raises(Unavailable, match=re.escape(f"member b at {member.url} has not copied")):
            peers.copy(member, new_id(), within=1.0)
        assert 3 <= len(peer.requests) <= 6

    @pytest.mark.parametrize(
        "answered",
        [
            (b'HTTP/1.1 507 x\r\n\r\n{"message":"no room","code":507,"stack":[]}', "507: no room"),
            (b"HTTP/1.1 404 x\r\nContent-Length: 5\r\n\r\n<html", "404: '<html'"),
            (b"HTTP/1.1 500 x\r\n\r\n[]", "500"),
            (b"HTTP/1.1 302 x\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", "302"),
            (b"", "does not answer"),
            (b"SSH-2.0-x\r\n", "does not answer"),
            (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "does not answer"),
            (b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 1000 + b"\r\n", "does not answer"),
        ],
        ids=["full", "strange", "list", "redirect", "nothing", "no HTTP", "a long field", "many fields"],
    )
    def test_what_else_it_says(
        self, peer: RawPeer, member: LiveMember, peers: Peers, answered: tuple[bytes, str]
    ) -> None:
        """The error names the member; nobody is sent on."""
        answer, said = answered
        peer.answer(Answer(answer))
        for order in (peers.check, peers.copy):
            with pytest.raises(Unavailable, match=rf"^member b at .*{re.escape(said)}"):
                order(member, new_id())
        assert len(peer.requests) == 2

    def test_an_answer_without_end(self, peer: RawPeer, member: LiveMember, peers: Peers) -> None:
        """No more of it is read than anybody needs."""
        endless = b"HTTP/1.1 500 x\r\n\r\n"
        peer.answer(Answer(endless, (bytes(1 << 16),) * 100, closes=False))
        with pytest.raises(Unavailable, match="500"):
            peers.check(member, new_id())

    def test_silence(self, peer: RawPeer, member: LiveMember, peers: Peers) -> None:
        peer.answer(Answer(b"", closes=False))
        start = time.monotonic()
        with pytest.raises(Unavailable, match="does not answer"):
            peers.check(member, new_id())
        assert time.monotonic() - start < TIMEOUT + 1

    @pytest.mark.parametrize(
        "url",
        ["http://127.0.0.1:9", "http://", "", "http://127.0.0.1:99999", "http://no-such-host.invalid:1", "http://[x"],
    )
    def test_nobody_there(self, peers: Peers, url: str) -> None:
        """Whatever a member says of where it is."""
        with pytest.raises(Unavailable, match=r"^member b at "):
            peers.check(LiveMember("b", url), new_id())

    def test_no_proxy(self, peer: RawPeer, member: LiveMember, peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
        """A proxy for the web is no way to the members of a cluster."""
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        peer.answer(Answer(TAKEN))
        peers.check(member, new_id())
