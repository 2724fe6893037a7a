"""What a pull has brought is served from here: before it is on record, afterwards, and not when it has changed."""

from __future__ import annotations

import dataclasses

import pytest

from imgsvc.errors import Elsewhere, Unavailable
from tests.cluster.members import MIB, Members, Reading, check_kept, some
from tests.flaky import DAMAGED, LOST, UNKNOWN
from tests.images.helpers import content, put
from tests.rooms import wait_until
from tests.source import Resource


def test_records_away_at_the_end(members: Members) -> None:
    """The bytes stay, and are on record when the records answer again."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, body)
    members.one.faults.always("hold", fault=LOST)
    with pytest.raises(Unavailable):
        members.one.pulls.copy(image)
    assert content(members.one.disk, image.id) == body
    members.one.faults.heal()
    members.one.settlements.retry()
    check_kept(members, image.id, body)


def test_dropped_before_it_is_on_record(members: Members) -> None:
    """A note that is made late, for its first answer was lost, vouches for nothing that is not here any more."""
    body = some(MIB)
    image = members.image(body)
    other = members.serve(image, body)
    members.one.faults.next("hold", UNKNOWN)
    with pytest.raises(Unavailable):
        members.one.pulls.copy(image)
    members.records.release(image.id)
    members.one.disk.delete(image.id)
    members.one.settlements.retry()
    assert members.records.holding[image.id] == {other}


@pytest.mark.parametrize("faulty", [["open"], ["open", "size", "space", "writer"]], ids=["file", "disk"])
def test_a_disk_that_gives_nothing(members: Members, faulty: list[str]) -> None:
    """What is on record here comes from others."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, Resource(body, keep=True))
    put(members.one.disk, image.id, body)
    members.hold(image, members.one.disk.member)
    members.one.faults.always(*faulty, fault=DAMAGED)
    assert Reading(members.one.service.open(image.id)[1]).whole() == body


def test_read_before_it_is_on_record(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the records are away one pull is enough for all, and nothing is read again for what it has found right."""
    body = some(MIB)
    image = members.image(body)
    other = members.serve(image, body)
    remembered = dataclasses.replace(image, replicas=(other,))
    monkeypatch.setattr(members.records, "look", lambda _id: (remembered, 1.0))
    members.one.faults.always("hold", fault=LOST)
    for _ in range(3):
        assert Reading(members.one.service.open(image.id)[1]).whole() == body
        wait_until(lambda: not members.one.pulls.running)
    assert len(members.asked(image, other)) == 1
    assert Reading(members.one.service.open(image.id, own=True)[1]).whole() == body
    assert not members.one.digests.doubts(image.id)
    changed = dataclasses.replace(remembered, sha256="0" * 64)
    monkeypatch.setattr(members.records, "look", lambda _id: (changed, 1.0))
    with pytest.raises(Elsewhere):
        members.one.service.open(image.id, own=True)


@pytest.mark.parametrize("noted", [True, False])
def test_read_after_another_pull_was_over(members: Members, *, noted: bool) -> None:
    """Who asked before has the image from here, though nobody else can give it any more, and nothing fits."""
    body = some(MIB)
    image = members.image(body)
    other = members.serve(image, body)
    late = members.one.pulls.open(image)
    if not noted:
        members.one.faults.always("hold", fault=LOST)
    assert members.read(image).whole() == body
    wait_until(lambda: not members.one.pulls.running)
    if noted:
        members.hold(image, members.one.disk.member)
    members.one.mirror.leave(other)
    members.one.faults.always("space", "writer", "hold", fault=LOST)
    assert Reading(late).whole() == body
    assert len(members.asked(image, other)) == 1
    if not noted:
        with pytest.raises(Unavailable):
            members.one.pulls.copy(image)


def test_a_look_from_before_it_was_on_record(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been noted since is served, and not doubted."""
    body = some(MIB)
    image = members.image(body)
    other = members.serve(image, body)
    monkeypatch.setattr(members.records, "look", lambda _id: (dataclasses.replace(image, replicas=(other,)), None))
    members.one.pulls.copy(image)
    members.hold(image, members.one.disk.member)
    assert Reading(members.one.service.open(image.id, own=True)[1]).whole() == body
    assert not members.one.digests.doubts(image.id)


def test_a_file_that_has_changed(members: Members) -> None:
    """It is not served, though on record; others have the image."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, Resource(body, keep=True))
    put(members.one.disk, image.id, body[1:])
    members.hold(image, members.one.disk.member)
    _, reader, _ = members.one.service.open(image.id)
    assert Reading(reader).whole() == body
    with pytest.raises(Unavailable):
        members.one.service.open(image.id, own=True)
