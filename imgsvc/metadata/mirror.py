"""What a cluster's records say, in the memory of one member: every image with its surroundings, and who is live.

Filled by whoever follows the store, and by the store with what it writes and reads itself; read by everybody, at any
time, without waiting.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from imgsvc.errors import NotFound
from imgsvc.metadata.image import Image, ImageType, Status

_PAGE = 1_000
# Ids that are remembered as deleted, some 2 MiB of them.
_DELETED = 10_000


@functools.lru_cache(maxsize=10_000)
def _ending(replicas: tuple[str, ...]) -> str:
    """Of a document for clients."""
    return f',"replicas":{json.dumps(replicas, ensure_ascii=False, separators=(",", ":"))}}}'


@functools.lru_cache(maxsize=10_000)
def shared(replicas: tuple[str, ...]) -> tuple[str, ...]:
    """The same one for all images that the same members hold, as long as those are few."""
    return tuple(map(sys.intern, replicas))


@dataclass(frozen=True, slots=True)
class LiveMember:
    """What a member that is live says of itself. `free` and `total` are the bytes of its disk, None when it cannot
    tell; `images` is how many it holds, `started` when it did, in RFC 3339."""

    id: str
    url: str
    version: str = ""
    free: int | None = None
    total: int | None = None
    images: int = 0
    started: str = ""


@dataclass(frozen=True, slots=True)
class Carrier:
    """Who brings an image in, as it was noted with the transfer's beginning; unlike the owner's key, this stays when
    that member dies. `until` is the Unix time before which nobody else may end it, 0 when it need not be waited for."""

    member: str
    url: str
    until: float = 0.0


@dataclass(frozen=True, slots=True)
class Known:
    """One image. `document` is the record as it is stored, `revision` the record's. `owner` is the live member that is
    transferring it, None when there is none; `replicas` are the members that are on record as holding its bytes, live
    or not, in the order of their ids."""

    id: str
    document: str
    revision: int
    status: Status
    type: ImageType
    size: int
    owner: str | None = None
    carrier: Carrier | None = None
    replicas: tuple[str, ...] = ()

    @property
    def in_transfer(self) -> bool:
        return self.status in (Status.PENDING, Status.DOWNLOADING)

    @property
    def image(self) -> Image:
        return dataclasses.replace(Image.from_json(self.document, self.revision), replicas=self.replicas)

    def to_json(self) -> str:
        """The document for clients: with the replicas behind the other keys."""
        return self.document[:-1] + _ending(self.replicas)


# What becomes of an image: from what is known of it, None when nothing is. One without a document has no record yet.
Change = Callable[[Known | None], Known | None]


@dataclass(slots=True)
class _State:
    known: dict[str, Known] = field(default_factory=dict)
    # Their ids in order.
    ids: list[str] = field(default_factory=list)
    # Of those that are in transfer.
    moving: set[str] = field(default_factory=set)
    # What belongs to images that have no record yet, or no longer.
    without_record: dict[str, Known] = field(default_factory=dict)
    members: dict[str, LiveMember] = field(default_factory=dict)

    def get(self, image_id: str) -> Known | None:
        return self.known.get(image_id) or self.without_record.get(image_id)

    def set(self, image_id: str, known: Known | None) -> None:
        self.moving.discard(image_id)
        if known is None or not known.document:
            if self.known.pop(image_id, None) is not None:
                del self.ids[bisect.bisect_left(self.ids, image_id)]
            self.without_record.pop(image_id, None)
            if known is not None and (known.owner or known.carrier or known.replicas):
                self.without_record[image_id] = known
            return
        self.without_record.pop(image_id, None)
        if image_id not in self.known:
            bisect.insort(self.ids, image_id)
        self.known[image_id] = known
        if known.in_transfer:
            self.moving.add(image_id)


class Mirror:
    """Every method may be called from any thread, and none blocks.

    What is read is what the store had when it was last heard, or newer. `following` says whether that is now.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._state = _State()
        # The store's revision up to which it was followed, and those at which single images are known beyond it.
        self._revision = 0
        self._ahead: dict[str, int] = {}
        self._newest = 0
        # The last ones, in the order of their deletion.
        self._deleted: dict[str, None] = {}
        # When each member that is not live was last, or was first missed, by `time.monotonic`.
        self._missed: dict[str, float] = {}
        self._heard = time.monotonic()
        self.following = False
        self._listeners: list[Callable[[str], None]] = []

    # For readers.

    @property
    def age(self) -> float:
        """Seconds since the store was last heard, or since this was made."""
        return time.monotonic() - self._heard

    @property
    def stale(self) -> float | None:
        """Seconds since the store was last heard; None while it is being followed."""
        return None if self.following else self.age

    def members(self) -> Mapping[str, LiveMember]:
        """The live ones, by id."""
        with self._lock:
            return dict(self._state.members)

    def gone_for(self, member: str) -> float:
        """Seconds for which a member has not been live, as far as this one knows; 0 while it is."""
        with self._lock:
            if member in self._state.members:
                return 0.0
            return time.monotonic() - self._missed.setdefault(member, time.monotonic())

    def get(self, image_id: str) -> Known:
        """Raises NotFound."""
        with self._lock:
            known = self._state.known.get(image_id)
        if known is None:
            raise NotFound(f"there is no image {image_id}")
        return known

    def is_deleted(self, image_id: str) -> bool:
        """Whether there was such an image, as far as this one remembers: of the last 10,000. Ids are never used
        twice."""
        return image_id in self._deleted

    def list(self, image_type: ImageType | None = None) -> Iterator[Sequence[str]]:
        """As `MetadataStore.list`."""
        for page in self.pages():
            documents = [known.to_json() for known in page if image_type in (None, known.type)]
            if documents:
                yield documents

    def pages(self) -> Iterator[Sequence[Known]]:
        """All images, in the order of their ids, at most 1,000 at a time; what exists throughout is in it once."""
        after = ""
        while True:
            with self._lock:
                first = bisect.bisect_right(self._state.ids, after)
                page = [self._state.known[image_id] for image_id in self._state.ids[first : first + _PAGE]]
            if not page:
                return
            yield page
            after = page[-1].id

    def in_transfer(self) -> Sequence[Known]:
        """The images that somebody must still bring to an end."""
        with self._lock:
            return [self._state.known[image_id] for image_id in self._state.moving]

    def listen(self, changed: Callable[[str], None]) -> None:
        """Has `changed(id)` called, soon, after every change of an image, and `changed("")` after one of who is live
        or of everything. It must not block."""
        self._listeners.append(changed)

    # For writers.

    @property
    def newest(self) -> int:
        """The store's latest revision that anything here is from."""
        return self._newest

    def reached(self, revision: int) -> None:
        """An earlier run of this member has seen the store at this revision."""
        with self._lock:
            self._newest = max(self._newest, revision)

    def replace(
        self, known: Iterable[Known], members: Iterable[LiveMember], revision: int = 0, *, anew: bool = False
    ) -> None:
        """All of it, as the store had it at `revision`; what is known from a later one stays. `anew`: revisions count
        from the beginning again."""
        state = _State(members={each.id: each for each in members})
        for each in known:
            (state.known if each.document else state.without_record)[each.id] = each
        state.ids = sorted(state.known)
        state.moving = {each.id for each in state.known.values() if each.in_transfer}
        with self._lock:
            self._ahead = {} if anew else {each: at for each, at in self._ahead.items() if at > revision}
            for image_id in self._ahead:
                state.set(image_id, self._state.get(image_id))
            for image_id in self._state.known.keys() - state.known.keys():
                self._note_deleted(image_id)
            self._note_missed(state.members)
            self._state, self._revision = state, revision
            self._newest = revision if anew else max(self._newest, revision)
        self._tell("")

    def note(self, image_id: str, known: Known | None, revision: int) -> None:
        """One image as the store had it at `revision`, or None when it was not there; ignored when more is known."""
        with self._lock:
            if revision <= max(self._revision, self._ahead.get(image_id, 0)):
                return
            self._ahead[image_id] = revision
            self._newest = max(self._newest, revision)
            if known == self._state.get(image_id):
                return  # as with nearly every look: nobody need hear of it
            self._set(image_id, known)
        self._tell(image_id)

    def follow(self, image_id: str, change: Change, revision: int) -> None:
        """A change that the store made at `revision`, each in its turn; ignored when more is known of the image."""
        with self._lock:
            # All that happened before it is here.
            self._revision = max(self._revision, revision - 1)
            if revision <= self._ahead.get(image_id, 0):
                return
            self._set(image_id, change(self._state.get(image_id)))
        self._tell(image_id)

    def followed(self, revision: int) -> None:
        """All changes up to `revision` are here."""
        with self._lock:
            self._revision = revision
            self._newest = max(self._newest, revision)
            if self._ahead:
                self._ahead = {image_id: at for image_id, at in self._ahead.items() if at > revision}

    def put(self, known: Known) -> None:
        """One image, new or changed."""
        with self._lock:
            self._set(known.id, known)
        self._tell(known.id)

    def remove(self, image_id: str) -> None:
        """An image that is deleted; may be repeated."""
        with self._lock:
            self._set(image_id, None)
        self._tell(image_id)

    def join(self, member: LiveMember) -> None:
        """It is live, or says something new of itself."""
        with self._lock:
            self._state.members[member.id] = member
            self._missed.pop(member.id, None)
        self._tell("")

    def leave(self, member: str) -> None:
        """It is not live any more; may be repeated."""
        with self._lock:
            if self._state.members.pop(member, None) is not None:
                self._missed[member] = time.monotonic()
        self._tell("")

    def heard(self) -> None:
        """The store has answered, and all that it told until now is here."""
        self._heard = time.monotonic()
        self.following = True

    def lost(self) -> None:
        """The store does not answer."""
        self.following = False

    def _set(self, image_id: str, known: Known | None) -> None:
        if known is not None and known.document:
            self._deleted.pop(image_id, None)
        elif image_id in self._state.known:
            self._note_deleted(image_id)
        self._state.set(image_id, known)

    def _note_deleted(self, image_id: str) -> None:
        self._deleted[image_id] = None
        if len(self._deleted) > _DELETED:
            del self._deleted[next(iter(self._deleted))]

    def _note_missed(self, live: Mapping[str, LiveMember]) -> None:
        for member in self._state.members.keys() - live.keys():
            self._missed[member] = time.monotonic()
        for member in live:
            self._missed.pop(member, None)

    def _tell(self, image_id: str) -> None:
        for changed in self._listeners:
            changed(image_id)
