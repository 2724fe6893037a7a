"""Copies beyond the wanted number are a cache: kept while there is space, and dropped when it is short."""

from __future__ import annotations

import contextlib
import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import structlog

from imgsvc.cluster.rendezvous import ranked
from imgsvc.errors import Conflict, ImgsvcError, NotFound
from imgsvc.images.store import ImageStore, is_stored
from imgsvc.metadata.image import Image, Status
from imgsvc.metadata.mirror import Known, Mirror

# Seconds between two looks at the disk.
_LOOK_INTERVAL = 10.0
# The part of the disk that is freed at a time, so that it is not done for every image that comes in.
_STEP = 0.02
# Images of which it is remembered when they were served last; of the others, it was before that of all these.
_MOST_SERVED = 100_000
# Of the images that may go, those that go before all are looked at anew.
_MOST_FOUND = 1_000
# Seconds after a look that found none, before the next; and how much longer than that look they are at least.
_BARREN = 5.0
_BARREN_SHARE = 10
# Seconds that who waits for room gives the file system, which may free it some time after a file is removed.
_FREED_WITHIN = 3.0
_FREED_LOOK = 0.05

log = structlog.get_logger()


class Droppers(Protocol):
    """The part of a `MetadataStore` that this needs."""

    def drop_copy(self, image_id: str, keep: Collection[str]) -> bool: ...

    def hold(self, image: Image) -> None: ...

    def release(self, image_id: str) -> None: ...


class Cache:
    """One thread that looks at the disk. Every other method may be called from any thread.

    A copy goes only while at least as many other members as are wanted, all of them live, are on record as holding the
    image, and one transaction sees to it that these still are: two members that drop theirs at the same time cannot
    each count on the other. A member that died is live for `cluster.leaseTtl` more. Those that were served least
    recently go first. Who is reading one goes on to its end, and its space is free after that.

    If the process dies between the note of a copy and its bytes, these are there without a note: the next start holds
    them against their digest, and notes them again. Where it is not known whether the note has gone, or the bytes do
    not go, it is made again.
    """

    def __init__(
        self,
        mirror: Mirror,
        images: ImageStore,
        records: Droppers,
        *,
        me: str,
        wanted: int,
        high_water: float,
        may_work: Callable[[], bool],
        interval: float = _LOOK_INTERVAL,
    ) -> None:
        """`high_water` is the part of the disk in use above which copies go. `may_work` says whether this member is
        one of the cluster for certain."""
        self._mirror = mirror
        self._images = images
        self._records = records
        self._me = me
        self._wanted = wanted
        self._high_water = high_water
        self._may_work = may_work
        self._interval = interval
        self._served: OrderedDict[str, float] = OrderedDict()
        self._served_lock = threading.Lock()
        # Whoever makes room does it alone.
        self._dropping = threading.Lock()
        self._barren_until = 0.0
        # Images whose bytes are here and whose note may have gone.
        self._unnoted: dict[str, Image] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cache", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def served(self, image_id: str) -> None:
        """Somebody reads the image here. Never blocks for long."""
        with self._served_lock:
            self._served[image_id] = time.monotonic()
            self._served.move_to_end(image_id)
            if len(self._served) > _MOST_SERVED:
                self._served.popitem(last=False)

    def make_room(self, missing: Callable[[], int]) -> None:
        """Drops copies until no bytes are `missing` any more, if it can, and waits a moment until they are free. Never
        raises."""
        try:
            with self._dropping:
                size = missing()
                if size > 0 and self._drop(size + self._step(), at_least=size):
                    latest = time.monotonic() + _FREED_WITHIN
                    while missing() > 0 and time.monotonic() < latest and not self._closing.wait(_FREED_LOOK):
                        pass
        except ImgsvcError as error:
            log.warning("no room made", reason=str(error))

    def _watch(self) -> None:
        while not self._closing.wait(self._interval):
            try:
                with self._dropping:
                    self._note_again()
                    space = self._images.space()
                    excess = space.total - space.free - round(self._high_water * space.total)
                    if excess > 0:
                        self._drop(excess + self._step())
            except ImgsvcError as error:
                log.warning("no room made", reason=str(error))
            except Exception:  # without this thread the disk would fill
                log.exception("no room made")

    def _drop(self, size: int, at_least: int = 0) -> int:
        """Drops copies of `size` bytes in all, or until there are no more that may go; returns how many bytes it were.
        Does nothing when all together are fewer than `at_least`.

        It goes by the sizes: the space may be free only when their readers have left, or somewhat later.
        """
        dropped, before = 0, -1
        while before < dropped < size:
            before = dropped
            spare = self._spare()
            if sum(known.size for known in spare) < at_least - dropped:
                break
            for known in self._least_recently_served(spare):
                if dropped < size and self._is_trusted():
                    dropped += self._drop_one(known.id)
        return dropped

    def _spare(self) -> Sequence[Known]:
        """Copies that may go, as far as this member knows. It takes seconds where there are 1,000,000 images."""
        began = time.monotonic()
        if began < self._barren_until or not self._is_trusted():
            return ()
        live = self._mirror.members().keys()
        spare = [
            known
            for page in self._mirror.pages()
            for known in page
            if len(known.replicas) > self._wanted
            and self._me in known.replicas
            and known.status is Status.COMPLETE
            and len(live & set(known.replicas) - {self._me}) >= self._wanted
        ]
        if not spare:
            took = time.monotonic() - began
            self._barren_until = time.monotonic() + max(_BARREN, _BARREN_SHARE * took)
        return spare

    def _least_recently_served(self, spare: Sequence[Known]) -> Sequence[Known]:
        with self._served_lock:
            served = self._served.copy()
        return heapq.nsmallest(_MOST_FOUND, spare, key=lambda known: served.get(known.id, 0.0))

    def _drop_one(self, image_id: str) -> int:
        """Returns how many bytes it were, 0 when it must stay."""
        try:
            known = self._mirror.get(image_id)
            others = [member for member in self._mirror.members() if member in known.replicas and member != self._me]
            keep = ranked(image_id, others)[: self._wanted]
            if len(keep) < self._wanted or not self._remove(known.image, keep):
                return 0
        except NotFound:
            return 0  # it was deleted
        log.info("copy dropped", image=image_id, bytes=known.size, kept_by=keep)
        return known.size

    def _remove(self, image: Image, keep: Sequence[str]) -> bool:
        """The note first, then the bytes."""
        self._unnoted[image.id] = image
        dropped = self._records.drop_copy(image.id, keep)
        if dropped:
            self._images.delete(image.id)
        self._unnoted.pop(image.id, None)
        if dropped and self._me in self._mirror.get(image.id).replicas and not is_stored(self._images, image.id):
            # Somebody asked for a copy just now, and was told that it is here.
            self._records.release(image.id)
        return dropped

    def _note_again(self) -> None:
        for image in tuple(self._unnoted.values()):
            # As the image was: when it was fetched again since, these bytes may be others.
            with contextlib.suppress(NotFound, Conflict):
                self._images.size(image.id)
                self._records.hold(image)
            self._unnoted.pop(image.id, None)

    def _step(self) -> int:
        return round(_STEP * self._images.space().total)

    def _is_trusted(self) -> bool:
        return self._mirror.stale is None and self._may_work() and not self._closing.is_set()
