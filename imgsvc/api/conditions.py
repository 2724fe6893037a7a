"""Validators of an image, and the conditions that a request sets on them (RFC 9110, sections 8.8 and 13)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus

from imgsvc.metadata.image import Image

# The next member of a list of entity tags, which may be empty, up to its comma.
_TAG = re.compile(r'[ \t]*(?:(W/)?("[\x21\x23-\x7e\x80-\xff]*")[ \t]*)?(?:,|\Z)')

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH = f"(?P<month>{'|'.join(_MONTHS)})"
_TIME = "(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_DATES = (
    re.compile(rf"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_TIME} GMT"),
    re.compile(
        rf"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_TIME} GMT"
    ),
    re.compile(rf"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) {_MONTH} (?P<day>[0-9 ][0-9]) {_TIME} (?P<year>[0-9]{{4}})"),
)
# A date whose year has two digits is at most so many years ahead.
_AHEAD = 50
_LEAP_SECOND = 60


@dataclass(frozen=True, slots=True)
class Validators:
    """`etag` is a strong entity tag, "" when there is none; `modified` is in whole seconds.

    `strong_date` is True when no two versions of the bytes can have had that date (RFC 9110, section 8.8.2.2).
    """

    etag: str
    modified: datetime | None
    strong_date: bool


def validators_of(image: Image, now: datetime) -> Validators:
    """Those of a complete image.

    Bytes change only when an image that was complete comes to be in error, and its source is then fetched again; an
    upload is made once. So if this transfer began in an earlier second than it ended in, nothing else ended in that
    one. A date to come, by another host's clock, is replaced by the present one (section 8.8.2.1).
    """
    etag = f'"{image.sha256}"' if image.sha256 else ""
    if image.download_end is None:
        return Validators(etag, None, strong_date=False)
    modified = image.download_end.replace(microsecond=0)
    if modified > now:
        return Validators(etag, now.replace(microsecond=0), strong_date=False)
    began_earlier = image.download_start is not None and image.download_start < modified
    return Validators(etag, modified, strong_date=not image.source or began_earlier)


def precondition(headers: Mapping[str, str], current: Validators) -> HTTPStatus:
    """OK when the request is to be carried out, else what it is answered with: NOT_MODIFIED or PRECONDITION_FAILED.

    For GET and HEAD, in the order of RFC 9110, section 13.2.2. A date that is none is ignored, as that asks for; a
    list of tags that is none has no tags.
    """
    if "If-Match" in headers:
        if not _match(headers["If-Match"], current.etag, weakly=False):
            return HTTPStatus.PRECONDITION_FAILED
    elif _changed_since(headers.get("If-Unmodified-Since"), current) is True:
        return HTTPStatus.PRECONDITION_FAILED
    if "If-None-Match" in headers:
        if _match(headers["If-None-Match"], current.etag, weakly=True):
            return HTTPStatus.NOT_MODIFIED
    elif _changed_since(headers.get("If-Modified-Since"), current) is False:
        return HTTPStatus.NOT_MODIFIED
    return HTTPStatus.OK


def range_applies(headers: Mapping[str, str], current: Validators) -> bool:
    """Whether a Range counts: what the client has a part of is, for certain, what there is now (section 13.1.5)."""
    if "If-Range" not in headers:
        return True
    validator = headers["If-Range"]
    if validator.startswith(('"', "W/")):
        return validator == current.etag
    return current.strong_date and current.modified is not None and parse_date(validator) == current.modified


def parse_date(text: str) -> datetime | None:
    """The moment that an HTTP-date in any of its three forms names (section 5.6.7); None when it is none."""
    match = next(filter(None, (form.fullmatch(text) for form in _DATES)), None)
    if match is None:
        return None
    year = int(match["year"])
    try:
        if len(match["year"]) > len("94"):
            return _moment(match, year)
        now = datetime.now(UTC)
        moment = _moment(match, year + now.year // 100 * 100)
        return _moment(match, moment.year - 100) if _more_years_ahead(moment, now) else moment
    except (ValueError, OverflowError):
        return None


def _moment(match: re.Match[str], year: int) -> datetime:
    month, second = _MONTHS.index(match["month"]) + 1, int(match["second"])
    leap = second == _LEAP_SECOND
    time = (int(match["hour"]), int(match["minute"]), second - leap)
    return datetime(year, month, int(match["day"]), *time, tzinfo=UTC) + timedelta(seconds=leap)


def _more_years_ahead(moment: datetime, now: datetime) -> bool:
    return (moment.year - _AHEAD, moment.timetuple()[1:6]) > (now.year, now.timetuple()[1:6])


def _changed_since(date: str | None, current: Validators) -> bool | None:
    """None when nobody asks, or cannot be told."""
    moment = None if date is None else parse_date(date)
    if moment is None or current.modified is None:
        return None
    return current.modified > moment


def _match(field: str, etag: str, *, weakly: bool) -> bool:
    """Whether the tag is among those of the field. A representation that has no tag is still matched by `*`."""
    return field.strip(" \t") == "*" or any(tag == etag and (weakly or not weak) for weak, tag in _tags(field))


def _tags(field: str) -> list[tuple[bool, str]]:
    """Whether it is weak, and the tag itself, of each member of a list; none when the field is no such list."""
    tags, position = [], 0
    while position < len(field):
        match = _TAG.match(field, position)
        if match is None:
            return []
        if match[2]:
            tags.append((match[1] is not None, match[2]))
        position = match.end()
    return tags
