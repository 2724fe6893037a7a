"""Preconditions by the tables and examples of RFC 9110, sections 8.8 and 13, and HTTP dates in their three forms."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from http import HTTPStatus

import pytest
from tornado.httputil import HTTPHeaders

from imgsvc.api.conditions import Validators, parse_date, precondition, range_applies, validators_of
from imgsvc.metadata.image import Image, ImageType, new_id

OK, NOT_MODIFIED, FAILED = HTTPStatus.OK, HTTPStatus.NOT_MODIFIED, HTTPStatus.PRECONDITION_FAILED

MODIFIED = datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)
SAME = "Sun, 06 Nov 1994 08:49:37 GMT"
BEFORE = "Sun, 06 Nov 1994 08:49:36 GMT"
AFTER = "Sun, 06 Nov 1994 08:49:38 GMT"

TAGGED = Validators('"xyzzy"', MODIFIED, strong_date=True)
BARE = Validators("", MODIFIED, strong_date=False)
DATELESS = Validators('"xyzzy"', None, strong_date=False)


@pytest.mark.parametrize("text", [SAME, "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"])
def test_a_date_in_any_form(text: str) -> None:
    """The three examples of section 5.6.7 are one moment."""
    assert parse_date(text) == MODIFIED


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("Sat, 31 Dec 2016 23:59:60 GMT", datetime(2017, 1, 1, tzinfo=UTC)),
        ("Thu, 01 Jan 1970 00:00:00 GMT", datetime(1970, 1, 1, tzinfo=UTC)),
        ("Tue, 29 Feb 2028 00:00:00 GMT", datetime(2028, 2, 29, tzinfo=UTC)),
        ("Sun Nov 16 08:49:37 1994", datetime(1994, 11, 16, 8, 49, 37, tzinfo=UTC)),
    ],
)
def test_other_dates(text: str, moment: datetime) -> None:
    """Leap seconds and leap days are dates."""
    assert parse_date(text) == moment


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "1994-11-06T08:49:37Z",
        "Sun, 06 Nov 1994 08:49:37",
        "Sun, 06 Nov 1994 08:49:37 UTC",
        "Sun, 06 Nov 1994 08:49:37 +0000",
        "Sun, 06 Nov 1994 08:49:37 gmt",
        "sun, 06 nov 1994 08:49:37 GMT",
        "Sun, 6 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 94 08:49:37 GMT",
        "Sun, 31 Feb 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 24:49:37 GMT",
        "Sun, 06 Nov 1994 08:60:37 GMT",
        "Sun, 06 Nov 1994 08:49:61 GMT",
        "Sun, 06 Nov 0000 08:49:37 GMT",
        "Fri, 31 Dec 9999 23:59:60 GMT",
        f"{SAME}, {SAME}",
        f"{SAME}\n",
        "Sunday, 06-Nov-1994 08:49:37 GMT",
        "Sun Nov 6 08:49:37 1994",
        "Sun, \N{ARABIC-INDIC DIGIT ZERO}6 Nov 1994 08:49:37 GMT",
    ],
)
def test_no_date(text: str) -> None:
    """What the grammar does not have is no date."""
    assert parse_date(text) is None


@pytest.mark.parametrize(("days", "century"), [(-10, 0), (10, -100)])
def test_a_year_of_two_digits(days: int, century: int) -> None:
    """It is in the future only up to fifty years from now."""
    fifty_years = timedelta(days=18_262)
    date = datetime.now(UTC).replace(microsecond=0) + fifty_years + timedelta(days=days)
    assert parse_date(date.strftime("Monday, %d-%b-%y %H:%M:%S GMT")) == date.replace(year=date.year + century)


# Sections 13.1.1 to 13.1.4; each with one field.
@pytest.mark.parametrize(
    ("field", "value", "tagged", "bare", "dateless"),
    [
        ("If-Match", '"xyzzy"', OK, FAILED, OK),
        ("If-Match", '"xyzzy", "r2d2xxxx", "c3piozzzz"', OK, FAILED, OK),
        ("If-Match", ',"r2d2xxxx" ,, "xyzzy",', OK, FAILED, OK),
        ("If-Match", "*", OK, OK, OK),
        ("If-Match", 'W/"xyzzy"', FAILED, FAILED, FAILED),
        ("If-Match", '"other"', FAILED, FAILED, FAILED),
        ("If-Match", "xyzzy", FAILED, FAILED, FAILED),
        ("If-Match", '""', FAILED, FAILED, FAILED),
        ("If-Match", "", FAILED, FAILED, FAILED),
        ("If-Match", '"a,"xyzzy"', FAILED, FAILED, FAILED),
        ("If-None-Match", '"xyzzy"', NOT_MODIFIED, OK, NOT_MODIFIED),
        ("If-None-Match", 'W/"xyzzy"', NOT_MODIFIED, OK, NOT_MODIFIED),
        ("If-None-Match", 'W/"xyzzy", W/"r2d2xxxx", W/"c3piozzzz"', NOT_MODIFIED, OK, NOT_MODIFIED),
        ("If-None-Match", '"a,comma", "xyzzy"', NOT_MODIFIED, OK, NOT_MODIFIED),
        ("If-None-Match", "*", NOT_MODIFIED, NOT_MODIFIED, NOT_MODIFIED),
        ("If-None-Match", '"other"', OK, OK, OK),
        ("If-None-Match", '""', OK, OK, OK),
        ("If-None-Match", "xyzzy", OK, OK, OK),
        ("If-None-Match", '"xyzzy', OK, OK, OK),
        ("If-None-Match", 'w/"xyzzy"', OK, OK, OK),
        ("If-None-Match", '"r2d2" "xyzzy"', OK, OK, OK),
        ("If-None-Match", '"xyzzy", *', OK, OK, OK),
        ("If-Modified-Since", BEFORE, OK, OK, OK),
        ("If-Modified-Since", SAME, NOT_MODIFIED, NOT_MODIFIED, OK),
        ("If-Modified-Since", AFTER, NOT_MODIFIED, NOT_MODIFIED, OK),
        ("If-Modified-Since", "yesterday", OK, OK, OK),
        ("If-Modified-Since", f"{AFTER},{AFTER}", OK, OK, OK),
        ("If-Unmodified-Since", BEFORE, FAILED, FAILED, OK),
        ("If-Unmodified-Since", SAME, OK, OK, OK),
        ("If-Unmodified-Since", AFTER, OK, OK, OK),
        ("If-Unmodified-Since", "yesterday", OK, OK, OK),
    ],
)
def test_one_condition(field: str, value: str, tagged: HTTPStatus, bare: HTTPStatus, dateless: HTTPStatus) -> None:
    """For an image with tag and date, one without a tag, and one without a date."""
    headers = HTTPHeaders({field: value})
    assert [precondition(headers, current) for current in (TAGGED, BARE, DATELESS)] == [tagged, bare, dateless]


HOLDS = {
    "If-Match": ('"xyzzy"', '"other"'),
    "If-Unmodified-Since": (SAME, BEFORE),
    "If-None-Match": ('"other"', '"xyzzy"'),
    "If-Modified-Since": (BEFORE, SAME),
}


@pytest.mark.parametrize("values", list(itertools.product((None, True, False), repeat=4)))
def test_precedence(values: tuple[bool | None, ...]) -> None:
    """All 81 ways in which four conditions are there or not, and true or false, by the steps of section 13.2.2."""
    match, unmodified, none_match, modified = values
    headers = HTTPHeaders()
    for (field, (true, false)), value in zip(HOLDS.items(), values, strict=True):
        if value is not None:
            headers[field] = true if value else false
    first = match if match is not None else unmodified
    second = none_match if none_match is not None else modified
    wanted = FAILED if first is False else NOT_MODIFIED if second is False else OK
    assert precondition(headers, TAGGED) is wanted


def test_fields_that_are_repeated() -> None:
    """Lists of tags are one list; a date that comes twice is none."""
    headers = HTTPHeaders()
    headers.add("If-None-Match", '"other"')
    headers.add("If-None-Match", 'W/"xyzzy"')
    assert precondition(headers, TAGGED) is NOT_MODIFIED
    headers = HTTPHeaders()
    headers.add("If-Modified-Since", AFTER)
    headers.add("If-Modified-Since", AFTER)
    assert precondition(headers, TAGGED) is OK


@pytest.mark.parametrize(
    ("value", "tagged", "bare"),
    [
        ('"xyzzy"', True, False),
        ('W/"xyzzy"', False, False),
        ('"other"', False, False),
        ('""', False, False),
        ("", False, False),
        ("*", False, False),
        ('"xyzzy", "other"', False, False),
        (SAME, True, False),
        ("Sunday, 06-Nov-94 08:49:37 GMT", True, False),
        (BEFORE, False, False),
        (AFTER, False, False),
        ("yesterday", False, False),
    ],
)
def test_if_range(value: str, tagged: bool, bare: bool) -> None:
    """Section 13.1.5: a tag by the strong comparison, a date only when it is exactly ours, and a strong validator."""
    headers = HTTPHeaders({"If-Range": value})
    assert range_applies(headers, TAGGED) is tagged
    assert range_applies(headers, BARE) is bare
    assert not range_applies(headers, Validators("", None, strong_date=False))


def test_without_if_range() -> None:
    """A Range counts."""
    assert range_applies(HTTPHeaders(), BARE)


class TestValidators:
    NOW = MODIFIED + timedelta(days=1)

    def of(self, **fields: object) -> Validators:
        usual: dict[str, object] = {"download_start": MODIFIED, "download_end": MODIFIED, "sha256": "ab" * 32}
        return validators_of(Image(id=new_id(), type=ImageType.KVM, **{**usual, **fields}), self.NOW)  # type: ignore[arg-type]

    def test_of_an_upload(self) -> None:
        """The digest is the tag; the date is in whole seconds, and strong, for an upload comes once."""
        assert self.of(download_end=MODIFIED + timedelta(microseconds=999_999)) == Validators(
            f'"{"ab" * 32}"', MODIFIED, strong_date=True
        )

    @pytest.mark.parametrize(
        ("began", "strong"), [(MODIFIED - timedelta(microseconds=1), True), (MODIFIED, False), (None, False)]
    )
    def test_of_a_fetch(self, began: datetime | None, strong: bool) -> None:
        """The date is strong when the fetch took longer than that second: another version cannot have ended in it."""
        current = self.of(
            source="http://mirror.example/x", download_start=began, download_end=MODIFIED + timedelta(milliseconds=9)
        )
        assert current.strong_date is strong

    def test_without_a_digest(self) -> None:
        """There is no tag."""
        assert self.of(sha256="").etag == ""

    def test_without_a_date(self) -> None:
        """There is none, and none that is strong."""
        assert self.of(download_end=None) == Validators(f'"{"ab" * 32}"', None, strong_date=False)

    def test_a_date_to_come(self) -> None:
        """It is replaced by the present one, which is no validator."""
        current = self.of(download_end=self.NOW + timedelta(seconds=2))
        assert (current.modified, current.strong_date) == (self.NOW, False)
