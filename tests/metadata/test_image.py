"""The image document: what Go programs read, and what the Go program wrote."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgsvc.metadata.image import Image, ImageType, Status, format_time, is_id, new_id, parse_time

KEYS = [
    "id",
    "source",
    "type",
    "comment",
    "status",
    "size",
    "expected_size",
    "download_start",
    "download_end",
    "sha256",
    "error",
]

OFFSETS = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
# The first and the last days of the calendar have no UTC form in every time zone.
MOMENTS = st.datetimes(datetime(2, 1, 1), datetime(9999, 12, 30), timezones=st.just(UTC) | OFFSETS)  # noqa: DTZ001 st.datetimes adds the time zone

IMAGES = st.builds(
    Image,
    id=st.uuids(version=4).map(str),
    type=st.sampled_from(ImageType),
    source=st.text(),
    comment=st.text(),
    status=st.sampled_from(Status),
    size=st.integers(0, 2**63 - 1),
    expected_size=st.integers(-1, 2**63 - 1),
    download_start=st.none() | MOMENTS,
    download_end=st.none() | MOMENTS,
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64) | st.just(""),
    error=st.text(),
    revision=st.integers(0, 2**63 - 1),
)

GO_DOCUMENT = """{"id":"0b53a3f2-5a0c-4b1e-9b1f-0c6d3e2f1a00","source":"http://a.example/x?a=1\\u0026b=\\u003c2\\u003e",
"type":"kvm","comment":"é","status":"complete","size":24,"expected_size":24,
"download_start":"2015-03-02T17:04:35.123456789-05:00","download_end":"2015-03-02T22:04:36Z"}"""


@settings(deadline=None, database=None)
@given(IMAGES)
def test_round_trip(image: Image) -> None:
    """A document is the whole record, its revision apart."""
    assert Image.from_json(image.to_json(), image.revision) == image
    assert Image.from_json(image.to_json().encode()) == dataclasses.replace(image, revision=0)


@settings(deadline=None, database=None)
@given(IMAGES)
def test_form(image: Image) -> None:
    """Keys come in the wire contract's order, in one line, as compact as Go writes them."""
    assert [*json.loads(image.to_json())] == KEYS
    assert "\n" not in image.to_json()
    assert image.to_json().startswith(f'{{"id":"{image.id}","source":"')


def test_whole_document() -> None:
    """One document, to the byte."""
    image = Image(
        id="0b53a3f2-5a0c-4b1e-9b1f-0c6d3e2f1a00",
        type=ImageType.CONTAINER,
        comment='é "\0',
        status=Status.DOWNLOADING,
        size=10**15,
        expected_size=-1,
        download_start=datetime(2026, 11, 23, 7, 4, 35, 123450, UTC),
    )
    assert image.to_json() == (
        '{"id":"0b53a3f2-5a0c-4b1e-9b1f-0c6d3e2f1a00","source":"","type":"container","comment":"é \\"\\u0000",'
        '"status":"downloading","size":1000000000000000,"expected_size":-1,'
        '"download_start":"2026-11-23T07:04:35.12345Z","download_end":"0001-01-01T00:00:00Z","sha256":"","error":""}'
    )


def test_document_of_the_go_program() -> None:
    """One without digest and error, with local times in nanoseconds, reads as an image with times in UTC."""
    assert Image.from_json(GO_DOCUMENT, revision=3) == Image(
        id="0b53a3f2-5a0c-4b1e-9b1f-0c6d3e2f1a00",
        type=ImageType.KVM,
        source="http://a.example/x?a=1&b=<2>",
        comment="é",
        status=Status.COMPLETE,
        size=24,
        expected_size=24,
        download_start=datetime(2015, 3, 2, 22, 4, 35, 123456, UTC),
        download_end=datetime(2015, 3, 2, 22, 4, 36, 0, UTC),
        revision=3,
    )


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00+02:00", None),
        ("2026-11-23T07:04:35Z", datetime(2026, 11, 23, 7, 4, 35, 0, UTC)),
        ("2026-11-23T07:04:35.5Z", datetime(2026, 11, 23, 7, 4, 35, 500000, UTC)),
        ("2026-11-23T07:04:35.999999999Z", datetime(2026, 11, 23, 7, 4, 35, 999999, UTC)),
        ("2026-11-23T00:30:00+01:00", datetime(2026, 11, 22, 23, 30, 0, 0, UTC)),
        ("2026-12-31T23:30:00-00:45", datetime(2027, 1, 1, 0, 15, 0, 0, UTC)),
    ],
)
def test_times(text: str, moment: datetime | None) -> None:
    """RFC 3339 in any offset is a moment in UTC, cut to the microsecond; Go's zero time is none."""
    assert parse_time(text) == moment
    assert parse_time(format_time(moment)) == moment


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-11-23",
        "2026-11-23 07:04:35Z",
        "2026-11-23T07:04:35",
        "2026-13-23T07:04:35Z",
        "2026-11-23T07:04:35.Z",
        "2026-11-23T07:04:35+25:00",
        "9999-12-31T23:59:59-01:00",
        "\u0662\u0660\u0662\u0666-11-23T07:04:35Z",
        "2026-11-23T07:04:35Z\n",
    ],
)
def test_no_time(text: str) -> None:
    """What is no RFC 3339 time, or one that has no UTC form, is a ValueError."""
    with pytest.raises(ValueError):
        parse_time(text)


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"id": 7},
        {"type": "KVM"},
        {"type": "iso"},
        {"status": "done"},
        {"size": "24"},
        {"size": 24.5},
        {"size": True},
        {"expected_size": []},
        {"size": 2**63},
        {"expected_size": -(2**63)},
        {"comment": 7},
        {"source": {}},
        {"download_start": 0},
        {"download_end": "never"},
        {"sha256": None},
        {"error": False},
    ],
    ids=str,
)
def test_wrong_value(change: dict[str, object]) -> None:
    """A value of the wrong type or out of range is a ValueError, and never a crash."""
    document = Image(id=new_id(), type=ImageType.KVM).to_document() | change
    with pytest.raises(ValueError):
        Image.from_json(json.dumps(document))


@pytest.mark.parametrize("key", ["id", "type", "status"])
def test_missing_key(key: str) -> None:
    """A document without id, type or status is no image's, and the error names the key."""
    document = Image(id=new_id(), type=ImageType.KVM).to_document()
    del document[key]
    with pytest.raises(ValueError, match=key):
        Image.from_json(json.dumps(document))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "null", '"text"', b"\xff\xfe\xfd", "[" * 5_000, '{"id":' * 5_000],
    ids=lambda text: repr(text[:10]),
)
def test_no_document(text: str | bytes) -> None:
    """What is no JSON object is a ValueError."""
    with pytest.raises(ValueError):
        Image.from_json(text)


def test_keys_to_come_are_let_pass() -> None:
    """A document of a later version may have more keys."""
    image = Image(id=new_id(), type=ImageType.KVM)
    assert Image.from_json(json.dumps(image.to_document() | {"replicas": 3})) == image


@pytest.mark.parametrize(
    "text",
    [
        "",
        "..",
        "../../etc/passwd",
        "0b53a3f2-5a0c-4b1e-9b1f-0c6d3e2f1a00\n",
        "0B53A3F2-5A0C-4B1E-9B1F-0C6D3E2F1A00",
        "{0b53a3f2-5a0c-4b1e-9b1f-0c6d3e2f1a00}",
        "0b53a3f25a0c4b1e9b1f0c6d3e2f1a00",
        "\u0660b53a3f2-5a0c-4b1e-9b1f-0c6d3e2f1a00",
        "0b53a3f2-5a0c-4b1e-9b1f-0c6d3e2f1a0/",
    ],
)
def test_no_id(text: str) -> None:
    """Only the one form that names a file safely is an id."""
    assert not is_id(text)
    assert is_id(new_id())


class TestSteps:
    """Each step keeps id, type, source and comment, and leaves the image it was taken from as it was."""

    image = Image(id=new_id(), type=ImageType.KVM, source="http://a.example/", comment="mine", revision=4)

    def kept(self, image: Image) -> bool:
        return all(
            getattr(image, name) == getattr(self.image, name)
            for name in ("id", "type", "source", "comment", "revision")
        )

    def test_started(self) -> None:
        """A start forgets what an earlier try had reached."""
        image = self.image.progressed(9).failed("no").started(7)
        assert self.kept(image)
        assert (image.status, image.size, image.expected_size) == (Status.DOWNLOADING, 0, 7)
        assert image.download_start is not None
        assert image.download_end is None
        assert image.in_transfer

    def test_completed(self) -> None:
        """A complete image has a size, a digest, an end, and no error."""
        image = self.image.started(7).completed(7, "ab")
        assert self.kept(image)
        assert (image.status, image.size, image.sha256, image.error) == (Status.COMPLETE, 7, "ab", "")
        assert image.download_end is not None
        assert image.download_start is not None
        assert image.download_end >= image.download_start
        assert not image.in_transfer

    def test_failed(self) -> None:
        """An image in error has a reason, an end, and no digest."""
        image = self.image.started(7).completed(7, "ab").failed("its file is missing")
        assert self.kept(image)
        assert (image.status, image.sha256, image.error) == (Status.ERROR, "", "its file is missing")
        assert image.download_end is not None
        assert not image.in_transfer

    def test_requeued(self) -> None:
        """An image that is to be fetched again is like a new one."""
        assert self.image.started(7).completed(7, "ab").failed("lost").requeued() == self.image
        assert self.image.in_transfer
