"""A source over several connections: the same bytes, in order, from a server that keeps to ranges and from one that
does not."""

from __future__ import annotations

import dataclasses
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

import pytest

from imgsvc import source_reading
from imgsvc.blocks import BLOCK
from imgsvc.errors import Interrupted
from imgsvc.source import Source
from imgsvc.source_answer import Version
from imgsvc.source_curl import Request, Requests
from tests import source as http
from tests.harness import wait_for
from tests.raw_peer import Collected, reader

MIB = 1 << 20
BODY = random.Random(1).randbytes(6 * MIB + 12_345)
OTHER = random.Random(2).randbytes(6 * MIB + 12_345)
PIECE = MIB
OLD, NEW = '"old"', '"new"'
GOOD = http.Resource(BODY, etag=OLD)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that six of them are no 48 MiB."""
    monkeypatch.setattr(source_reading, "PIECE", PIECE)


@pytest.fixture
def source() -> Iterator[http.Source]:
    with http.Source() as source:
        yield source


def over_several(url: str, sink: Collected, version: Version | None = None, **settings: Any) -> Source:
    return reader(url, sink, version, **{"connections": 4, "split_size": MIB, **settings})


class Good:
    """Answers as it should, but holds the first connection back before its second MiB until a piece was asked for after
    it: one that a reading before this has left may still come."""

    def __init__(self) -> None:
        self._first = http.Resource(BODY, etag=OLD, stall_after=MIB // 2)
        self._begun = False

    def __call__(self, exchange: http.Exchange, **changed: Any) -> http.Resource:
        answer = GOOD
        if is_piece(exchange):
            if self._begun:
                self._first.resume()
        elif not is_probe(exchange) and not self._begun:
            self._begun = True
            answer = self._first
        return dataclasses.replace(answer.answer_to(exchange), **changed)

    def lying(self, exchange: http.Exchange, lie: dict[str, Any]) -> http.Resource:
        self._first.resume()
        changed = dict(lie)
        answer = self(exchange)
        headers = {**answer.headers, **changed.pop("more", {})}
        return dataclasses.replace(answer, **{"headers": headers, **changed})


@pytest.fixture
def good() -> Good:
    return Good()


def is_probe(exchange: http.Exchange) -> bool:
    return exchange.range is not None and exchange.range[0] == exchange.range[1]


def is_piece(exchange: http.Exchange) -> bool:
    return exchange.range is not None and exchange.range[1] is not None and not is_probe(exchange)


def collect(url: str, **settings: Any) -> Collected:
    """What one reading brings, which nothing may interrupt."""
    sink = Collected()
    over_several(url, sink, **settings).read()
    return sink


class TestPieces:
    @pytest.mark.parametrize("keep", [True, False], ids=["kept", "closed"])
    @pytest.mark.parametrize("connections", [2, 4])
    def test_in_order(
        self, source: http.Source, good: Good, monkeypatch: pytest.MonkeyPatch, connections: int, *, keep: bool
    ) -> None:
        """They begin at multiples of 1 MiB, each byte of them is asked for once, and no HEAD at all; there are no more
        connections than allowed."""
        requests: list[int] = []

        class Counted(Requests):
            def add(self, request: Request) -> None:
                super().add(request)
                requests.append(len(self))

        monkeypatch.setattr(source_reading, "Requests", Counted)
        sink = collect(
            source.serve("/image", lambda asked: good(asked, keep=keep, rate=10.0 * MIB)), connections=connections
        )
        assert sink.body == BODY
        assert (sink.begun, sink.offsets) == ([len(BODY)], [0])
        first, probe, *pieces = source.exchanges
        assert first.range is None
        assert probe.range == (len(BODY) - 1, len(BODY) - 1)
        ranges = sorted(piece.range for piece in pieces if piece.range is not None)
        assert len(ranges) == len(pieces) > 1
        assert ranges[-1][1] == len(BODY) - 1
        for (_, last), (begin, _) in itertools.pairwise(ranges):
            assert last is not None
            assert begin == last + 1
        assert all(begin % BLOCK == 0 for begin, _ in ranges)
        assert {exchange.method for exchange in source.exchanges} == {"GET"}
        assert {exchange.headers["if-range"] for exchange in (probe, *pieces)} == {OLD}
        assert max(requests) == connections

    def test_the_rest_of_one(self, source: http.Source, good: Good) -> None:
        """What an earlier reading brought is not asked for again."""
        offset = MIB + 1
        sink = Collected(body=bytearray(BODY[:offset]))
        url = source.serve("/image", good)
        over_several(url, sink, Version(url, OLD, len(BODY))).read(offset)
        assert (sink.offsets, bytes(sink.body)) == ([offset], BODY)
        assert len(source.exchanges) > 3
        assert all(exchange.first >= offset for exchange in source.exchanges)

    @pytest.mark.parametrize(
        ("resource", "settings"),
        [
            (GOOD, {"connections": 1}),
            (GOOD, {"split_size": len(BODY)}),
            (dataclasses.replace(GOOD, headers={"Accept-Ranges": "none"}), {}),
            (http.Resource(BODY), {}),
            (http.Resource(BODY, headers={"ETag": 'W/"old"', "Accept-Ranges": "bytes"}), {}),
            (dataclasses.replace(GOOD, chunked=True), {}),
            (dataclasses.replace(GOOD, announce=None), {}),
        ],
        ids=["not allowed", "small", "no ranges", "no ETag", "weak ETag", "chunked", "no length"],
    )
    def test_not_worth_it(self, source: http.Source, resource: http.Resource, settings: dict[str, int]) -> None:
        """Then one connection is all that there is, and nobody asks for more."""
        sink = collect(source.serve("/image", dataclasses.replace(resource, rate=60.0 * MIB)), **settings)
        assert sink.body == BODY
        assert len(source.exchanges) == 1

    def test_no_more_than_a_part_ahead(self, source: http.Source) -> None:
        """While the first connection hangs, the others fetch a piece for each connection, and no more."""
        hangs = http.Resource(BODY, etag=OLD, stall_after=MIB // 2)
        url = source.serve("/image", lambda asked: GOOD.answer_to(asked) if asked.number else hangs)
        with pytest.raises(Interrupted, match=r"nothing for 1\.5 seconds"):
            over_several(url, Collected(), connections=3, stall_timeout=1.5).read()
        ahead = sum(exchange.sent for exchange in source.exchanges[2:])
        assert 2 * PIECE <= ahead <= 3 * PIECE

    def test_a_slow_sink(self, source: http.Source, good: Good) -> None:
        """While the disk takes its time nobody is found silent, though nothing is read."""
        sink = Collected()
        slow = [2.0, 0.0, 0.0, 0.0]

        def piece(data: bytes, _take: Any = sink.piece) -> None:
            if slow and len(sink.body) > (4 - len(slow)) * MIB:
                time.sleep(slow.pop())
            _take(data)

        sink.piece = piece  # type: ignore[method-assign]
        over_several(source.serve("/image", good), sink, stall_timeout=1.5).read()
        assert sink.body == BODY
        assert slow == []

    def test_broken_in_the_middle(self, source: http.Source, good: Good) -> None:
        """What came in order is kept, and the rest is fetched over several connections again."""
        url = source.serve("/image", lambda asked: good(asked, cut_after=MIB // 2 if asked.first == 3 * MIB else None))
        sink = Collected()
        fetch = over_several(url, sink)
        with pytest.raises(Interrupted):
            fetch.read()
        source.serve("/image", Good())
        wait_for(lambda: len(source.exchanges) >= 4, 5, "all that was asked has been heard")
        time.sleep(0.1)
        kept, before = len(sink.body), len(source.exchanges)
        assert bytes(sink.body) == BODY[:kept]
        fetch.read(kept)
        assert sink.body == BODY
        assert len(source.exchanges) > before + 2
        assert min(exchange.first for exchange in source.exchanges[before:]) == kept


def lies() -> dict[str, dict[str, Any]]:
    """What a source may do with a range, as changes of the right answer."""
    return {
        "200": {"status": 200, "body": BODY, "headers": {}},
        "another version": {"status": 200, "body": OTHER, "headers": {}, "etag": NEW},
        "another ETag": {"etag": NEW},
        "a weak ETag": {"etag": "", "more": {"ETag": 'W/"old"'}},
        "no ETag": {"etag": ""},
        "no range": {"headers": {}},
        "another range": {"more": {"Content-Range": f"bytes 0-{PIECE - 1}/{len(BODY)}"}},
        "another length": {"more": {"Content-Range": f"bytes {len(BODY) - 1}-{len(BODY) - 1}/{len(BODY) + 1}"}},
        "too short": {"announce": 0},
        "too long": {"announce": PIECE + 1},
        "204": {"status": 204, "body": b""},
        "302": {"status": 302, "body": b"", "more": {"Location": "/elsewhere"}},
        "403": {"status": 403, "body": b"no\n"},
        "404": {"status": 404, "body": b"no\n"},
        "416": {"status": 416, "body": b""},
        "429": {"status": 429, "body": b"", "more": {"Retry-After": "3600"}},
        "503": {"status": 503, "body": b"", "more": {"Retry-After": "3600"}},
        "no HTTP": {"garbage": b"500 busy\r\n"},
        "the end": {"garbage": b""},
        "silence": {"hold": True},
    }


class TestLiars:
    @pytest.mark.parametrize("lie", lies().values(), ids=lies())
    def test_to_the_first_question(self, source: http.Source, good: Good, lie: dict[str, Any]) -> None:
        """Whoever does not serve ranges is left to the one connection that there is, which brings everything."""
        url = source.serve("/image", lambda asked: good.lying(asked, lie) if asked.number else good(asked))
        sink = collect(url, stall_timeout=1.0)
        assert (sink.offsets, bytes(sink.body)) == ([0], BODY)
        assert [exchange.path for exchange in source.exchanges] == ["/image"] * 2

    @pytest.mark.parametrize("lie", lies().values(), ids=lies())
    def test_later(self, source: http.Source, good: Good, lie: dict[str, Any]) -> None:
        """Whoever serves a last byte and no pieces is found out, and one connection goes on to the end."""
        url = source.serve("/image", lambda asked: good.lying(asked, lie) if is_piece(asked) else good(asked))
        sink = collect(url, stall_timeout=1.0)
        assert bytes(sink.body) == BODY
        assert 0 not in sink.offsets[1:]
        assert [exchange.range for exchange in source.exchanges[:2]] == [None, (len(BODY) - 1, len(BODY) - 1)]
        assert len(source.exchanges) <= 7

    @pytest.mark.parametrize("lie", lies().values(), ids=lies())
    def test_to_the_third_connection(self, source: http.Source, good: Good, lie: dict[str, Any]) -> None:
        """The same where it is a limit of connections, that others keep to."""
        url = source.serve("/image", lambda asked: good.lying(asked, lie) if asked.number == 4 else good(asked))
        sink = collect(url, stall_timeout=1.0)
        assert bytes(sink.body) == BODY
        assert len(sink.offsets) <= 2
        assert 0 not in sink.offsets[1:]

    @pytest.mark.parametrize("lie", [lies()[name] for name in ("200", "416", "503", "silence", "another ETag")])
    def test_once_the_first_connection_is_done(self, source: http.Source, good: Good, lie: dict[str, Any]) -> None:
        """A source that serves pieces at first is asked for the rest, over one connection."""

        def answer(exchange: http.Exchange) -> http.Resource:
            if not is_piece(exchange) or exchange.first < 3 * MIB:
                return good(exchange)
            wait_for(lambda: len(sink.body) >= 3 * MIB, 10, "all before it has come")
            return good.lying(exchange, lie)

        sink = Collected()
        over_several(source.serve("/image", answer), sink, stall_timeout=1.5).read()
        assert bytes(sink.body) == BODY
        assert sink.offsets == [0, 3 * MIB]
        assert (3 * MIB, None) in [exchange.range for exchange in source.exchanges]

    def test_it_is_not_tried_again(self, source: http.Source, good: Good) -> None:
        """A source that was found out is read over one connection for good."""
        url = source.serve(
            "/image", lambda asked: good(asked, status=403) if is_piece(asked) else good(asked, cut_after=3 * MIB)
        )
        sink = Collected()
        fetch = over_several(url, sink)
        with pytest.raises(Interrupted):
            fetch.read()
        source.serve("/image", GOOD)
        before = len(source.exchanges)
        fetch.read(len(sink.body))
        assert bytes(sink.body) == BODY
        assert len(source.exchanges) == before + 1

    def test_a_probe_that_stops_after_its_headers(self, source: http.Source, good: Good) -> None:
        """It is not waited for, and counts as a connection."""
        url = source.serve("/image", lambda asked: good(asked, stall_after=0 if is_probe(asked) else None))
        assert collect(url, stall_timeout=1.0).body == BODY
        assert source.most_connections <= 5

    @pytest.mark.parametrize("chunked", [True, False])
    def test_a_piece_with_more_than_was_asked_for(self, source: http.Source, good: Good, *, chunked: bool) -> None:
        """What is too much never gets in between."""

        def answer(exchange: http.Exchange) -> http.Resource:
            right = good(exchange)
            if not is_piece(exchange):
                return right
            return dataclasses.replace(
                right, body=right.body + b"more", announce=len(right.body), chunked=chunked, keep=True
            )

        assert bytes(collect(source.serve("/image", answer)).body) == BODY

    def test_a_piece_that_ends_early(self, source: http.Source, good: Good) -> None:
        """One without a length may end as if all were well."""

        def answer(exchange: http.Exchange) -> http.Resource:
            right = good(exchange)
            if not is_piece(exchange):
                return right
            return dataclasses.replace(right, body=right.body[:-1], chunked=True)

        assert bytes(collect(source.serve("/image", answer)).body) == BODY


class TestChanges:
    def test_early(self, source: http.Source, good: Good) -> None:
        """The first connection may still bring the old version to its end, and else the new one is read."""
        new = http.Resource(OTHER, etag=NEW)
        url = source.serve("/image", lambda asked: good(asked) if asked.number < 3 else new.answer_to(asked))
        sink = collect(url)
        assert (sink.offsets, bytes(sink.body)) in (([0], BODY), ([0, 0], OTHER))

    def test_later(self, source: http.Source, good: Good) -> None:
        """Where nothing of the old version is to be had any more, the new one is read from its beginning."""
        sink = Collected()

        def answer(exchange: http.Exchange) -> http.Resource:
            if exchange.first < 3 * MIB or is_probe(exchange):
                return good(exchange)
            wait_for(lambda: len(sink.body) >= 3 * MIB, 10, "all before it has come")
            return http.Resource(OTHER, etag=NEW).answer_to(exchange)

        over_several(source.serve("/image", answer), sink).read()
        assert (sink.offsets, bytes(sink.body)) == ([0, 0], OTHER)

    @pytest.mark.parametrize("seed", range(6))
    def test_all_at_once(self, source: http.Source, good: Good, seed: int) -> None:
        """A server that breaks off, lies and changes its file at random, all the time: what comes out in the end is one
        of the versions, and nobody hangs."""
        chance = random.Random(seed)
        versions = [GOOD, http.Resource(OTHER, etag=NEW)]
        wrong = [lie for name, lie in lies().items() if name not in ("204", "403", "404", "no HTTP")]

        def answer(exchange: http.Exchange) -> http.Resource:
            if chance.random() < 0.04:
                versions.reverse()
            right = versions[0].answer_to(exchange)
            match chance.choices(("good", "cut", "stall", "lie", "busy"), (10, 3, 1, 1, 1))[0]:
                case "cut":
                    return dataclasses.replace(
                        right, cut_after=chance.randrange(len(right.body) + 1), reset=chance.random() < 0.5
                    )
                case "stall":
                    return dataclasses.replace(right, stall_after=chance.randrange(len(right.body) + 1))
                case "lie" if right.status == 206:
                    return dataclasses.replace(right, **{k: v for k, v in chance.choice(wrong).items() if k != "more"})
                case "busy":
                    return http.Resource(status=503)
            return dataclasses.replace(right, keep=chance.random() < 0.5, chunked=chance.random() < 0.2)

        url = source.serve("/image", answer)
        sink = Collected()
        began = time.monotonic()
        for _ in range(200):
            # Over as many tries as the fetch needs; each has forgotten what the one before found out of the server.
            fetch = over_several(url, sink, None if not sink.versions else sink.versions[-1], stall_timeout=0.2)
            try:
                fetch.read(len(sink.body))
                break
            except Interrupted:
                whole = {OLD: BODY, NEW: OTHER}[sink.versions[-1].etag] if sink.versions else BODY
                assert bytes(sink.body) == whole[: len(sink.body)]
        assert bytes(sink.body) in (BODY, OTHER)
        assert time.monotonic() - began < 60


class TestNetworks:
    def test_pieces_are_not_redirected(self, source: http.Source, good: Good) -> None:
        """To a denied network, or to any other."""
        with http.Source() as other:
            end = other.serve("/image", GOOD)
            lie = {"status": 302, "body": b"", "headers": {"Location": end}}
            url = source.serve("/image", lambda asked: good.lying(asked, lie) if is_piece(asked) else good(asked))
            assert collect(url, deny_networks=(ip_network("127.0.0.2/32"),)).body == BODY
            assert other.exchanges == []


_MANY = """
import os, resource, sys
from imgsvc import source_reading
from tests.harness import wait_for
from tests.raw_peer import Collected, reader
source_reading.PIECE = 1 << 20
resource.setrlimit(resource.RLIMIT_NOFILE, (3000, 3000))
taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
sink = Collected()
reader(sys.argv[1], sink, None, connections=4, split_size=1 << 20).read()
os.write(1, sink.body)
"""


def test_many_descriptors(source: http.Source, good: Good) -> None:
    """A service with a thousand downloads has descriptors with numbers that select does not know."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _MANY, source.serve("/image", good)],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == BODY
    assert len(source.exchanges) > 2
