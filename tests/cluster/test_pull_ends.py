"""Pulls whose image goes or changes meanwhile, or whose service stops: they end, and leave nothing."""

from __future__ import annotations

import dataclasses

import pytest

from imgsvc.errors import Conflict, ImgsvcError, Stopping, Unavailable
from imgsvc.metadata.image import ImageType, Status
from tests.cluster.members import MIB, Members, check_not_kept, some
from tests.images.helpers import content
from tests.rooms import wait_until
from tests.source import Resource


def test_deleted(members: Members) -> None:
    """All ends at once."""
    image = members.image(some(MIB))
    members.serve(image, Resource(some(MIB), stall_after=MIB // 2))
    readers = members.read(image), members.read(image, MIB - 1)
    wait_until(lambda: len(readers[0].body) == MIB // 2)
    members.one.service.delete(image.id)
    for reader in readers:
        with pytest.raises(Conflict):
            reader.whole()
    check_not_kept(members, image.id)


@pytest.mark.parametrize("call", ["commit", "hold"])
def test_deleted_at_the_end(members: Members, call: str) -> None:
    """However late: nothing of it stays."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, body)
    members.one.faults.at(call, 1, lambda: members.one.base.delete(image.id))
    with pytest.raises(ImgsvcError):
        members.one.pulls.copy(image)
    check_not_kept(members, image.id)


def test_fetched_again_meanwhile(members: Members) -> None:
    """What was right when it came is dropped when the image has other bytes by now."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, body)
    other = dataclasses.replace(image, sha256="0" * 64)

    def fetch() -> None:
        """By another member."""
        members.records.update(other)
        members.records.release(image.id)

    members.one.faults.at("hold", 1, fetch)
    with pytest.raises(Conflict):
        members.one.pulls.copy(image)
    check_not_kept(members, image.id)


def test_other_bytes_on_their_way(members: Members) -> None:
    """Nobody follows a pull of what the image was before it was fetched again."""
    body = some(MIB)
    image = members.image(body)
    other = members.serve(image, Resource(body, stall_after=MIB // 2))
    before = members.read(image)
    wait_until(lambda: len(before.body) == MIB // 2)
    now = dataclasses.replace(image, sha256="0" * 64)
    with pytest.raises(Unavailable, match="other bytes"):
        members.read(now).whole()
    with pytest.raises(Unavailable, match="other bytes"):
        members.one.pulls.copy(now)
    members.resources[other].resume()
    assert before.whole() == body


def test_old_bytes_on_their_way(members: Members) -> None:
    """They are not waited for: that pull ends, for those who follow as well."""
    body = some(MIB)
    image = members.image(body)
    members.serve(image, Resource(body, stall_after=MIB // 2))
    before = members.read(image)
    wait_until(lambda: len(before.body) == MIB // 2)
    now = dataclasses.replace(image, sha256="0" * 64, revision=image.revision + 1)
    with pytest.raises(Unavailable, match="other bytes"):
        members.read(now).whole()
    with pytest.raises(Conflict):
        before.whole()
    check_not_kept(members, image.id)


def test_the_service_stops(members: Members) -> None:
    """Pulls end, and leave nothing."""
    image = members.image(some(MIB))
    members.serve(image, Resource(some(MIB), stall_after=MIB // 2))
    reader = members.read(image)
    wait_until(lambda: len(reader.body) == MIB // 2)
    members.one.pulls.close()
    with pytest.raises(Stopping):
        reader.whole()
    check_not_kept(members, image.id)


def test_a_deletion_that_was_missed(members: Members) -> None:
    """What has no record is not brought here any longer than until somebody looks."""
    image = members.image(some(MIB))
    members.serve(image, Resource(some(MIB), stall_after=MIB // 2))
    reader = members.read(image)
    wait_until(lambda: bool(reader.body))
    members.one.pulls.reconcile()
    assert members.one.pulls.running == 1
    members.one.base.delete(image.id)
    members.one.pulls.reconcile()
    with pytest.raises(Conflict):
        reader.whole()
    check_not_kept(members, image.id)


def test_fetched_again_here(members: Members) -> None:
    """What failed is fetched anew, though what it was is still on its way here."""
    members.one.start()
    body = some(MIB)
    image = members.image(body, source=members.source.serve("/image", b"new"))
    members.serve(image, Resource(body, stall_after=MIB // 2))
    reader = members.read(image)
    wait_until(lambda: bool(reader.body))
    members.records.update(image.failed("it was lost"))
    assert members.one.service.fetch(image.source, ImageType.KVM, "").id == image.id
    with pytest.raises(Conflict):
        reader.whole()
    wait_until(lambda: members.records.get(image.id).status is Status.COMPLETE)
    assert content(members.one.disk, image.id) == b"new"


def test_what_is_not_complete_any_more(members: Members) -> None:
    """It ends with the news; what happens to others does not concern it."""
    image, other = members.image(some(MIB)), members.image(b"other")
    members.serve(image, Resource(some(MIB), stall_after=MIB // 2))
    reader = members.read(image)
    wait_until(lambda: bool(reader.body))
    members.one.mirror.remove(other.id)
    members.one.pulls.changed(other.id)
    members.one.pulls.changed(image.id)
    assert members.one.pulls.running == 1
    members.one.mirror.remove(image.id)
    members.one.pulls.changed(image.id)
    with pytest.raises(Conflict):
        reader.whole()
    check_not_kept(members, image.id)
