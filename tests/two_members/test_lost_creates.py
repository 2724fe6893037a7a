"""An image that was created although nobody was told, and what others do to it before its host asks again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from imgsvc.errors import Unavailable
from imgsvc.etcd_layout import end_of
from imgsvc.metadata.image import ImageType, Status
from tests.lossy_proxy import LossyProxy
from tests.metadata.etcd_store import OwnedEtcdStore
from tests.rooms import Rooms, wait_until
from tests.two_members.helpers import SOURCE


def fetch(host: Rooms) -> object:
    return host.service.fetch(SOURCE, ImageType.KVM, "")


def upload(host: Rooms) -> object:
    return host.service.upload(ImageType.KVM, "", 5)


def during(host: Rooms, proxy: LossyProxy, begin: Callable[[Rooms], object], change: Callable[[], object]) -> None:
    """The host begins something, and does not hear that it has; there is a change before it asks again."""
    proxy.lose_answers(b'"expected_size"')
    with ThreadPoolExecutor(1) as pool:
        beginning = pool.submit(begin, host)
        change()
        with pytest.raises(Unavailable, match="may have been created"):
            beginning.result()
    host.settlements.retry()
    assert host.claims() == set()
    assert host.take_turns() == []


@pytest.mark.parametrize("begin", [fetch, upload])
def test_deleted(hosts: list[Rooms], unlucky: Rooms, proxy: LossyProxy, begin: Callable[[Rooms], object]) -> None:
    """It stays away, its id is not used again, and nothing of it is left."""
    other = hosts[0]

    def delete() -> None:
        wait_until(lambda: bool(other.listed()))
        other.service.delete(*other.listed())

    during(unlucky, proxy, begin, delete)
    assert keys_left(other) == []


def test_ended(hosts: list[Rooms], unlucky: Rooms, proxy: LossyProxy) -> None:
    """One that others could take, as its host had lost its lease, stays as they left it: they may have told of it."""
    other = hosts[0]

    def end() -> None:
        wait_until(lambda: bool(other.listed()))
        (image,) = other.listed().values()
        assert isinstance(other.base, OwnedEtcdStore)
        other.base.etcd.delete(other.base._layout.owner(image.id))
        other.base.update(image.failed("by hand"))

    during(unlucky, proxy, fetch, end)
    (image,) = other.listed().values()
    assert (image.status, image.error) == (Status.ERROR, "by hand")


def keys_left(host: Rooms) -> list[str]:
    """Of images and their sources."""
    assert isinstance(host.base, OwnedEtcdStore)
    starts = (host.base._layout.images, host.base._layout.sources)
    return [item.key for start in starts for item in host.base.etcd.range(start, end_of(start)).items]
