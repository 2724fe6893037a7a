"""What happens to an image at one of two hosts, and how they find out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from imgsvc.metadata.image import Image, ImageType
from imgsvc.scrub import Scrub
from imgsvc.transfer import Transfer
from imgsvc.whole import Pace
from tests.harness import wait_for
from tests.images.helpers import put
from tests.left_behind import BODY, complete
from tests.metadata.etcd_store import OwnedEtcdStore
from tests.rooms import Rooms

SOURCE = "http://source.example/image"
ROTTEN = BODY.upper()


def begun(host: Rooms) -> Transfer:
    return host.transfers.fetch(host.service.fetch(SOURCE, ImageType.KVM, ""))


def end_ownership(host: Rooms) -> None:
    """As if its lease had run out."""
    store = host.base
    assert isinstance(store, OwnedEtcdStore)
    store.membership.close()


def left_by_a_fetch(host: Rooms) -> Image:
    """The image of a fetch that a host finished, and died before its record said so."""
    transfer = begun(host)
    transfer.start(3)
    transfer.feed(b"old")
    transfer.commit()
    return transfer.image


def held_by_both(one: Rooms, two: Rooms, body: bytes) -> Image:
    """At two its bytes are these."""
    image = complete(one)
    put(two.disk, image.id, body)
    two.base.hold(image)
    return one.base.get(image.id)


def pulled(host: Rooms, image: Image) -> None:
    """What the end of a pull does."""
    put(host.disk, image.id, BODY)
    host.base.hold(image)


def read_all(host: Rooms) -> None:
    host.digests.start()
    wait_for(lambda: not host.digests._waiting, 5, "all is read")
    host.digests.close()


def before_writing(host: Rooms, image_id: str, happens: Callable[[], object]) -> None:
    """Right before the host's next write to keys of the image, something else happens."""
    assert isinstance(host.base, OwnedEtcdStore)
    etcd = host.base.etcd
    writes: dict[str, Callable[..., Any]] = {"transact": etcd.transact, "delete": etcd.delete}

    def late(name: str) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            if image_id in str(args):
                vars(etcd).update(writes)
                happens()
            return writes[name](*args, **kwargs)

        return write

    vars(etcd).update({name: late(name) for name in writes})


def member_of(host: Rooms) -> str:
    assert isinstance(host.base, OwnedEtcdStore)
    return host.base.member.id


def scrub(host: Rooms) -> None:
    list(Scrub(host.images, host.records, Pace(0), threading.Event()).run())


def sweep(host: Rooms) -> None:
    host.maintenance.start_sweep()
