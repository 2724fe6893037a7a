"""One image that two hosts transfer: what one has missed does not undo what the other does."""

from __future__ import annotations

import pytest

from imgsvc.errors import Conflict, FetchFailed, ImgsvcError
from imgsvc.metadata.image import Status
from tests.flaky import UNKNOWN
from tests.images.helpers import content
from tests.metadata.etcd_store import OwnedEtcdStore
from tests.rooms import Rooms, feed_and_finish
from tests.two_members.helpers import begun, end_ownership, left_by_a_fetch, sweep


def failed_unheard(host: Rooms) -> str:
    """A fetch of the host fails; that is stored, and the host does not hear of it."""
    transfer = begun(host)
    host.faults.next("update", UNKNOWN)
    transfer.abort(FetchFailed("gone"))
    host.faults.heal()
    return transfer.image.id


def test_a_late_settlement_does_not_end_another_members_fetch(hosts: list[Rooms]) -> None:
    """The image that failed at one is fetched again at two; then one is back, and settles what it believes open."""
    one, two = hosts
    image_id = failed_unheard(one)
    again = begun(two)
    assert again.image.id == image_id
    again.start(5)
    one.settlements.retry()
    assert two.base.get(image_id).status is Status.DOWNLOADING
    assert feed_and_finish(again).status is Status.COMPLETE
    assert not one.settlements.waiting(image_id)


def lose_owner(host: Rooms, image_id: str) -> None:
    """As when the lease of the member that is transferring is over."""
    assert isinstance(host.base, OwnedEtcdStore)
    assert host.base.etcd.delete(host.base._layout.owner(image_id))


def test_bytes_of_an_ended_transfer_do_not_stand_for_the_image(hosts: list[Rooms]) -> None:
    """Somebody ends the record while a transfer commits, and another member fetches other content of the same size:
    nobody is served the first bytes under the digest of the second."""
    one, two = hosts
    first = begun(one)
    first.start(3)
    first.feed(b"abc")
    first.commit()
    stored = two.base.get(first.image.id)
    lose_owner(two, stored.id)
    two.base.update(stored.failed("by hand"))
    with pytest.raises(Conflict):
        first.complete()
    second = begun(two)
    second.start(3)
    second.feed(b"xyz")
    second.finish()
    assert set(one.disk.ids()) == set()
    assert content(two.disk, second.image.id) == b"xyz"
    with pytest.raises(ImgsvcError):
        one.service.open(second.image.id)


def test_bytes_of_an_interrupted_fetch_go_when_another_member_fetches(hosts: list[Rooms]) -> None:
    """The successor may be given other bytes by the source; what the first has left is gone with its next start."""
    one, two = hosts
    image = left_by_a_fetch(one)
    end_ownership(one)
    two.base.update(two.base.get(image.id).requeued())
    one.maintenance.start_sweep()
    assert set(one.disk.ids()) == set()


@pytest.mark.parametrize("marker", ["these records", "others"])
def test_bytes_of_a_transfer_that_another_member_has_ended(hosts: list[Rooms], marker: str) -> None:
    """They go with the next start, in a directory that belongs to these records."""
    one, two = hosts
    image = left_by_a_fetch(one)
    end_ownership(one)
    two.base.update(two.base.get(image.id).failed("no member has room for it"))
    if marker == "others":
        one.disk.mark("others")
    sweep(one)
    assert set(one.disk.ids()) == (set() if marker == "these records" else {image.id})
