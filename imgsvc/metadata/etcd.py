"""Metadata store type "etcd": records that a cluster of hosts shares."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Protocol, TypeVar

import structlog

from imgsvc.errors import Conflict, Invalid, NoSpace, NotFound, SourceTaken, Unavailable
from imgsvc.etcd import Compacted, Etcd, LeaseLost
from imgsvc.etcd_layout import OWNER, RECORD, REPLICAS, Layout, end_of
from imgsvc.etcd_messages import (
    KeyValue,
    Operation,
    Outcome,
    created_at,
    delete,
    exists,
    has_value,
    modified_at,
    put,
    read,
    when,
)
from imgsvc.metadata.etcd_watch import DeletionWatch
from imgsvc.metadata.go_program import taken_over
from imgsvc.metadata.image import Image, ImageType, Status, format_time, is_id
from imgsvc.metadata.store import Entry, Member

_T = TypeVar("_T")

_PAGE = 1_000
# etcd takes 1.5 MiB in one request by default; the rest of it is for keys and notes.
_LARGEST_DOCUMENT = 1024 * 1024
# Creates of one source that find it taken by an image which is then gone; more in a row is no accident.
_ATTEMPTS = 20
_PING_SECONDS = 2.0
_RESTORE_SECONDS = 2.0

_log = structlog.get_logger()


class Leases(Protocol):
    """Who keeps this member's lease."""

    def lease(self, lost: int | None = None) -> int:
        """A lease to put keys on, other than the `lost` one. Raises Unavailable while there is none."""

    def on_new_lease(self, restore: Callable[[int], None]) -> None:
        """Has `restore(lease)` called before a lease replaces a lost one."""


class EtcdMetadataStore:
    """A `MetadataStore`. An image's revision is that of its document in etcd. Does not close what it was given.

    No locks, which are not safe under pauses: every write is one transaction that compares revisions.
    """

    def __init__(self, etcd: Etcd, prefix: str, member: Member, leases: Leases) -> None:
        self._etcd = etcd
        self._layout = Layout(prefix)
        self._member = member
        self._leases = leases
        # Revisions by id of what this member is transferring, to own it again on a new lease.
        self._owned: dict[str, int] = {}
        self._watches: builtins.list[DeletionWatch] = []
        leases.on_new_lease(self._own_again)

    @property
    def identity(self) -> str:
        """Read each time: etcd may be set up anew under a running service. That gives it another name here, but not
        always another cluster id, which is made of its command line; restored from a snapshot it has another id, but
        the name that it had."""
        key = self._layout.records
        named = self._etcd.transact([created_at(key, 0)], [put(key, str(uuid.uuid4())), read(key)], [read(key)])
        cluster = self._etcd.range(key).cluster
        return f"etcd:{cluster:x}:{named.found[-1][0].text}{self._layout.prefix}"

    def list(self, image_type: ImageType | None = None) -> Iterator[Sequence[str]]:
        images = (
            image
            for item in self._scan(self._layout.images)
            if self._layout.split(item.key)[1] == RECORD and (image := self._parsed(item)) is not None
        )
        yield from _pages(image.to_json() for image in images if image_type in (None, image.type))

    def survey(self) -> Iterator[Sequence[Entry]]:
        """Records of the Go program are taken over here: they get their source claim, and nothing stays in transfer."""
        claimed = {item.key for item in self._scan(self._layout.sources, keys_only=True)}
        for page in _pages(self._entries()):
            for entry, item in page:
                if entry.image.source and self._layout.source(entry.image.source) not in claimed:
                    self._etcd.transact([created_at(item.key, item.created)], self._claiming(entry.image))
            yield [self._taken_over(entry) if _is_foreign(item) else entry for entry, item in page]

    def get(self, image_id: str) -> Image:
        return self._find(image_id)[0]

    def peek(self, image_id: str) -> str | None:  # noqa: ARG002 - whatever it is, it has to be asked for
        return None

    def get_by_source(self, source: str) -> Image:
        claim = self._etcd.range(self._layout.source(source)).items
        if not claim:
            raise NotFound(f"there is no image from {source}")
        return self.get(claim[0].text)

    def create(self, image: Image) -> Image:
        dangling = None
        for _ in range(_ATTEMPTS):
            outcome = self._create(image, dangling)
            if outcome.succeeded:
                return self._written(image, outcome.revision)
            stored, claims, *_ = outcome.found
            if stored:
                if stored[0].value == _document(image).encode():
                    return self._written(image, stored[0].modified)
                raise Conflict(f"the id {image.id} is in use")
            dangling = claims[0] if claims else None
            if dangling is not None:
                with contextlib.suppress(NotFound):
                    raise SourceTaken(self.get(dangling.text))
        raise Unavailable(f"the source of image {image.id} is claimed and let go all the time")

    def update(self, image: Image) -> Image:
        document, record = _document(image), self._layout.record(image.id)
        outcome = self._with_surroundings(
            image,
            lambda surroundings: self._etcd.transact(
                [exists(record), modified_at(record, image.revision)],
                [put(record, document), *surroundings],
                [read(record), read(self._layout.owner(image.id))],
            ),
        )
        if outcome.succeeded:
            return self._written(image, outcome.revision)
        stored, owner = outcome.found
        # The owner tells our own repeated write from another member's equal one.
        if stored and stored[0].value == document.encode() and (not owner or self._is_mine(owner[0])):
            return self._written(image, stored[0].modified)
        self._owned.pop(image.id, None)
        if not stored:
            raise NotFound(f"there is no image {image.id}")
        raise Conflict(f"image {image.id} has changed since it was read")

    def may_own(self, image_id: str) -> bool:
        owner = self._etcd.range(self._layout.owner(image_id)).items
        return not owner or self._is_mine(owner[0])

    def owner(self, image_id: str) -> str:
        self.get(image_id)
        owner = self._etcd.range(self._layout.owner(image_id)).items
        if not owner or self._is_mine(owner[0]):
            return ""
        live = self._etcd.range(self._layout.member(owner[0].text)).items
        return _named(owner[0].text, _read_note(live[0]) if live else {})

    def delete(self, image_id: str) -> Image:
        try:
            image, item = self._find(image_id)
        except NotFound:
            image, item = self._find_late(image_id)
        self._owned.pop(image_id, None)
        try:
            deleted = self._delete(image, item)
        except NoSpace:
            deleted = self._delete_from_full(image)
        for each in deleted:
            if each.key == item.key:
                return self._parsed(each) or image
        raise NotFound(f"there is no image {image_id}")

    def hold(self, image_id: str) -> None:
        """A record that came from elsewhere gets its source claim here."""
        image, item = self._find(image_id)
        held = [put(self._layout.replica(image_id, self._member.id), self._note()), *self._claiming(image)]
        if not self._etcd.transact([created_at(item.key, item.created)], held).succeeded:
            raise NotFound(f"there is no image {image_id}")

    def release(self, image_id: str) -> None:
        self._etcd.delete(self._layout.replica(image_id, self._member.id))

    def holders(self, image_id: str) -> Sequence[str]:
        self.get(image_id)
        start = self._layout.replicas(image_id)
        notes = {item.key.removeprefix(start): _read_note(item) for item in self._scan(start)}
        others = {member: note for member, note in notes.items() if not self._is_here(member, note)}
        if others:
            live = self._layout.members
            others.update(
                (member, _read_note(item))
                for item in self._scan(live)
                if (member := item.key.removeprefix(live)) in others
            )
        return [_named(member, note) for member, note in others.items()]

    def follow_deletions(self, deleted: Callable[[str], None], gap: Callable[[], None]) -> None:
        """A compaction of etcd since the last deletion makes for a gap."""
        self._watches.append(DeletionWatch(self._etcd, self._layout, deleted, gap))

    def ping(self) -> None:
        """Without a lease, nothing can be created here."""
        self._etcd.range(self._layout.images, timeout=_PING_SECONDS)
        self._leases.lease()

    def close(self) -> None:
        while self._watches:
            self._watches.pop().close()

    def _create(self, image: Image, dangling: KeyValue | None) -> Outcome:
        """The failure branch reads the record and the claim. `dangling` is a claim that was found to name an image
        without a record; it is replaced.

        First the owner, then the record if the owner is still that one: a request that was sent twice, because the
        first got no answer, may arrive late, and must not bring back an image that was deleted meanwhile.
        """
        record, claim = self._layout.record(image.id), self._layout.source(image.source)
        free, written, found = [created_at(record, 0)], [put(record, _document(image))], [read(record), read(claim)]
        if image.source:
            free.append(modified_at(claim, dangling.modified if dangling else 0))
            written.append(put(claim, image.id))
        if dangling:
            free.append(created_at(self._layout.record(dangling.text), 0))
        owner = self._layout.owner(image.id)
        owned = self._with_owner(image.id, lambda owning: self._etcd.transact(free, [owning, read(owner)], found))
        if not owned.succeeded:
            return owned
        return self._etcd.transact(
            [*free, created_at(owner, owned.found[1][0].created)],
            [*written, *([] if image.in_transfer else self._surroundings(image))],
            [*found, when(created_at(record, 0), delete(owner))],
        )

    def _delete(self, image: Image, item: KeyValue) -> Sequence[KeyValue]:
        start, claim = self._layout.image(image.id), self._layout.source(image.source)
        outcome = self._etcd.transact(
            [created_at(item.key, item.created)],
            [delete(start, end_of(start)), when(has_value(claim, image.id), delete(claim))],
        )
        if outcome.succeeded:
            return outcome.found[0]
        return [item] if outcome.repeated else ()

    def _delete_from_full(self, image: Image) -> Sequence[KeyValue]:
        """In two steps, for want of a better way; a claim that is left between them is replaced by a later create."""
        start, claim = self._layout.image(image.id), self._layout.source(image.source)
        deleted = self._etcd.delete(start, end_of(start))
        if any(item.text == image.id for item in self._etcd.range(claim).items):
            self._etcd.delete(claim)
        return deleted

    def _with_surroundings(self, image: Image, write: Callable[[Sequence[Operation]], Outcome]) -> Outcome:
        """`write`, with the operations that give the image its owner or holder."""
        if image.in_transfer:
            return self._with_owner(image.id, lambda owning: write([owning]))
        return write(self._surroundings(image))

    def _surroundings(self, image: Image) -> Sequence[Operation]:
        """Of an image that nobody transfers any more: who holds it."""
        owner, replicas = self._layout.owner(image.id), self._layout.replicas(image.id)
        if image.status is Status.COMPLETE:
            return [delete(owner), put(self._layout.replica(image.id, self._member.id), self._note())]
        return [delete(owner), delete(replicas, end_of(replicas))]

    def _with_owner(self, image_id: str, write: Callable[[Operation], Outcome]) -> Outcome:
        """`write`, with the operation that makes this member the image's owner."""
        owner, lease = self._layout.owner(image_id), self._leases.lease()
        try:
            return write(put(owner, self._member.id, lease))
        except LeaseLost:
            return write(put(owner, self._member.id, self._leases.lease(lost=lease)))

    def _written(self, image: Image, revision: int) -> Image:
        if image.in_transfer:
            self._owned[image.id] = revision
        else:
            self._owned.pop(image.id, None)
        return dataclasses.replace(image, revision=revision)

    def _own_again(self, lease: int) -> None:
        for image_id, revision in self._owned.copy().items():
            self._etcd.transact(
                [modified_at(self._layout.record(image_id), revision)],
                [put(self._layout.owner(image_id), self._member.id, lease)],
                timeout=_RESTORE_SECONDS,
            )

    def _claiming(self, image: Image) -> Sequence[Operation]:
        """What claims the image's source, if it has one that nobody has claimed."""
        claim = self._layout.source(image.source)
        return [when(created_at(claim, 0), put(claim, image.id))] if image.source else []

    def _find(self, image_id: str) -> tuple[Image, KeyValue]:
        items = self._etcd.range(self._layout.record(image_id)).items if is_id(image_id) else ()
        if not items:
            raise NotFound(f"there is no image {image_id}")
        try:
            return self._image(items[0]), items[0]
        except ValueError as error:
            raise Unavailable(f"what etcd has at {items[0].key} is no image: {error}") from error

    def _find_late(self, image_id: str) -> tuple[Image, KeyValue]:
        """An image that was not there; a create of it that is still on its way stores nothing from now on."""
        if is_id(image_id):
            self._etcd.delete(self._layout.owner(image_id))
        return self._find(image_id)

    def _image(self, item: KeyValue) -> Image:
        """Raises ValueError when the document is none, or another image's."""
        image = Image.from_json(item.value, item.modified)
        if item.key != self._layout.record(image.id):
            raise ValueError(f"it is of image {image.id}")
        return image

    def _parsed(self, item: KeyValue) -> Image | None:
        try:
            return self._image(item)
        except ValueError as error:
            _log.warning("no image document", key=item.key, reason=str(error))
            return None

    def _entries(self) -> Iterator[tuple[Entry, KeyValue]]:
        items = self._scan(self._layout.images)
        for _, group in itertools.groupby(items, lambda item: self._layout.split(item.key)[0]):
            parts = {self._layout.split(item.key)[1]: item for item in group}
            image = self._parsed(parts[RECORD]) if RECORD in parts else None
            if image is None:
                continue
            owner = parts[OWNER].text if OWNER in parts else None
            here = any(
                self._is_here(name.removeprefix(f"{REPLICAS}/"), _read_note(item))
                for name, item in parts.items()
                if name.startswith(f"{REPLICAS}/")
            )
            yield Entry(image, owner, here), parts[RECORD]

    def _scan(self, start: str, *, keys_only: bool = False) -> Iterator[KeyValue]:
        """Every key that begins with `start`, in order: as they were at the first page, or, when etcd compacted that
        away meanwhile, each page that follows as it is then."""
        key, revision = start, 0
        while True:
            try:
                page = self._etcd.range(key, end_of(start), limit=_PAGE, revision=revision, keys_only=keys_only)
            except Compacted:
                revision = 0
                continue
            yield from page.items
            if not page.more:
                return
            key, revision = page.items[-1].key + "\0", revision or page.revision

    def _taken_over(self, entry: Entry) -> Entry:
        image = taken_over(entry.image)
        if image == entry.image:
            return entry
        try:
            return dataclasses.replace(entry, image=self.update(image))
        except (Conflict, NotFound):  # another member was faster
            return entry

    def _is_here(self, member: str, note: dict[str, str]) -> bool:
        return member == self._member.id or note.get("site") == self._member.site

    def _is_mine(self, owner: KeyValue) -> bool:
        return owner.text == self._member.id

    def _note(self) -> str:
        verified = format_time(datetime.now(UTC))
        return json.dumps({"verified": verified, "site": self._member.site, "url": self._member.url})


def _document(image: Image) -> str:
    """Raises Invalid when etcd could not store it."""
    document = image.to_json()
    try:
        size = len(document.encode())
    except UnicodeEncodeError as error:
        raise Invalid("source or comment has half a surrogate pair, which is no text") from error
    if size > _LARGEST_DOCUMENT:
        raise Invalid(f"source and comment make a record of {size} bytes, of which etcd takes {_LARGEST_DOCUMENT}")
    return document


def _is_foreign(item: KeyValue) -> bool:
    """Whether the Go program wrote the document; ours always have all keys."""
    return "error" not in json.loads(item.value)


def _read_note(item: KeyValue) -> dict[str, str]:
    """What a member wrote; nothing, when another program wrote something else."""
    try:
        note = json.loads(item.value)
    except ValueError:
        return {}
    return {key: value for key, value in note.items() if isinstance(value, str)} if isinstance(note, dict) else {}


def _named(member: str, note: dict[str, str]) -> str:
    return f"{member} at {note.get('url', 'an unknown address')}"


def _pages(images: Iterable[_T]) -> Iterator[Sequence[_T]]:
    remaining = iter(images)
    while page := tuple(itertools.islice(remaining, _PAGE)):
        yield page
