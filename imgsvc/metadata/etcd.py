"""Metadata store type "etcd": records that the members of a cluster share."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from imgsvc.deadline import time_left
from imgsvc.errors import Conflict, Invalid, NoSpace, NotFound, SourceTaken, Unavailable
from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import Layout, end_of
from imgsvc.etcd_messages import (
    KeyValue,
    Operation,
    created_at,
    delete,
    has_value,
    modified_at,
    put,
    read,
    when,
)
from imgsvc.metadata.etcd_copies import Copies
from imgsvc.metadata.etcd_images import Found, grouped, is_foreign, parsed, read_note
from imgsvc.metadata.etcd_keys import ImageKeys, Transacted, named_records
from imgsvc.metadata.etcd_transfers import Leases, OwnTransfers, document_of
from imgsvc.metadata.etcd_watch import Follower
from imgsvc.metadata.go_program import taken_over
from imgsvc.metadata.image import Image, ImageType, is_id
from imgsvc.metadata.mirror import Known, Mirror
from imgsvc.metadata.store import Entry, Member, require_same

_T = TypeVar("_T")

_PAGE = 1_000
# Creates of one source that find it taken by an image which is then gone; more in a row is no accident.
_ATTEMPTS = 20
_PING_SECONDS = 2.0
# For a look at one image, before the mirror has to do.
_LOOK_SECONDS = 0.6
# For the mirror to be filled, right after a start.
_FILL_SECONDS = 5.0


class EtcdMetadataStore:
    """A `MetadataStore`. An image's revision is that of its document in etcd. Does not close what it was given.

    No locks, which are not safe under pauses: every write is one transaction that compares revisions. The mirror is
    kept filled, if there is one; without, lists are read from etcd, and deletions are not followed.
    """

    def __init__(
        self,
        etcd: Etcd,
        prefix: str,
        member: Member,
        leases: Leases,
        mirror: Mirror | None = None,
        *,
        position: str = "",
    ) -> None:
        """`position` is what an earlier run has left, so that an etcd which was restored meanwhile is known as such."""
        self._etcd = etcd
        self._layout = Layout(prefix)
        self._member = member
        self._leases = leases
        self._mirror = mirror
        self._keys = ImageKeys(etcd, self._layout, mirror)
        self._transfers = OwnTransfers(self._keys, self._layout, member, leases)
        self._copies = Copies(self._keys, self._layout, member.id, self.hold)
        self._follower = None if mirror is None else Follower(etcd, self._layout, mirror, position)

    @property
    def identity(self) -> str:
        """Read each time: etcd may be set up anew under a running service. That gives it another name here, but not
        always another cluster id, which is made of its command line. Restored from a snapshot it may have both as they
        were; the first member that finds its revision gone back gives it another name."""
        if self._follower is not None:
            self._follower.wait_for_position()
        page = named_records(self._etcd, self._layout)
        return f"etcd:{page.cluster:x}:{page.items[0].text}{self._layout.prefix}"

    def mark(self, last: str) -> str:
        return "" if self._follower is None else self._follower.mark(last)

    @property
    def stale(self) -> float | None:
        return None if self._mirror is None else self._mirror.stale

    def list(self, image_type: ImageType | None = None) -> Iterator[Sequence[str]]:
        if self._mirror is None or self._follower is None:
            images = (entry.image for entry, _ in self._entries())
            yield from _pages(image.to_json() for image in images if image_type in (None, image.type))
            return
        self._wait_for_records(self._follower)
        yield from self._mirror.list(image_type)

    def survey(self) -> Iterator[Sequence[Entry]]:
        """Records of the Go program are taken over here: they get their source claim, and nothing stays in transfer."""
        claimed = {item.key for item in self._keys.scan(self._layout.sources, keys_only=True)}
        for page in _pages(self._entries()):
            for entry, item in page:
                if entry.image.source and self._layout.source(entry.image.source) not in claimed:
                    self._etcd.transact([created_at(item.key, item.created)], self._claiming(entry.image))
            yield [self._taken_over(entry) if is_foreign(item) else entry for entry, item in page]

    def held(self) -> Iterator[Sequence[str]]:
        if self._mirror is None or self._follower is None:
            keys = (item.key for item in self._keys.scan(self._layout.images, keys_only=True))
            ids_of_keys = ((key, self._layout.split(key)[0]) for key in keys)
            yield from _pages(each for key, each in ids_of_keys if key == self._layout.replica(each, self._member.id))
            return
        self._wait_for_records(self._follower)
        for page in self._mirror.pages():
            if ids := [known.id for known in page if self._member.id in known.replicas]:
                yield ids

    def get(self, image_id: str) -> Image:
        return self._image(self._find(image_id))

    def look(self, image_id: str) -> tuple[Image, float | None]:
        """Within a second. What only the mirror could tell, and does not know, raises Unavailable, as it may be newer
        than what was heard last, unless it is known to have been deleted."""
        if self._mirror is None or self._follower is None:
            return self.get(image_id), None
        if self._follower.answers:
            try:
                found = self._find(image_id, _LOOK_SECONDS)
            except Unavailable:
                self._follower.doubt()
            else:
                return self._image(found), None
        return _recalled(self._mirror, image_id).image, self._mirror.age

    def peek(self, image_id: str) -> str | None:  # noqa: ARG002 - whatever it is, it has to be asked for
        return None

    def get_by_source(self, source: str) -> Image:
        claim = self._etcd.range(self._layout.source(source)).items
        if not claim:
            raise NotFound(f"there is no image from {source}")
        return self.get(claim[0].text)

    def create(self, image: Image) -> Image:
        document = document_of(image)
        dangling = None
        for _ in range(_ATTEMPTS):
            done = self._create(image, document, dangling)
            record = done.found.record
            if done.succeeded or (record is not None and record.value == document.encode()):
                return self._transfers.written(image, done.found)
            if record is not None and done.outcome.repeated:
                raise Unavailable(f"image {image.id} may have been created, and changed since")
            if record is not None:
                raise Conflict(f"the id {image.id} is in use")
            claims = done.outcome.found[0]
            dangling = claims[0] if claims else None
            if dangling is not None:
                with contextlib.suppress(NotFound):
                    raise SourceTaken(self.get(dangling.text))
            if done.outcome.repeated:
                # Others may have seen it, and an id is never used twice.
                raise Unavailable(f"image {image.id} may have been created, and deleted since")
        raise Unavailable(f"the source of image {image.id} is claimed and let go all the time")

    def update(self, image: Image) -> Image:
        return self._transfers.update(image)

    def expect(self, image_id: str, until: float) -> None:
        self._transfers.expect(image_id, until)

    def may_own(self, image_id: str) -> bool:
        return self._transfers.may_own(self._keys.read(image_id))

    def carrier(self, image_id: str) -> str:
        carrier = self._find(image_id).carrier
        if carrier is None or carrier.member == self._member.id:
            return ""
        return f"{carrier.member} at {carrier.url}"

    def delete(self, image_id: str) -> Image:
        try:
            found = self._find(image_id)
        except NotFound:
            found = self._find_late(image_id)
        image = self._image(found)
        self._transfers.forget(image_id)
        try:
            deleted = self._delete(image, found)
        except NoSpace:
            deleted = self._delete_from_full(image)
        for last in grouped(self._layout, deleted):
            if last.record is not None:
                with contextlib.suppress(ValueError):
                    return last.image()
                return image
        raise NotFound(f"there is no image {image_id}")

    def hold(self, image: Image) -> None:
        """A record that came from elsewhere gets its source claim here."""
        for _ in range(_ATTEMPTS):
            stored = self._image(self._find(image.id))
            require_same(stored, image)
            record = self._layout.record(image.id)
            held = [self._transfers.holding(image.id), *self._claiming(stored)]
            if self._keys.transact(image.id, [modified_at(record, stored.revision)], held).succeeded:
                return
        raise Unavailable(f"image {image.id} is written all the time")

    def release(self, image_id: str) -> None:
        self._keys.delete(image_id, self._layout.replica(image_id, self._member.id))

    def drop_copy(self, image_id: str, keep: Collection[str]) -> bool:
        return self._copies.drop(image_id, keep)

    def lose_copy(self, failed: Image, is_gone: Callable[[], bool]) -> bool:
        # Whoever asks for the image is told where it was.
        held = f"{failed.error}; held by {self._member.id} at {self._member.url}"
        return self._copies.lose(dataclasses.replace(failed, error=held), is_gone)

    def holders(self, image_id: str) -> Sequence[str]:
        """While etcd is away, what is remembered; then those that are not live have no address."""
        if self._mirror is None or self._follower is None:
            return self._holders(image_id)
        if self._follower.answers:
            try:
                return self._holders(image_id)
            except Unavailable:
                self._follower.doubt()
        known, live = _recalled(self._mirror, image_id), self._mirror.members()
        others = [member for member in known.replicas if member != self._member.id]
        return [f"{member} at {live[member].url}" if member in live else member for member in others]

    def _holders(self, image_id: str) -> Sequence[str]:
        notes = self._find(image_id).notes
        others = {member: note for member, note in notes.items() if member != self._member.id}
        if others:
            live = self._layout.members
            others.update(
                (member, read_note(item))
                for item in self._keys.scan(live)
                if (member := item.key.removeprefix(live)) in others
            )
        return [f"{member} at {note.get('url', 'an unknown address')}" for member, note in others.items()]

    def follow_deletions(self, deleted: Callable[[str], None], gap: Callable[[], None]) -> None:
        """A compaction of etcd since the last deletion makes for a gap."""
        if self._follower is not None:
            self._follower.follow_deletions(deleted, gap)

    def ping(self) -> None:
        """Without a lease, nothing can be created here."""
        self._etcd.range(self._layout.records, timeout=_PING_SECONDS)
        self._leases.lease()

    def close(self) -> None:
        if self._follower is not None:
            self._follower.close()

    def _create(self, image: Image, document: str, dangling: KeyValue | None) -> Transacted:
        """The failure branch reads the claim, and leaves no owner without a record. `dangling` is a claim that was found
        to name an image without a record; it is replaced.

        First the owner, then the record if the owner is still that one: a request that was sent twice, because the
        first got no answer, may arrive late, and must not bring back an image that was deleted meanwhile.
        """
        record, claim, owner = (
            self._layout.record(image.id),
            self._layout.source(image.source),
            self._layout.owner(image.id),
        )
        free, written = [created_at(record, 0)], [put(record, document)]
        otherwise = [read(claim), when(created_at(record, 0), delete(owner))]
        if image.source:
            free.append(modified_at(claim, dangling.modified if dangling else 0))
            written.append(put(claim, image.id))
        if dangling:
            free.append(created_at(self._layout.record(dangling.text), 0))
        owned = self._transfers.with_lease(
            lambda lease: self._keys.transact(image.id, free, [put(owner, self._member.id, lease)], otherwise)
        )
        if not owned.succeeded or owned.found.owner is None:
            return owned
        return self._keys.transact(
            image.id,
            [*free, created_at(owner, owned.found.owner.created)],
            [*written, *self._transfers.beginning(image)],
            otherwise,
        )

    def _delete(self, image: Image, found: Found) -> Sequence[KeyValue]:
        start, claim = self._layout.image(image.id), self._layout.source(image.source)
        done = self._keys.transact(
            image.id,
            [created_at(self._layout.record(image.id), _created(found))],
            [delete(start, end_of(start)), when(has_value(claim, image.id), delete(claim))],
        )
        if done.succeeded:
            return done.outcome.found[0]
        return tuple(found.parts.values()) if done.outcome.repeated else ()

    def _delete_from_full(self, image: Image) -> Sequence[KeyValue]:
        """In steps, for want of a better way; a claim that is left between them is replaced by a later create."""
        start, claim = self._layout.image(image.id), self._layout.source(image.source)
        deleted = self._keys.delete(image.id, start, end_of(start))
        for item in self._etcd.range(claim).items:
            if item.text == image.id:
                self._delete_claim(item)
        return deleted

    def _delete_claim(self, claim: KeyValue) -> None:
        """Not that of a newer image, which another member may have created in an etcd that is full no more."""
        try:
            self._etcd.transact([modified_at(claim.key, claim.modified)], [delete(claim.key)])
        except NoSpace:
            # It is still full, and so takes neither a comparison nor a newer claim. Should it get room, and the source
            # a newer image, before it takes this one: the next start of any member claims the source for that anew.
            self._etcd.delete(claim.key)

    def _claiming(self, image: Image) -> Sequence[Operation]:
        """What claims the image's source, if it has one that nobody has claimed."""
        claim = self._layout.source(image.source)
        return [when(created_at(claim, 0), put(claim, image.id))] if image.source else []

    def _find(self, image_id: str, timeout: float | None = None) -> Found:
        found = self._keys.read(image_id, timeout) if is_id(image_id) else None
        if found is None or found.record is None:
            raise NotFound(f"there is no image {image_id}")
        return found

    def _find_late(self, image_id: str) -> Found:
        """An image that was not there; a create of it that is still on its way stores nothing from now on."""
        if is_id(image_id):
            self._etcd.delete(self._layout.owner(image_id))
        return self._find(image_id)

    def _image(self, found: Found) -> Image:
        try:
            return found.image()
        except ValueError as error:
            raise Unavailable(f"what etcd has at {self._layout.record(found.id)} is no image: {error}") from error

    def _wait_for_records(self, follower: Follower) -> None:
        if not follower.wait(time_left(_FILL_SECONDS)):
            raise Unavailable("the records have not been read yet")

    def _entries(self) -> Iterator[tuple[Entry, KeyValue]]:
        for found in grouped(self._layout, self._keys.scan(self._layout.images)):
            record = found.record
            image = None if record is None else parsed(found.id, record)
            if record is None or image is None:
                continue
            yield (
                Entry(
                    dataclasses.replace(image, replicas=found.replicas),
                    owner=None if found.owner is None else found.owner.text,
                    here=self._member.id in found.notes_by_member,
                    was_here=any(self._was_here(member, note) for member, note in found.notes.items()),
                ),
                record,
            )

    def _taken_over(self, entry: Entry) -> Entry:
        image = taken_over(entry.image)
        if image == entry.image:
            return entry
        try:
            return dataclasses.replace(entry, image=self.update(image))
        except (Conflict, NotFound, Invalid):  # another member was faster, or it is larger than any of ours
            return entry

    def _was_here(self, member: str, note: dict[str, str]) -> bool:
        return member != self._member.id and note.get("site") == self._member.site


def _recalled(mirror: Mirror, image_id: str) -> Known:
    """What the mirror does not know may be newer than what it has heard: that is Unavailable, unless it knows of the
    deletion, or there can be no such image; then NotFound."""
    try:
        return mirror.get(image_id)
    except NotFound as error:
        if not is_id(image_id) or mirror.is_deleted(image_id):
            raise
        raise Unavailable(f"etcd does not answer, and image {image_id} is not known here") from error


def _created(found: Found) -> int:
    return 0 if found.record is None else found.record.created


def _pages(images: Iterable[_T]) -> Iterator[Sequence[_T]]:
    remaining = iter(images)
    while page := tuple(itertools.islice(remaining, _PAGE)):
        yield page
