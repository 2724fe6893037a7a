"""Copies that are dropped for want of space: which, when, and above all which not."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

import pytest

from imgsvc.cluster.cache import Cache
from imgsvc.errors import Conflict, NoSpace, NotFound, Unavailable
from imgsvc.images.memory import MemoryImageStore
from imgsvc.metadata.image import Image, ImageType, new_id
from imgsvc.metadata.store import MetadataStore
from imgsvc.room import Room
from tests.cluster.hosts import Hosts
from tests.etcd_cluster import EtcdCluster
from tests.flaky import LOST, UNKNOWN, Fault, Faults, flaky_images, flaky_records
from tests.images.helpers import content, put
from tests.metadata.etcd_store import OwnedEtcdStore, open_store
from tests.rooms import wait_until

# Of host-0; an image of SIZE is a tenth of it.
CAPACITY = 100_000
SIZE = 10_000
# For what must not happen, in looks at the disk.
INTERVAL = 0.02
A_WHILE = 10 * INTERVAL

NewCache = Callable[..., Cache]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Four, of which host-0 has little space."""
    with Hosts(tmp_path, 4, CAPACITY) as hosts:
        yield hosts


@pytest.fixture
def new_cache(hosts: Hosts) -> Iterator[NewCache]:
    """A cache of a host, which runs until the test ends."""
    with ExitStack() as running:

        def new(
            wanted: int = 1,
            high_water: float = 0.5,
            host: str = "host-0",
            *,
            watch: bool = True,
            faults: Faults | None = None,
        ) -> Cache:
            of, faults = hosts[host], faults or Faults()
            cache = Cache(
                of.mirror,
                flaky_images(of.images, faults),
                flaky_records(cast("MetadataStore", of), faults),
                me=host,
                wanted=wanted,
                high_water=high_water,
                may_work=lambda: of.trusted,
                interval=INTERVAL,
            )
            if watch:
                cache.start()
            return running.enter_context(closing(cache))

        yield new


def hold(hosts: Hosts, *members: str, count: int = 1) -> list[str]:
    """Images that all these hold."""
    images = [hosts.upload(members[0], SIZE) for _ in range(count)]
    for image_id in images:
        for other in members[1:]:
            put(hosts[other].images, image_id, content(hosts[members[0]].images, image_id))
            hosts.hold(image_id, other)
    return images


def held(hosts: Hosts, images: list[str], member: str = "host-0") -> list[str]:
    """Those that it still holds once all is quiet, on record and on its disk alike."""
    time.sleep(A_WHILE)
    on_record = [image_id for image_id in images if member in hosts.known(image_id).replicas]
    assert on_record == [image_id for image_id in images if image_id in hosts[member].images.ids()]
    return on_record


def used(hosts: Hosts) -> int:
    space = hosts["host-0"].images.space()
    return space.total - space.free


def test_above_the_mark(hosts: Hosts, new_cache: NewCache) -> None:
    """The least recently served go, those first that were never served here, until it is somewhat below the mark."""
    images = hold(hosts, "host-0", "host-1", count=8)
    cache = new_cache(high_water=0.3, watch=False)
    for image_id in (*images[4:], images[4]):
        cache.served(image_id)
    cache.start()
    wait_until(lambda: used(hosts) <= 2 * SIZE)
    assert held(hosts, images) == [images[4], images[7]]
    assert held(hosts, images, "host-1") == images


def test_below_the_mark(hosts: Hosts, new_cache: NewCache) -> None:
    """Nothing goes."""
    images = hold(hosts, "host-0", "host-1", count=5)
    new_cache()
    assert held(hosts, images) == images


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_what_is_needed_stays(hosts: Hosts, new_cache: NewCache, wanted: int) -> None:
    """However full the disk is: no copy goes of which there are no more than wanted, the only one least of all."""
    needed = hold(hosts, *(f"host-{n}" for n in range(wanted)), count=5)
    spare = hold(hosts, *(f"host-{n}" for n in range(wanted + 1)), count=5)
    new_cache(wanted, 0.1)
    wait_until(lambda: used(hosts) == 5 * SIZE)
    assert (held(hosts, needed), held(hosts, spare)) == (needed, [])


def test_the_dead_do_not_count(hosts: Hosts, new_cache: NewCache) -> None:
    """What a member holds that is not live, be it for a moment, is not there."""
    images = hold(hosts, "host-0", "host-1", "host-2", count=6)
    hosts.leave("host-1")
    new_cache(2, 0.1)
    assert held(hosts, images) == images
    hosts.join("host-1")
    new_cache(2, 0.1)
    wait_until(lambda: used(hosts) == 0)


@pytest.mark.parametrize("reason", ["stale", "no lease"])
def test_a_member_that_cannot_be_sure(hosts: Hosts, new_cache: NewCache, reason: str) -> None:
    """With records that are old, or without a lease, a member drops nothing, not even for who needs room; later it
    does."""
    images = hold(hosts, "host-0", "host-1", count=6)
    host = hosts["host-0"]
    if reason == "stale":
        host.mirror.lost()
    else:
        host.trusted = False
    cache = new_cache()
    cache.make_room(lambda: SIZE)
    assert held(hosts, images) == images
    host.mirror.heard()
    host.trusted = True
    wait_until(lambda: used(hosts) < 5 * SIZE)


@pytest.mark.parametrize("changed", [False, True])
def test_a_drop_whose_answer_is_lost(hosts: Hosts, new_cache: NewCache, *, changed: bool) -> None:
    """The bytes stay and are noted again; but not as those of another image, which it may have become meanwhile."""
    (image_id,) = hold(hosts, "host-0", "host-1")
    faults = Faults()
    faults.next("drop_copy", UNKNOWN)
    cache = new_cache(watch=False, faults=faults)
    with pytest.raises(Unavailable):
        cache._drop_one(image_id)
    assert hosts.holders(image_id) == {"host-1"}
    if changed:
        known = hosts.known(image_id)
        other = dataclasses.replace(known.image, sha256="11" * 32)
        hosts.everywhere(lambda mirror: mirror.put(dataclasses.replace(known, document=other.to_json())))
    cache._note_again()
    assert hosts.holders(image_id) == ({"host-1"} if changed else {"host-0", "host-1"})
    assert image_id in hosts["host-0"].images.ids()


def drop_all_at_once(caches: Sequence[Cache], size: int) -> None:
    """All of them, as much as they may."""
    start = threading.Barrier(len(caches))

    def drop_all(cache: Cache) -> None:
        missing = itertools.chain([size], itertools.repeat(0))
        start.wait()
        cache.make_room(lambda: next(missing))

    threads = [threading.Thread(target=drop_all, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_that_rely_on_each_other(etcd: EtcdCluster, etcd_prefix: str) -> None:
    """Both are short of space, and each knows that the other has a copy, as etcd says: one of them keeps it."""
    with ExitStack() as opened:
        stores = [opened.enter_context(closing(open_store(etcd.endpoints, etcd_prefix))) for _ in range(2)]
        disks = [MemoryImageStore() for _ in stores]
        images = [new_id() for _ in range(10)]
        for image_id in images:
            stores[0].update(stores[0].create(Image(image_id, ImageType.KVM)).completed(SIZE, "00" * 32))
            stores[1].hold(stores[1].get(image_id))
            for disk in disks:
                disk.mark("these")
                put(disk, image_id, bytes(SIZE))
        wait_until(lambda: all(_knows_all(store, images) for store in stores))
        caches = [
            Cache(store.mirror, disk, store, me=store.member.id, wanted=1, high_water=1.0, may_work=lambda: True)
            for store, disk in zip(stores, disks, strict=True)
        ]
        drop_all_at_once(caches, len(images) * SIZE)
        assert sorted([*disks[0].ids(), *disks[1].ids()]) == sorted(images)
        for store, disk in zip(stores, disks, strict=True):
            wait_until(lambda store=store, disk=disk: _held_by(store) == sorted(disk.ids()))  # type: ignore[misc]


def _knows_all(store: OwnedEtcdStore, images: list[str]) -> bool:
    known = [each for page in store.mirror.pages() for each in page]
    return len(store.mirror.members()) == 2 and [len(each.replicas) for each in known] == [2] * len(images)


def _held_by(store: OwnedEtcdStore) -> list[str]:
    return [each.id for page in store.mirror.pages() for each in page if store.member.id in each.replicas]


def test_room_for_a_transfer(hosts: Hosts, new_cache: NewCache) -> None:
    """What does not fit otherwise has copies dropped for it, no more than it takes and a little."""
    images = hold(hosts, "host-0", "host-1", count=9)
    room = Room(hosts["host-0"].images, 0, lambda _total: 5_000, new_cache(high_water=1.0).make_room)
    room.check_space(5_000)
    assert held(hosts, images) == images
    room.check_space(20_000)
    assert len(held(hosts, images)) == 7


def test_room_that_cannot_be_made(hosts: Hosts, new_cache: NewCache) -> None:
    """For what would not fit either way, nothing is dropped: a client that announces too much costs no copies."""
    images = hold(hosts, "host-0", "host-1", count=4) + hold(hosts, "host-0", "host-3", count=3)
    hosts.leave("host-3")
    room = Room(hosts["host-0"].images, 0, lambda _total: 0, new_cache(high_water=1.0).make_room)
    with pytest.raises(NoSpace):
        room.check_space(8 * SIZE)
    assert held(hosts, images) == images


def test_a_member_that_leaves_meanwhile(hosts: Hosts, new_cache: NewCache) -> None:
    """Who is live is looked at again for each copy."""
    (image_id,) = hold(hosts, "host-0", "host-1", "host-2")
    cache = new_cache(2, watch=False)
    (spare,) = cache._spare()
    hosts.leave("host-1")
    assert cache._drop_one(spare.id) == 0
    assert held(hosts, [image_id]) == [image_id]
    hosts.join("host-1")
    assert cache._drop_one(spare.id) == SIZE


def test_room_that_comes_late(hosts: Hosts, new_cache: NewCache) -> None:
    """Some file systems free the space of a file a while after it was removed: that is waited for, and nothing more is
    dropped for it. Nor is anything when somebody else has made room."""
    images = hold(hosts, "host-0", "host-1", count=4)
    cache = new_cache(high_water=1.0, watch=False)
    cache.make_room(lambda: 0)
    late = time.monotonic() + 0.3
    cache.make_room(lambda: SIZE // 2 if time.monotonic() < late else 0)
    assert 0 <= time.monotonic() - late < 1
    assert len(held(hosts, images)) == 3


def test_many_that_need_room(hosts: Hosts, new_cache: NewCache) -> None:
    """All at once: it is made once for what they need, and not once for each."""
    images = hold(hosts, "host-0", "host-1", count=10)
    room = Room(hosts["host-0"].images, 0, lambda _total: 0, new_cache(high_water=1.0).make_room)
    threads = [threading.Thread(target=room.check_space, args=(SIZE,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held(hosts, images)) == 8


def test_one_that_is_being_read(hosts: Hosts, new_cache: NewCache) -> None:
    """It goes, and who reads it gets it to the last byte."""
    (image_id,) = hold(hosts, "host-0", "host-1")
    expected = content(hosts["host-1"].images, image_id)
    with closing(hosts["host-0"].images.open(image_id)) as reader:
        new_cache(high_water=0.01)
        wait_until(lambda: used(hosts) == 0)
        assert reader.read(0, SIZE) == expected
    assert held(hosts, [image_id]) == []


def test_a_deletion_meanwhile(hosts: Hosts, new_cache: NewCache) -> None:
    """What is deleted at the moment when it would be dropped harms nothing."""
    images = hold(hosts, "host-0", "host-1", count=8)
    new_cache(high_water=0.01)
    for image_id in images:
        hosts.delete(image_id)
        hosts["host-0"].images.delete(image_id)
    kept = hold(hosts, "host-0", "host-1")
    wait_until(lambda: used(hosts) == 0, 15)  # a look that finds it half made is the last for five seconds
    with pytest.raises(NotFound):
        hosts["host-0"].images.open(kept[0])


def test_a_copy_that_is_wanted_again_just_then(hosts: Hosts, new_cache: NewCache) -> None:
    """Who notes it again between the note and the bytes that go is not left on record without them."""
    (image_id,) = hold(hosts, "host-0", "host-1")
    host = hosts["host-0"]
    dropped = host.drop_copy

    def drop_and_hold(image_id: str, keep: list[str]) -> bool:
        done = dropped(image_id, keep)
        hosts.hold(image_id, "host-0")
        return done

    host.drop_copy = drop_and_hold  # type: ignore[method-assign, assignment]
    new_cache(high_water=0.01)
    wait_until(lambda: used(hosts) == 0)
    assert held(hosts, [image_id]) == []


def test_a_copy_that_comes_back_just_then(hosts: Hosts, new_cache: NewCache) -> None:
    """What a client has brought here again right after the bytes went stays on record."""
    (image_id,) = hold(hosts, "host-0", "host-1")
    images = hosts["host-0"].images
    body, delete = content(images, image_id), images.delete

    def delete_and_pull(image_id: str) -> None:
        delete(image_id)
        put(images, image_id, body)
        hosts.hold(image_id, "host-0")

    images.delete = delete_and_pull  # type: ignore[method-assign]
    cache = new_cache(watch=False)
    assert cache._drop(1) == SIZE
    assert held(hosts, [image_id]) == [image_id]


@pytest.mark.parametrize("call", ["drop_copy", "delete"])
@pytest.mark.parametrize("fault", [LOST, UNKNOWN], ids=["lost", "unknown"])
def test_a_call_that_fails(hosts: Hosts, new_cache: NewCache, call: str, fault: Fault) -> None:
    """Whatever it has done, record and disk agree soon, and all that may go goes."""
    images = hold(hosts, "host-0", "host-1", count=6)
    faults = Faults()
    faults.next(call, fault)
    new_cache(high_water=0.01, faults=faults)
    wait_until(lambda: used(hosts) == 0)
    assert held(hosts, images) == []
    assert call in faults.calls


def test_one_that_is_not_complete_any_more(hosts: Hosts, new_cache: NewCache) -> None:
    """It cannot be noted again after a call that failed, and does not keep the others from going."""
    hold(hosts, "host-0", "host-1", count=6)
    faults = Faults()
    drops = itertools.count()

    def plan(_number: int, name: str) -> Fault | None:
        if name == "drop_copy" and next(drops) == 0:
            return LOST
        return Fault(Conflict("it is not complete any more")) if name == "hold" else None

    faults.plan = plan
    new_cache(high_water=0.01, faults=faults)
    wait_until(lambda: used(hosts) == 0)


def test_new_image_is_kept_while_it_is_the_only_copy(hosts: Hosts, new_cache: NewCache) -> None:
    """An upload that just ended here is on nobody else's disk."""
    new_cache(high_water=0.01)
    image_id = hosts.upload("host-0", SIZE, new_id())
    assert held(hosts, [image_id]) == [image_id]
