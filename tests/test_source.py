"""What reading one HTTP source promises: its whole body, or an error that says why not."""

from __future__ import annotations

import gzip
import itertools
import socket
import time
from contextlib import ExitStack

import pytest

from imgsvc.errors import FetchFailed, ImgsvcError, Incomplete, Interrupted
from imgsvc.metadata.image import UNKNOWN_SIZE
from tests import source as http
from tests.raw_peer import Answer, Collected, RawPeer, read

BODY = bytes(range(256)) * 1000
OK = b"HTTP/1.1 200 OK\r\n"


def refusal(url: str, kind: type[ImgsvcError] = FetchFailed, **settings: float) -> str:
    """The sentence with which the source is refused."""
    with pytest.raises(kind) as caught:
        read(url, None, **settings)
    return str(caught.value)


class TestBody:
    @pytest.mark.parametrize("body", [b"", b"x", BODY], ids=len)
    @pytest.mark.parametrize("length", [{}, {"announce": None}, {"chunked": True}], ids=["said", "unsaid", "chunked"])
    def test_whole(self, source: http.Source, body: bytes, length: dict[str, bool]) -> None:
        """The bytes come as they were sent, after their announced number."""
        sink = read(source.serve("/image", http.Resource(body, **length)))  # type: ignore[arg-type]
        assert sink.body == body
        assert sink.begun == [UNKNOWN_SIZE if length else len(body)]

    def test_gzip_is_not_unpacked(self, source: http.Source) -> None:
        """Nor asked for: an image is what the source has, to the bit."""
        resource = http.Resource.gzipped(BODY)
        sink = read(source.serve("/image", resource))
        assert sink.body == resource.body
        assert gzip.decompress(sink.body) == BODY
        assert "accept-encoding" not in source.asked("/image")[0].headers

    @pytest.mark.parametrize("by", [1, len(BODY) - 1, len(BODY)])
    def test_short(self, source: http.Source, by: int) -> None:
        """A body that ends early says how much there was."""
        url = source.serve("/image", http.Resource(BODY, cut_after=len(BODY) - by))
        assert refusal(url, Interrupted) == f"the source announced {len(BODY)} bytes and sent only {len(BODY) - by}"

    @pytest.mark.parametrize("announced", [0, 1, len(BODY) - 1])
    def test_long(self, source: http.Source, announced: int) -> None:
        """A body that goes on is refused at the first byte too much."""
        url = source.serve("/image", http.Resource(BODY, announce=announced))
        assert refusal(url, Incomplete) == f"the source announced {announced} bytes and sent more"

    def test_long_after_a_moment(self, peer: RawPeer) -> None:
        """One byte more is noticed, too, when it comes a little later on a connection that stays open."""
        url = peer.answer(Answer(OK + b"Content-Length: 5\r\n\r\nbytes", (b"!",), pause=0.3, closes=False))
        assert refusal(url, Incomplete) == "the source announced 5 bytes and sent more"

    @pytest.mark.parametrize("reset", [True, False])
    @pytest.mark.parametrize("cut", [0, 1, len(BODY)])
    def test_chunks_without_an_end(self, source: http.Source, cut: int, reset: bool) -> None:
        """Without its last chunk a body is not whole, however much of it came."""
        refusal(source.serve("/image", http.Resource(BODY, chunked=True, cut_after=cut, reset=reset)))

    def test_chunks_with_trailers(self, peer: RawPeer) -> None:
        """They are read over, also when they look like headers that say something else."""
        chunks = b"5\r\nbytes\r\n0\r\nContent-Length: 7\r\nX-Checksum: 1\r\n\r\n"
        sink = read(peer.answer(Answer(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)))
        assert (sink.begun, bytes(sink.body)) == ([UNKNOWN_SIZE], b"bytes")

    @pytest.mark.parametrize("first", ["length", "coding"])
    def test_chunks_and_a_length(self, peer: RawPeer, first: str) -> None:
        """The length does not count then, whichever comes first."""
        headers = [b"Content-Length: 99\r\n", b"Transfer-Encoding: chunked\r\n"]
        head = b"".join(headers if first == "length" else reversed(headers))
        sink = read(peer.answer(Answer(OK + head + b"\r\n5\r\nbytes\r\n0\r\n\r\n")))
        assert (sink.begun, bytes(sink.body)) == ([UNKNOWN_SIZE], b"bytes")

    @pytest.mark.parametrize("length", [b"", b"many", b"-5", b"5, 5", b"5 5", b"0x5", b"+5", b"5.0", b"9" * 30])
    def test_a_length_that_makes_no_sense(self, peer: RawPeer, length: bytes) -> None:
        """It is refused, for nobody knows what was meant."""
        refusal(peer.answer(Answer(OK + b"Content-Length: " + length + b"\r\n\r\nbytes")))

    def test_two_lengths(self, peer: RawPeer) -> None:
        """Two that differ make no sense; the same one twice does."""
        head = OK + b"Content-Length: 5\r\nContent-Length: %d\r\n\r\nbytes"
        assert read(peer.answer(Answer(head % 5))).body == b"bytes"
        assert "makes no sense" in refusal(peer.answer(Answer(head % 6)))

    @pytest.mark.parametrize(
        "rest",
        [b"Content-Length: 5\r\n\r\nbytes", b"Transfer-Encoding: chunked\r\n\r\n5\r\nbytes\r\n0\r\n\r\n"],
        ids=["length", "chunked"],
    )
    def test_a_connection_that_stays_open(self, peer: RawPeer, rest: bytes) -> None:
        """A server that does not close, though it is asked to, keeps nobody waiting."""
        began = time.monotonic()
        assert read(peer.answer(Answer(OK + rest, closes=False)), stall_timeout=30.0).body == b"bytes"
        assert time.monotonic() - began < 3.0
        assert b"Connection: close" in peer.requests[-1]

    @pytest.mark.parametrize("status", [100, 102, 103])
    def test_preliminary_answers(self, peer: RawPeer, status: int) -> None:
        """What comes before the answer is none, whatever its headers say."""
        before = b"HTTP/1.1 %d Wait\r\nContent-Length: 3\r\nLocation: /other\r\n\r\n" % status
        sink = read(peer.answer(Answer(before * 2 + OK + b"Content-Length: 5\r\n\r\nbytes")))
        assert (sink.begun, bytes(sink.body)) == ([5], b"bytes")

    def test_the_end_of_the_connection_does_not_matter(self, source: http.Source) -> None:
        """Once all has come, a reset is as good as a close."""
        url = source.serve("/image", http.Resource(b"bytes", cut_after=5, reset=True))
        assert read(url).body == b"bytes"

    def test_http_1_0(self, peer: RawPeer) -> None:
        """An old server ends the body by closing."""
        assert read(peer.answer(Answer(b"HTTP/1.0 200 OK\r\n\r\nbytes"))).body == b"bytes"


class TestAnswers:
    @pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 401, 404, 410, 500, 503])
    def test_any_other_status(self, source: http.Source, status: int) -> None:
        """Only 200 brings an image; its body is not read."""
        sink = Collected()
        url = source.serve("/image", http.Resource(BODY, status=status, stall_after=1))
        with pytest.raises(FetchFailed, match=f"^the source answered {status}$"):
            read(url, sink)
        assert (sink.begun, bytes(sink.body)) == ([], b"")

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1 yes\r\n\r\n",
            b"HTTP/1.1\r\n\r\n",
            b"bytes",
            OK,
            OK + b"Server: x\r\n",
            OK + b"Content-Length: 5\r\n",
            OK + b"Transfer-Encoding: chunked\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
        ],
    )
    def test_no_http(self, peer: RawPeer, answer: bytes) -> None:
        """What is no answer is refused."""
        refusal(peer.answer(Answer(answer)))


class TestRedirects:
    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_followed(self, source: http.Source, status: int) -> None:
        """To another URL, and to another server."""
        with http.Source() as other:
            end = other.serve("/end", BODY)
            assert read(source.serve("/image", http.Resource.redirect(end, status))).body == BODY

    @pytest.mark.parametrize(
        ("location", "path"),
        [
            ("end", "/a/end"),
            ("/end", "/end"),
            ("../end", "/end"),
            ("?end", "/a/b?end"),
            ("//127.0.0.1:{port}/end", "/end"),
            ("/café", "/caf%C3%A9"),
            ("/two words", "/two%20words"),
            ("/100%25#part", "/100%25"),
        ],
    )
    def test_relative(self, source: http.Source, location: str, path: str) -> None:
        """It is resolved as a browser would."""
        source.serve(path, BODY)
        url = source.serve("/a/b", http.Resource.redirect(location.format(port=source.port)))
        assert read(url).body == BODY

    @pytest.mark.parametrize("allowed", [0, 1, 3])
    def test_as_many_as_allowed(self, source: http.Source, allowed: int) -> None:
        """And not one more."""
        for number in range(allowed + 1):
            source.serve(f"/{number}", http.Resource.redirect(f"/{number + 1}"))
        source.serve(f"/{allowed + 1}", BODY)
        assert read(source.url + "/1", max_redirects=allowed).body == BODY
        assert str(allowed) in refusal(source.url + "/0", max_redirects=allowed)

    def test_a_loop(self, source: http.Source) -> None:
        """It ends after as many as are allowed."""
        url = source.serve("/image", http.Resource.redirect("/image"))
        assert refusal(url, max_redirects=4) == "the source redirected more than 4 times"
        assert len(source.asked("/image")) == 5

    @pytest.mark.parametrize(
        "location",
        [
            "file:///etc/passwd",
            "ftp://127.0.0.1/x",
            "gopher://127.0.0.1:{port}/x",
            "dict://127.0.0.1:{port}/x",
            "data:,x",
        ],
    )
    def test_to_anything_but_http(self, source: http.Source, location: str) -> None:
        """It is refused, and nothing of it is read."""
        sink = Collected()
        with pytest.raises(FetchFailed):
            read(source.serve("/image", http.Resource.redirect(location.format(port=source.port))), sink)
        assert (sink.begun, bytes(sink.body)) == ([], b"")
        assert len(source.exchanges) == 1

    @pytest.mark.parametrize("location", ["http://", "http://[", "//[::1", "http://127.0.0.1:port/", "http://%00/"])
    def test_to_what_is_no_url(self, source: http.Source, location: str) -> None:
        """It is the source's fault, and said to be."""
        refusal(source.serve("/image", http.Resource.redirect(location)))

    def test_to_nowhere(self, source: http.Source) -> None:
        """A redirect that does not say where is no redirect."""
        assert refusal(source.serve("/image", http.Resource(status=302))) == "the source answered 302"

    def test_its_body_is_not_waited_for(self, source: http.Source) -> None:
        """However long it takes, and however long it says to be."""
        slow = http.Resource(BODY, 302, {"Location": "/end"}, announce=10**12, stall_after=1)
        source.serve("/end", BODY)
        began = time.monotonic()
        sink = read(source.serve("/image", slow))
        assert time.monotonic() - began < 0.9
        assert (sink.begun, bytes(sink.body)) == ([len(BODY)], BODY)


class TestSilence:
    @pytest.mark.parametrize("sent", [None, 0, 5], ids=["no answer", "no body", "some body"])
    def test_a_source_that_stalls(self, source: http.Source, sent: int | None) -> None:
        """It is given up after stall_timeout, and not much later."""
        resource = http.Resource(BODY, hold=sent is None, stall_after=sent)
        began = time.monotonic()
        assert "nothing for 0.6 seconds" in refusal(source.serve("/image", resource), Interrupted, stall_timeout=0.6)
        assert 0.6 <= time.monotonic() - began < 2.0

    def test_a_slow_source_is_none(self, source: http.Source) -> None:
        """One that keeps sending may take longer."""
        url = source.serve("/image", http.Resource(BODY[:36], rate=40))
        assert read(url, stall_timeout=0.6).body == BODY[:36]

    def test_slow_headers_are_none(self, peer: RawPeer) -> None:
        """Each header counts as a sign of life."""
        headers = (b"Server: x\r\n", b"Content-Length: 5\r\n", b"\r\n", b"bytes")
        assert read(peer.answer(Answer(OK, headers, pause=0.25)), stall_timeout=0.6).body == b"bytes"

    def test_a_slow_disk_is_not_the_sources_fault(self, peer: RawPeer) -> None:
        """While the sink works nobody counts."""
        sink = Collected(pause=0.6, pause_tick=0.6)
        url = peer.answer(Answer(OK + b"\r\nby", (b"tes",), pause=0.7))
        assert read(url, sink, stall_timeout=0.5).body == b"bytes"

    def test_ticks(self, source: http.Source) -> None:
        """The sink is asked at least once a second whether to go on, while nothing comes."""
        sink = Collected()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            read(source.serve("/image", http.Resource(BODY, stall_after=5)), sink, stall_timeout=1.8)
        times = [began, *sink.ticks]
        assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 1.2

    def test_nobody_listens(self) -> None:
        """A refused connection is an error at once."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        assert "could not be fetched" in refusal(f"http://127.0.0.1:{port}/")

    def test_nobody_answers_the_connection(self) -> None:
        """It is given up after connect_timeout."""
        with ExitStack() as opened:
            full = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            for _ in range(4):  # the kernel drops what comes once the queue is full
                waiting = opened.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            began = time.monotonic()
            refusal(f"http://127.0.0.1:{full.getsockname()[1]}/", connect_timeout=0.3)
            assert 0.3 <= time.monotonic() - began < 1.5


class TestSink:
    @pytest.mark.parametrize("error", [Incomplete("enough"), ZeroDivisionError("a bug")], ids=["ours", "a bug"])
    @pytest.mark.parametrize("method", ["begin", "piece", "tick"])
    def test_what_it_raises_comes_out(
        self, source: http.Source, method: str, error: Exception, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """As it is, at once, and with nothing printed on the way."""
        sink = Collected(raises={method: error})
        with pytest.raises(type(error)) as caught:
            read(source.serve("/image", http.Resource(BODY, stall_after=10)), sink, stall_timeout=30.0)
        assert caught.value is error
        assert sink.calls_after_error == 0
        assert capfd.readouterr().err == ""
