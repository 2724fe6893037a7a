"""The Range field against sizes: the examples of RFC 9110, section 14, and what clients send wrongly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsvc.api.ranges import ByteRange, Unsatisfiable, requested_range

WHOLE = None


@pytest.mark.parametrize(
    ("field", "first", "last"),
    [
        # RFC 9110, section 14.1.2, of 10,000 bytes
        ("bytes=0-499", 0, 499),
        ("bytes=500-999", 500, 999),
        ("bytes=-500", 9500, 9999),
        ("bytes=9500-", 9500, 9999),
        ("bytes=0-0", 0, 0),
        ("bytes=-1", 9999, 9999),
        # the same section: a last position behind the end, a suffix longer than all
        ("bytes=9999-10000", 9999, 9999),
        ("bytes=0-", 0, 9999),
        ("bytes=-10000", 0, 9999),
        ("bytes=-10001", 0, 9999),
        # section 14.1: names of units are not sensitive to case; section 5.6.1: empty members of a list
        ("BYTES=1-2", 1, 2),
        ("bytes= , 1-2 ,,", 1, 2),
        (" bytes=1-2\t", 1, 2),
        # section 15.3.7: of several ranges just one has bytes
        ("bytes=1-2,10000-", 1, 2),
        ("bytes=-0,1-2", 1, 2),
        # section 14.1.1: large numbers
        ("bytes=1-" + "9" * 10_000, 1, 9999),
        ("bytes=-" + "9" * 10_000, 0, 9999),
        ("bytes=" + "0" * 10_000 + "1-2", 1, 2),
    ],
)
def test_one_range(field: str, first: int, last: int) -> None:
    """It is what the answer has, and Content-Range says which."""
    part = requested_range(field, 10_000)
    assert part == ByteRange(first, last)
    assert part.size == last - first + 1
    assert part.content_range(10_000) == f"bytes {first}-{last}/10000"


@pytest.mark.parametrize(
    ("field", "size"),
    [
        ("bytes=10000-", 10_000),
        ("bytes=10000-10001", 10_000),
        ("bytes=-0", 10_000),
        ("bytes=20000-30000,-0", 10_000),
        ("bytes=" + "9" * 10_000 + "-", 10_000),
        ("bytes=0-", 0),
        ("bytes=0-0", 0),
        ("bytes=-0", 0),
    ],
)
def test_no_byte_in_it(field: str, size: int) -> None:
    """A range that is valid and has nothing cannot be satisfied."""
    with pytest.raises(Unsatisfiable):
        requested_range(field, size)


@pytest.mark.parametrize(
    "field",
    [
        # section 14.1.1: invalid
        "bytes=1-0",
        "bytes=10001-10000",
        "bytes=-",
        "bytes=",
        "bytes=,",
        "bytes=a-b",
        "bytes=1",
        "bytes=1-2-3",
        "bytes=--1",
        "bytes=+1-2",
        "bytes=1-2;",
        "bytes=0x1-2",
        "bytes=1 -2",
        "bytes=1- 2",
        "bytes =1-2",
        "bytes 1-2",
        "bytes",
        "",
        "bytes=\N{ARABIC-INDIC DIGIT ONE}-2",
        "bytes=1-2\n",
        # one invalid range makes all of them so
        "bytes=1-2,x",
        "bytes=1-2,bytes=3-4",
        # section 14.2: other units
        "seconds=1-2",
        "none",
        # several ranges with bytes
        "bytes=0-0,-1",
        "bytes=500-600,601-999",
        "bytes=" + ",".join(["0-0"] * 10_000),
    ],
)
def test_no_range_that_counts(field: str) -> None:
    """What is invalid, has another unit, or is several ranges is answered with the whole."""
    assert requested_range(field, 10_000) is WHOLE


def test_the_end_of_nothing() -> None:
    """It can be satisfied, and no Content-Range can say so."""
    assert requested_range("bytes=-5", 0) is WHOLE


@given(st.binary(max_size=20), st.none() | st.integers(0, 25), st.none() | st.integers(0, 25))
def test_is_the_slice(content: bytes, first: int | None, last: int | None) -> None:
    """Whatever the numbers, a part has exactly the bytes that were asked for, and never none."""
    field = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    if first is not None:
        wanted = content[first:] if last is None else content[first : last + 1]
    else:
        wanted = content[max(len(content) - (last or 0), 0) :] if last else b""
    try:
        part = requested_range(field, len(content))
    except Unsatisfiable:
        assert wanted == b""
    else:
        if part is not WHOLE:
            assert part.size > 0
            assert content[part.first : part.last + 1] == wanted
            assert part.size == len(wanted)
        else:
            invalid = (first is None and last is None) or (first is not None and last is not None and last < first)
            assert invalid or not content
