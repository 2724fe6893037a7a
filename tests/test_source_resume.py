"""A source that broke off is gone on with where it did, if it still has the same bytes; else it is read anew."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_network
from typing import Any

import pytest

from imgsvc.errors import FetchFailed, ImgsvcError, Interrupted
from imgsvc.metadata.image import UNKNOWN_SIZE
from imgsvc.source_answer import Version
from tests import source as http
from tests.raw_peer import Answer, Collected, RawPeer, read, reader

BODY = bytes(range(256)) * 1000
OTHER = BODY[::-1]
OLD, NEW = '"old"', '"new"'
OFFSET = 100_001


def go_on(url: str, version: Version | None = None, offset: int = OFFSET, **settings: Any) -> Collected:
    """What is there after the first bytes of BODY were, and the source was read from there."""
    sink = Collected(body=bytearray(BODY[:offset]))
    reader(url, sink, version or Version(url, OLD, len(BODY)), **settings).read(offset)
    return sink


def asked(source: http.Source, path: str = "/image") -> list[str | None]:
    """The ranges that were asked for, None for the whole."""
    return [exchange.headers.get("range") for exchange in source.asked(path)]


class TestSameVersion:
    def test_only_the_rest_is_asked_for(self, source: http.Source) -> None:
        """And only if it is still the same version."""
        sink = go_on(source.serve("/image", http.Resource(BODY, etag=OLD)))
        assert (sink.begun, sink.offsets, bytes(sink.body)) == ([len(BODY)], [OFFSET], BODY)
        (exchange,) = source.exchanges
        assert (exchange.headers["range"], exchange.headers["if-range"]) == (f"bytes={OFFSET}-", OLD)
        assert exchange.sent == len(BODY) - OFFSET

    def test_the_last_byte(self, source: http.Source) -> None:
        """One is a rest too."""
        sink = go_on(source.serve("/image", http.Resource(BODY, etag=OLD)), offset=len(BODY) - 1)
        assert sink.body == BODY

    def test_nothing_is_left(self, source: http.Source) -> None:
        """Who has all bytes need not ask."""
        sink = go_on(source.serve("/image", http.Resource(BODY, etag=OLD)), offset=len(BODY))
        assert (sink.begun, sink.offsets, bytes(sink.body)) == ([len(BODY)], [len(BODY)], BODY)
        assert source.exchanges == []

    def test_broken_off_again_and_again(self, source: http.Source) -> None:
        """Each byte is sent once."""
        sink = Collected()
        url = source.serve("/image", lambda asked: http.Resource(BODY, etag=OLD, cut_after=50_000).answer_to(asked))
        fetch = reader(url, sink, None)
        for _ in range(5):
            with pytest.raises(Interrupted):
                fetch.read(len(sink.body))
        source.serve("/image", http.Resource(BODY, etag=OLD))
        fetch.read(len(sink.body))
        assert sink.body == BODY
        assert sink.offsets == [0, 50_000, 100_000, 150_000, 200_000, 250_000]
        assert sum(exchange.sent for exchange in source.exchanges) == len(BODY)

    def test_in_chunks(self, source: http.Source) -> None:
        """A part may come without its length."""
        sink = go_on(source.serve("/image", http.Resource(BODY, etag=OLD, chunked=True)))
        assert (sink.offsets, bytes(sink.body)) == ([OFFSET], BODY)

    def test_a_length_that_was_not_known(self, source: http.Source) -> None:
        """A source that first did not say its length says it with the range."""
        url = source.serve("/image", http.Resource(BODY, etag=OLD))
        sink = go_on(url, Version(url, OLD, UNKNOWN_SIZE))
        assert (sink.begun, sink.offsets, bytes(sink.body)) == ([len(BODY)], [OFFSET], BODY)

    def test_a_rest_that_is_too_long(self, source: http.Source) -> None:
        """Where its length was not announced, nothing of it is believed, and the whole is asked for."""
        sink = go_on(source.serve("/image", longer))
        assert (sink.offsets, bytes(sink.body)) == ([OFFSET, 0, 0], BODY)

    def test_no_whole_after_a_rest_that_is_too_long(self, source: http.Source) -> None:
        """What is not believed is forgotten before anything else is asked for, and not gone on with."""
        url = source.serve("/image", lambda asked: http.Resource(garbage=b"") if asked.number else longer(asked))
        sink = Collected(body=bytearray(BODY[:OFFSET]))
        fetch = reader(url, sink, Version(url, OLD, len(BODY)))
        with pytest.raises(Interrupted):
            fetch.read(OFFSET)
        assert sink.body == b""
        source.serve("/image", http.Resource(BODY, etag=OLD))
        fetch.read(OFFSET)
        assert sink.body == BODY
        assert asked(source)[-1] is None


def longer(exchange: http.Exchange) -> http.Resource:
    """A part in chunks with a byte too many; the whole is right."""
    answer = http.Resource(BODY, etag=OLD).answer_to(exchange)
    return dataclasses.replace(answer, body=answer.body + b"!", chunked=True) if answer.status == 206 else answer


class TestOtherVersion:
    @pytest.mark.parametrize("etag", [NEW, ""], ids=["new", "none"])
    @pytest.mark.parametrize("size", [1, OFFSET, len(OTHER)])
    def test_changed(self, source: http.Source, etag: str, size: int) -> None:
        """The whole of what there is now comes, and nothing is kept of what there was."""
        sink = go_on(source.serve("/image", http.Resource(OTHER[:size], etag=etag)))
        assert (sink.begun, sink.offsets, bytes(sink.body)) == ([size], [0], OTHER[:size])
        assert len(source.exchanges) == 1

    @pytest.mark.parametrize("etag", ['W/"old"', "old", "", '"o ld"', '"'])
    def test_no_strong_etag(self, source: http.Source, etag: str) -> None:
        """There is nothing to tell two versions apart by, so no part is asked for, even of a source that has parts."""
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Last-Modified": "Mon, 23 Nov 2026 09:00:00 GMT"}
        broken = http.Resource(BODY, headers=headers, cut_after=OFFSET)
        sink = Collected()
        fetch = reader(source.serve("/image", broken), sink, None)
        with pytest.raises(Interrupted):
            fetch.read()
        assert len(sink.body) == OFFSET
        source.serve("/image", http.Resource(OTHER, headers=headers))
        fetch.read(len(sink.body))
        assert (sink.offsets, bytes(sink.body)) == ([0, 0], OTHER)
        assert asked(source) == [None, None]

    def test_range_is_ignored(self, source: http.Source) -> None:
        """All of it comes again, although it is the same."""
        url = source.serve("/image", lambda _: http.Resource(BODY, etag=OLD))
        sink = go_on(url)
        assert (sink.offsets, bytes(sink.body)) == ([0], BODY)

    def test_not_satisfiable(self, source: http.Source) -> None:
        """Where the source has become shorter and does not look at If-Range, it is asked for the whole."""
        shorter = OTHER[: OFFSET - 1]

        def answer(exchange: http.Exchange) -> http.Resource:
            return http.Resource(b"", status=416) if exchange.range else http.Resource(shorter, etag=NEW)

        sink = go_on(source.serve("/image", answer))
        assert (sink.offsets, bytes(sink.body)) == ([0], shorter)
        assert asked(source) == [f"bytes={OFFSET}-", None]

    def test_never_satisfiable(self, source: http.Source) -> None:
        """One that says so of the whole, too, is of no use."""
        with pytest.raises(FetchFailed, match=r"^the source answered 416$"):
            go_on(source.serve("/image", http.Resource(status=416)))
        assert len(source.exchanges) == 2

    @pytest.mark.parametrize(
        "lie",
        [
            {"Content-Range": f"bytes {OFFSET - 1}-{len(BODY) - 1}/{len(BODY)}"},
            {"Content-Range": f"bytes {OFFSET + 1}-{len(BODY) - 1}/{len(BODY)}"},
            {"Content-Range": f"bytes {OFFSET}-{len(BODY) - 2}/{len(BODY)}"},
            {"Content-Range": f"bytes {OFFSET}-{len(BODY) - 1}/{len(BODY) + 1}"},
            {"Content-Range": f"bytes {OFFSET}-{len(BODY) - 1}/*"},
            {"Content-Range": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"},
            {"Content-Range": f"bytes */{len(BODY)}"},
            {"Content-Range": f"items {OFFSET}-{len(BODY) - 1}/{len(BODY)}"},
            {"Content-Range": "bytes"},
            {"Content-Range": ""},
            {"ETag": NEW},
            {"ETag": 'W/"old"'},
            {"ETag": ""},
            {"Content-Type": "multipart/byteranges; boundary=x", "Content-Range": ""},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("length", [len(BODY), UNKNOWN_SIZE], ids=["known", "unknown"])
    @pytest.mark.parametrize("chunked", [False, True], ids=["", "chunked"])
    def test_a_part_that_is_another(
        self, source: http.Source, lie: dict[str, str], length: int, *, chunked: bool
    ) -> None:
        """A 206 that says it is anything but what was asked for is not read; the whole is asked for."""

        def answer(exchange: http.Exchange) -> http.Resource:
            if exchange.range is None:
                return http.Resource(OTHER, etag=NEW)
            headers = {"ETag": OLD, "Content-Range": f"bytes {OFFSET}-{len(BODY) - 1}/{len(BODY)}"} | lie
            return http.Resource(b"x" * (len(BODY) - OFFSET), 206, headers, chunked=chunked, stall_after=1)

        url = source.serve("/image", answer)
        sink = go_on(url, Version(url, OLD, length))
        assert (sink.offsets, bytes(sink.body)) == ([0], OTHER)
        assert asked(source) == [f"bytes={OFFSET}-", None]

    @pytest.mark.parametrize(
        ("announce", "first", "last", "total"),
        [
            (5, OFFSET, len(BODY) - 1, len(BODY)),
            (len(BODY), OFFSET, len(BODY) - 1, len(BODY)),
            (len(BODY) + 1 - OFFSET, OFFSET, len(BODY), len(BODY) + 1),
        ],
        ids=["short", "long", "another length"],
    )
    def test_a_part_of_another_length(
        self, source: http.Source, announce: int, first: int, last: int, total: int
    ) -> None:
        """The same, where lengths do not agree."""

        def answer(exchange: http.Exchange) -> http.Resource:
            if exchange.range is None:
                return http.Resource(OTHER, etag=NEW)
            headers = {"ETag": OLD, "Content-Range": f"bytes {first}-{last}/{total}"}
            return http.Resource(b"x" * announce, 206, headers, stall_after=1)

        sink = go_on(source.serve("/image", answer))
        assert (sink.offsets, bytes(sink.body)) == ([0], OTHER)

    def test_a_part_that_nobody_asked_for(self, source: http.Source) -> None:
        """It is no image."""
        with pytest.raises(FetchFailed, match=r"^the source answered 206$"):
            read(source.serve("/image", http.Resource(BODY, 206, {"Content-Range": f"bytes 0-9/{len(BODY)}"})))


class TestPassing:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 599])
    @pytest.mark.parametrize("offset", [0, OFFSET])
    def test_it_may_be_asked_again(self, source: http.Source, status: int, offset: int) -> None:
        """The source says that it cannot now; what is there is kept."""
        sink = Collected(body=bytearray(BODY[:offset]))
        url = source.serve("/image", http.Resource(BODY, status))
        fetch = reader(url, sink, Version(url, OLD, len(BODY)))
        with pytest.raises(Interrupted, match=f"^the source answered {status}$") as caught:
            fetch.read(offset)
        assert caught.value.retry_after is None
        source.serve("/image", http.Resource(BODY, etag=OLD))
        fetch.read(offset)
        assert (sink.offsets, bytes(sink.body)) == ([offset], BODY)

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 410, 451])
    @pytest.mark.parametrize("offset", [0, OFFSET])
    def test_it_may_not(self, source: http.Source, status: int, offset: int) -> None:
        """Any other 4xx is final."""
        with pytest.raises(FetchFailed, match=f"^the source answered {status}$") as caught:
            go_on(source.serve("/image", http.Resource(status=status)), offset=offset)
        assert not isinstance(caught.value, Interrupted)
        assert len(source.exchanges) == 1

    @pytest.mark.parametrize(
        ("said", "least", "most"),
        [
            ("7", 7, 7),
            ("0", 0, 0),
            (500, 300, 500),
            (-500, 0, 0),
            ("Sunday, 06-Nov-94 08:49:37 GMT", 0, 0),
            ("Sun Nov  6 08:49:37 1994", 0, 0),
        ],
    )
    @pytest.mark.parametrize("status", [429, 503])
    def test_retry_after(self, source: http.Source, status: int, said: str | int, least: float, most: float) -> None:
        """In seconds, or as a date in any of the three forms that HTTP knows."""
        if isinstance(said, int):
            said = format_datetime(datetime.now(UTC) + timedelta(seconds=said), usegmt=True)
        with pytest.raises(Interrupted) as caught:
            read(source.serve("/image", http.Resource(status=status, headers={"Retry-After": said})))
        assert caught.value.retry_after is not None
        assert least <= caught.value.retry_after <= most

    @pytest.mark.parametrize("said", ["", "soon", "-1", "1.5", "1e9", "9" * 30, "Mon, 99 Foo 2026 99:99:99 GMT", "0x5"])
    def test_retry_after_that_makes_no_sense(self, source: http.Source, said: str) -> None:
        """It is as if it were not there."""
        with pytest.raises(Interrupted) as caught:
            read(source.serve("/image", http.Resource(status=503, headers={"Retry-After": said})))
        assert caught.value.retry_after is None

    def test_a_name_that_nobody_knows(self) -> None:
        """The name service may be what is not there."""
        with pytest.raises(Interrupted, match="could not be fetched"):
            read("http://imgsvc-test.invalid/image")

    @pytest.mark.parametrize("url", ["http://127.0.0.1:99999/", "http://[::1"])
    def test_no_url(self, url: str) -> None:
        """Time does not mend it."""
        with pytest.raises(FetchFailed) as caught:
            read(url)
        assert not isinstance(caught.value, Interrupted)

    @pytest.mark.parametrize(
        "sent", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbytes"]
    )
    def test_a_connection_that_ends(self, peer: RawPeer, sent: bytes) -> None:
        """Wherever it does, it may be only this one."""
        with pytest.raises(Interrupted):
            read(peer.answer(Answer(sent)))


class Mirrors:
    """A source that redirects each time to another port, and the last mirror again and again."""

    def __init__(self, source: http.Source, *mirrors: http.Source) -> None:
        self.mirrors = mirrors
        self.url = source.serve("/image", self._answer)

    def serve(self, answer: http.Resource | http.Answers) -> None:
        for mirror in self.mirrors:
            mirror.serve("/image", answer)

    def _answer(self, exchange: http.Exchange) -> http.Resource:
        mirror = self.mirrors[min(exchange.number, len(self.mirrors) - 1)]
        return http.Resource.redirect(f"{mirror.url}/image")


@pytest.fixture
def mirrors(source: http.Source) -> Iterator[Mirrors]:
    with http.Source() as one, http.Source() as two:
        yield Mirrors(source, one, two)


class TestRedirects:
    def test_pinned(self, source: http.Source, mirrors: Mirrors) -> None:
        """The mirror that began is gone on with, although the source would send us to another."""
        mirrors.serve(lambda asked: http.Resource(BODY, etag=OLD, cut_after=OFFSET).answer_to(asked))
        sink = Collected()
        fetch = reader(mirrors.url, sink, None)
        with pytest.raises(Interrupted):
            fetch.read()
        mirrors.serve(http.Resource(BODY, etag=OLD))
        fetch.read(len(sink.body))
        assert sink.body == BODY
        assert len(source.exchanges) == 1
        assert [len(mirror.exchanges) for mirror in mirrors.mirrors] == [2, 0]

    def test_pinned_without_an_etag(self, source: http.Source, mirrors: Mirrors) -> None:
        """Also where it has to begin anew."""
        mirrors.serve(http.Resource(BODY, cut_after=OFFSET))
        sink = Collected()
        fetch = reader(mirrors.url, sink, None)
        with pytest.raises(Interrupted):
            fetch.read()
        mirrors.serve(http.Resource(BODY))
        fetch.read(len(sink.body))
        assert sink.body == BODY
        assert [len(server.exchanges) for server in (source, *mirrors.mirrors)] == [1, 2, 0]

    @pytest.mark.parametrize(
        "answer",
        [http.Resource(status=503), http.Resource(garbage=b""), http.Resource(hold=True)],
        ids=["503", "end", "silence"],
    )
    def test_not_pinned_before_it_has_given_anything(
        self, source: http.Source, mirrors: Mirrors, answer: http.Resource
    ) -> None:
        """A mirror that is of no use is not asked again when the source knows another."""
        mirrors.mirrors[0].serve("/image", answer)
        mirrors.mirrors[1].serve("/image", http.Resource(BODY, etag=OLD))
        sink = Collected()
        fetch = reader(mirrors.url, sink, None, stall_timeout=0.3)
        with pytest.raises(Interrupted):
            fetch.read()
        fetch.read()
        assert sink.body == BODY
        assert len(source.exchanges) == 2

    def test_not_pinned_when_nobody_is_there(self, source: http.Source, mirrors: Mirrors) -> None:
        """The same, where the mirror is down."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        url = source.serve(
            "/image",
            lambda asked: http.Resource.redirect(
                f"http://127.0.0.1:{port}/" if asked.number == 0 else mirrors.mirrors[1].url + "/image"
            ),
        )
        mirrors.serve(http.Resource(BODY, etag=OLD))
        sink = Collected()
        fetch = reader(url, sink, None)
        with pytest.raises(Interrupted):
            fetch.read()
        fetch.read()
        assert sink.body == BODY

    @pytest.mark.parametrize("status", [401, 403, 404, 410])
    @pytest.mark.parametrize("offset", [0, OFFSET])
    def test_a_mirror_that_does_not_have_it_any_more(
        self, source: http.Source, mirrors: Mirrors, status: int, offset: int
    ) -> None:
        """As one whose URL was good for an hour: the source is asked anew, and what the mirror gave is not mixed with
        what another gives under the same ETag."""
        pinned, other = mirrors.mirrors
        pinned.serve("/image", http.Resource(status=status))
        other.serve("/image", http.Resource(OTHER, etag=OLD))
        source.serve("/image", http.Resource.redirect(f"{other.url}/image"))
        sink = Collected(body=bytearray(BODY[:offset]))
        reader(mirrors.url, sink, Version(f"{pinned.url}/image", OLD, len(BODY))).read(offset)
        assert (sink.offsets, bytes(sink.body)) == ([0], OTHER)
        assert "range" not in other.exchanges[0].headers

    def test_nor_has_the_source(self, source: http.Source, mirrors: Mirrors) -> None:
        """Then it is final."""
        pinned = mirrors.mirrors[0]
        source.serve("/image", http.Resource.redirect(f"{pinned.url}/image"))
        with pytest.raises(FetchFailed, match=r"^the source answered 404$") as caught:
            go_on(mirrors.url, Version(f"{pinned.url}/gone", OLD, len(BODY)))
        assert not isinstance(caught.value, Interrupted)
        assert len(source.exchanges) == 1

    def test_a_mirror_that_sends_us_elsewhere(self, mirrors: Mirrors) -> None:
        """An ETag of one place says nothing of another."""
        pinned, other = mirrors.mirrors
        other.serve("/image", http.Resource(OTHER, etag=OLD))
        url = pinned.serve("/image", http.Resource.redirect(f"{other.url}/image"))
        sink = go_on(url, Version(url, OLD, len(BODY)))
        assert (sink.offsets, bytes(sink.body)) == ([0], OTHER)

    def test_to_what_no_longer_is_allowed(self, source: http.Source, mirrors: Mirrors) -> None:
        """A pinned mirror is looked at like any other address."""
        pinned = mirrors.mirrors[0]
        version = Version(f"http://127.0.0.2:{pinned.port}/image", OLD, len(BODY))
        with pytest.raises(ImgsvcError, match=r"fetch\.denyNetworks"):
            go_on(mirrors.url, version, deny_networks=(ip_network("127.0.0.2/32"),))


class TestSlowDisk:
    def test_it_is_no_stall(self, source: http.Source) -> None:
        """However long the sink takes over a piece."""
        sink = Collected(body=bytearray(BODY[:OFFSET]), pause=0.7)
        url = source.serve("/image", http.Resource(BODY[: OFFSET + 10], etag=OLD))
        began = time.monotonic()
        reader(url, sink, Version(url, OLD, OFFSET + 10), stall_timeout=0.3).read(OFFSET)
        assert sink.body == BODY[: OFFSET + 10]
        assert time.monotonic() - began > 0.6
