"""All pulls of this member: one for each image that somebody wants and that is not here."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

import structlog

from imgsvc.cluster.follower import Follower
from imgsvc.cluster.line import TICK
from imgsvc.cluster.parts import Parts
from imgsvc.cluster.pull import Pull
from imgsvc.cluster.relay import Relay
from imgsvc.cluster.supply import Supply
from imgsvc.errors import Conflict, Elsewhere, ImgsvcError, NotFound, Stopping, Unavailable
from imgsvc.images.store import ImageReader, ImageStore, is_stored
from imgsvc.metadata.image import Image
from imgsvc.metadata.store import MetadataStore
from imgsvc.room import Room
from imgsvc.settlements import Settlements, note_copy
from imgsvc.throttle import Throttle
from imgsvc.transfers import Transfers

# Images that are pulled at once because clients want them; the next waits for one of them to end, and its clients too.
_FOR_CLIENTS = 32
# Images that are copied at once without a client.
_IN_BACKGROUND = 4
# Parts of images that are on their way through at once.
_RELAYING = 16
# Clients whose images pass through at once; the next is told to come back. Each has a piece in memory.
_RELAYS = 512
# Seconds after a pull that kept nothing in which no other is begun for a client: there will be no more room.
_KEPT_NOTHING = 1.0
# Seconds that somebody waits for a pull to end that was told to.
_PATIENCE = 5.0
# Seconds between two looks at whether the service stops.
_LOOK = 0.25

log = structlog.get_logger()


class Pulls:
    """Every method may be called from any thread."""

    def __init__(
        self,
        images: ImageStore,
        records: MetadataStore,
        transfers: Transfers,
        room: Room,
        settlements: Settlements,
        *,
        supply: Supply,
        hashers: Executor,
        doubt: Callable[[str], None],
    ) -> None:
        """`doubt` has bytes that are here, and not on record, held against their digest; it never blocks."""
        self._images = images
        self._records = records
        self._transfers = transfers
        self._room = room
        self._settlements = settlements
        self._supply = supply
        self._hashers = hashers
        self._doubt = doubt
        self._lock = threading.Lock()
        self._running: dict[str, Pull] = {}
        # Digests by image id, of what has come while nobody knows whether it is on record.
        self._unnoted: dict[str, str] = {}
        self._relays: set[Relay] = set()
        # By image id, the last pull of it that kept nothing, and when it ended.
        self._kept_nothing: dict[str, tuple[Pull, float]] = {}
        self._closing = threading.Event()
        self._no_copies = threading.Event()
        self._background = threading.Semaphore(_IN_BACKGROUND)
        self._threads = ThreadPoolExecutor(_FOR_CLIENTS, thread_name_prefix="pull")
        self._relaying = ThreadPoolExecutor(_RELAYING, thread_name_prefix="relay")
        self._parts = Parts(supply, self._relaying)

    @property
    def running(self) -> int:
        return len(self._running)

    def is_running(self, image_id: str) -> bool:
        """Whether the image is on its way here, or has come and is about to be noted."""
        return image_id in self._running

    def has_brought(self, image: Image) -> bool:
        """Whether the bytes of this very image are here for certain, also when its record did not say so when it was
        read. Never blocks."""
        return self._unnoted.get(image.id) == image.sha256 or self._supply.has_noted(image)

    def open(self, image: Image) -> ImageReader:
        """A reader of a complete image that is not here: its bytes are pulled from the first one that is wanted on,
        and kept. Never blocks. Raises Elsewhere when no live member holds them."""
        if not self._supply.holders(image):
            raise Elsewhere("no live member holds the image")

        def relay(offset: int, digest: object | None) -> Relay:
            made = Relay(
                image, self._supply, self._parts, self._relaying, self._relays.discard, offset=offset, before=digest
            )
            if len(self._relays) >= _RELAYS and not offset:
                made.refuse(Unavailable("too many images pass through this member, which has no room for them"))
            else:
                self._relays.add(made)
            return made

        # Without a digest nobody could tell whether a copy is right.
        if not image.sha256 or self._will_not_keep(image):
            return relay(0, None)
        return Follower(image, lambda: self._join(image), relay)

    def copy(self, image: Image, throttle: Throttle | None = None) -> None:
        """Returns when this member holds the complete image, and its record says so. Raises Unavailable when it cannot
        be had now, NoSpace, NotFound or Conflict when it is not wanted any more, Stopping. Without a throttle,
        a copy that is already being made with one goes as fast as it can from then on."""
        if not image.sha256:
            raise Unavailable("the image has no digest yet, by which a copy could be judged")
        if self._is_here(image):
            return
        while not self._background.acquire(timeout=_LOOK):
            self._require_open()
        try:
            with self._lock:
                self._require_open()
                pull = self._running.get(image.id)
                mine = pull is None
                if pull is None:
                    pull = self._running[image.id] = self._made(image, throttle, background=True)
                elif pull.image.sha256 != image.sha256:
                    raise self._other_bytes(pull, image)
            if mine:
                self._run(pull)
            elif throttle is None:
                pull.hurry()
            self._wait_for(pull, image)
        finally:
            self._background.release()

    def stop_copies(self) -> None:
        """Ends those that nobody waits for, and lets no other begin."""
        self._no_copies.set()
        self._cancel(Stopping("the service is stopping"), lambda pull: pull.is_idle)

    def reconcile(self) -> None:
        """Ends the pulls of images whose record is gone: their deletion may have been missed."""
        self._cancel(Conflict("the image was deleted"), lambda pull: self._is_gone(pull.image))

    def changed(self, image_id: str) -> None:
        """Of an image whose record may have changed: one that is not complete any more is not brought here. Returns at
        once."""
        if image_id in self._running and not self._supply.is_complete(image_id):
            self.cancel(image_id, Conflict("the image was deleted, or is damaged where it came from"))

    def cancel(self, image_id: str, reason: ImgsvcError) -> None:
        """Ends the pull of the image, if there is one, and for its clients at once."""
        with self._lock:
            pull = self._running.get(image_id)
        if pull is not None:
            pull.cancel(reason)

    def end(self, image_id: str, reason: ImgsvcError) -> None:
        """As `cancel`, and returns when another writer of the image may begin, or is likely to be able to soon."""
        self.cancel(image_id, reason)
        latest = time.monotonic() + _PATIENCE
        while image_id in self._running and time.monotonic() < latest:
            time.sleep(TICK)

    def close(self) -> None:
        """Ends all pulls, and returns when they have."""
        self._closing.set()
        self._no_copies.set()
        self._cancel(Stopping("the service is stopping"), lambda _: True)
        self._threads.shutdown(cancel_futures=True)
        self._parts.close()
        self._relaying.shutdown(cancel_futures=True)
        self._supply.close()

    def _wait_for(self, pull: Pull, image: Image) -> None:
        try:
            while not pull.result(_LOOK):
                self._require_open()
        except Conflict:
            # Another pull may have ended right before this one began.
            if self._is_here(self._records.get(image.id)):
                return
            if not is_stored(self._images, image.id):
                raise
            self._doubt(image.id)
            raise Unavailable("there are bytes of the image here, which are held against its digest first") from None

    def _join(self, image: Image) -> Pull:
        with self._lock:
            # Who came while that one ran, and asks for the first byte only now, goes on as its followers did.
            pull = self._running.get(image.id) or self._has_kept_nothing(image)
            if pull is not None and pull.image.sha256 != image.sha256:
                trouble = self._other_bytes(pull, image)
                pull = self._made(image)
                pull.cancel(trouble)
            elif pull is None:
                pull = self._running[image.id] = self._made(image)
                try:
                    self._threads.submit(self._run, pull)
                except RuntimeError:
                    pull.cancel(Stopping("the service is stopping"))
                    del self._running[image.id]
            return pull

    def _other_bytes(self, pull: Pull, image: Image) -> Unavailable:
        """Why nobody can follow a pull of what was another image before, or is by now. Of the two the older one ends."""
        if pull.image.revision < image.revision:
            pull.cancel(Conflict("the image has other bytes by now"))
        return Unavailable("other bytes of the image are still on their way here")

    def _made(self, image: Image, throttle: Throttle | None = None, *, background: bool = False) -> Pull:
        return Pull(
            image,
            self._images,
            self._supply,
            room=self._room,
            admit=self._admit,
            hashers=self._hashers,
            stored=self._is_stored,
            held=self._held,
            background=background,
            throttle=throttle,
        )

    def _run(self, pull: Pull) -> None:
        try:
            pull.run()
        finally:
            now = time.monotonic()
            with self._lock:
                self._running.pop(pull.image.id, None)
                if pull.course.passed_on is not None:
                    self._kept_nothing[pull.image.id] = (pull, now)
                for image_id in [each for each, (_, then) in self._kept_nothing.items() if now - then > _KEPT_NOTHING]:
                    del self._kept_nothing[image_id]

    def _will_not_keep(self, image: Image) -> bool:
        return self._has_kept_nothing(image) is not None and not self.is_running(image.id)

    def _has_kept_nothing(self, image: Image) -> Pull | None:
        """A pull of it that has just ended: another one would be no better."""
        pull, ended = self._kept_nothing.get(image.id, (None, 0.0))
        if pull is None or pull.image.sha256 != image.sha256 or time.monotonic() - ended > _KEPT_NOTHING:
            return None
        return pull

    def _admit(self) -> None:
        with self._lock:
            pulled = sum(pull.missing for pull in self._running.values())
        self._room.check_space(pulled + self._transfers.announced)

    def _held(self, image: Image) -> None:
        self._unnoted[image.id] = image.sha256
        self._settlements.settle(image.id, lambda: self._note(image))

    def _note(self, image: Image) -> None:
        """That the image is here now; unless it is not that image any more, and then its bytes go."""
        try:
            note_copy(self._records, self._images, image)
        except (NotFound, Conflict):
            self._unnoted.pop(image.id, None)
            self._images.delete(image.id)
            raise
        self._unnoted.pop(image.id, None)

    def _is_stored(self, image: Image) -> bool:
        """With its very bytes, on record or not. What this disk does not give may come from another member."""
        try:
            if not self.has_brought(image):
                return False
            with contextlib.closing(self._images.open(image.id)) as reader:
                return reader.size == image.size
        except (NotFound, Unavailable):
            return False

    def _is_here(self, image: Image) -> bool:
        """On record, and with its bytes."""
        try:
            return self._supply.is_mine(image) and self._images.size(image.id) == image.size
        except NotFound:
            return False

    def _is_gone(self, image: Image) -> bool:
        try:
            self._records.get(image.id)
        except NotFound:
            return True
        return False

    def _cancel(self, reason: ImgsvcError, which: Callable[[Pull], bool]) -> None:
        with self._lock:
            running = list(self._running.values())
        for pull in running:
            if which(pull):
                pull.cancel(reason)

    def _require_open(self) -> None:
        if self._no_copies.is_set():
            raise Stopping("the service is stopping")
