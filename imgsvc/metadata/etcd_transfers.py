"""Who transfers an image: the owner's key as a fence around every write of a record in etcd."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Protocol

from imgsvc.errors import Conflict, Invalid, NotFound, Unavailable
from imgsvc.etcd import LeaseLost
from imgsvc.etcd_layout import CARRIER, Layout, end_of
from imgsvc.etcd_messages import KeyValue, Operation, created_at, delete, exists, modified_at, put
from imgsvc.metadata.etcd_images import Found, stored_document
from imgsvc.metadata.etcd_keys import ImageKeys, Transacted
from imgsvc.metadata.image import Image, Status, format_time
from imgsvc.metadata.store import Member

# etcd takes 1.5 MiB in one request by default; the rest of it is for keys and notes.
_LARGEST_DOCUMENT = 1024 * 1024
_RESTORE_SECONDS = 2.0
# Transfers that are owned again at a time; thousands may wait to be fetched.
_AT_ONCE = 8
# Looks at what others are doing to one image at this very moment; more in a row is no accident.
_ATTEMPTS = 20


class Leases(Protocol):
    """Who keeps this member's lease."""

    def lease(self, lost: int | None = None) -> int:
        """A lease to put keys on, other than the `lost` one. Raises Unavailable while there is none."""

    def on_new_lease(self, restore: Callable[[int], None]) -> None:
        """Has `restore(lease)` called when a lease has replaced a lost one, and again while that raises."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Own:
    """A transfer of this member: the revision of the record as it wrote it last, and of its owner key's creation."""

    revision: int
    created: int


class OwnTransfers:
    """Writes records, and knows which of them this member is transferring.

    A record is written by its owner, while the owner's key is the very one that it made, or by anybody while there is
    none; who writes one in transfer makes the key, and with it the carrier's note, in that transaction. So a member
    whose lease ran out finds its key gone, and goes on only if the record is as it left it and nobody else has noted to
    carry it since.
    """

    def __init__(self, keys: ImageKeys, layout: Layout, member: Member, leases: Leases) -> None:
        self._keys = keys
        self._layout = layout
        self._member = member
        self._leases = leases
        self._lock = threading.Lock()
        self._own: dict[str, _Own] = {}
        leases.on_new_lease(self._own_again)

    def is_mine(self, owner: KeyValue) -> bool:
        return owner.text == self._member.id

    def may_own(self, found: Found) -> bool:
        """Nobody else owns it, and nobody else, dead by now or not, has carried it after us."""
        carrier = found.carrier
        return (found.owner is None or self.is_mine(found.owner)) and (
            carrier is None or carrier.member == self._member.id
        )

    def beginning(self, image: Image) -> Sequence[Operation]:
        """What notes the carrier of a new transfer, or what a record that is not in transfer has around it."""
        if image.in_transfer:
            return [put(self._layout.carrier(image.id), self._carrier_note())]
        return self._ending(image)

    def with_lease(self, write: Callable[[int], Transacted]) -> Transacted:
        lease = self._leases.lease()
        try:
            return write(lease)
        except LeaseLost:
            return write(self._leases.lease(lost=lease))

    def written(self, image: Image, found: Found) -> Image:
        """The image as it has just been written, or was before."""
        record, owner = found.record, found.owner
        if record is None:
            raise NotFound(f"there is no image {image.id}")
        with self._lock:
            known = self._own.get(image.id)
            if known is None or known.revision < record.modified:
                self._own.pop(image.id, None)
                if image.in_transfer and owner is not None:
                    self._own[image.id] = _Own(record.modified, owner.created)
        return dataclasses.replace(image, revision=record.modified, replicas=found.replicas)

    def forget(self, image_id: str) -> None:
        with self._lock:
            self._own.pop(image_id, None)

    def update(self, image: Image) -> Image:
        """As `MetadataStore.update`."""
        document = document_of(image)
        own = self._own.get(image.id)
        found: Found | None = None
        if own is not None:
            done = self._replace(image, document, own.created, ())
            if done.succeeded:
                return self.written(image, done.found)
            found = done.found
        for _ in range(_ATTEMPTS):
            found = found or self._keys.read(image.id)
            if self._was_written(image, document, found):
                if self._has_owner(image, found):
                    return self.written(image, found)
                image = image.at_revision(found.revision_of_record)
            self._check(image, found, own)
            if found.owner is not None:
                found = self._cleared(image, found.owner)
                continue
            done = self._take(image, document, found)
            if done.succeeded:
                return self.written(image, done.found)
            found = done.found
        raise Unavailable(f"image {image.id} is owned and let go all the time")

    def expect(self, image_id: str, until: float) -> None:
        """As `MetadataStore.expect`; an earlier process of this member may have begun the transfer."""
        key, owner = self._layout.carrier(image_id), self._layout.owner(image_id)
        found = self._keys.read(image_id)
        for _ in range(_ATTEMPTS):
            if found.record is None:
                raise NotFound(f"there is no image {image_id}")
            # A transfer that was begun before there were carriers has none.
            carrier, known = found.parts.get(CARRIER), found.known
            if known is None or not known.in_transfer or not self.may_own(found):
                break
            done = self._keys.transact(
                image_id,
                [
                    modified_at(self._layout.record(image_id), found.revision_of_record),
                    modified_at(key, 0 if carrier is None else carrier.modified),
                    created_at(owner, 0 if found.owner is None else found.owner.created),
                ],
                [put(key, self._carrier_note(until))],
            )
            if done.succeeded:
                return
            found = done.found
        raise Conflict(f"this member is not transferring image {image_id}")

    def _replace(self, image: Image, document: str, created: int, owning: Sequence[Operation]) -> Transacted:
        record, owner = self._layout.record(image.id), self._layout.owner(image.id)
        return self._keys.transact(
            image.id,
            [exists(record), modified_at(record, image.revision), created_at(owner, created)],
            [put(record, document), *(owning if image.in_transfer else self._ending(image))],
        )

    def _take(self, image: Image, document: str, found: Found) -> Transacted:
        """Writes a record that nobody owns."""
        if not image.in_transfer:
            return self._replace(image, document, 0, ())
        carrier = found.carrier
        # What was noted until when to wait for us still holds.
        noted = [] if carrier is not None and carrier.member == self._member.id else self.beginning(image)
        owner, replicas = self._layout.owner(image.id), self._layout.replicas(image.id)
        # What somebody may have noted to hold was of another life of the image.
        noted = [*noted, delete(replicas, end_of(replicas))]
        return self.with_lease(
            lambda lease: self._replace(image, document, 0, [put(owner, self._member.id, lease), *noted])
        )

    def _was_written(self, image: Image, document: str, found: Found) -> bool:
        """Whether an earlier attempt of ours did it, and its answer was lost. Owner and carrier tell our own write from
        another member's equal one."""
        record = found.record
        if record is None or record.value != document.encode() or record.modified == image.revision:
            return False
        return self.may_own(found) if image.in_transfer else found.owner is None

    @staticmethod
    def _has_owner(image: Image, found: Found) -> bool:
        """Whether the image has the owner that it should have; a lease may have run out since."""
        return image.in_transfer == (found.owner is not None)

    def _check(self, image: Image, found: Found, own: _Own | None) -> None:
        """Raises NotFound or Conflict unless the record may be taken over at its revision."""
        record, owner, carrier = found.record, found.owner, found.carrier
        if record is None:
            self.forget(image.id)
            raise NotFound(f"there is no image {image.id}")
        if own is not None and (owner is None or owner.created != own.created):
            with self._lock:
                if self._own.get(image.id) == own:
                    del self._own[image.id]
        if record.modified != image.revision:
            raise Conflict(f"image {image.id} has changed since it was read")
        if owner is not None and not self.is_mine(owner):
            raise Conflict(f"image {image.id} is being transferred by another member")
        if own is not None and not (carrier is None or carrier.member == self._member.id):
            raise Conflict(f"image {image.id} was taken over by another member")

    def _cleared(self, image: Image, owner: KeyValue) -> Found:
        """An owner's key of an earlier process of this member goes first, so that the new one is another."""
        record, key = self._layout.record(image.id), self._layout.owner(image.id)
        return self._keys.transact(
            image.id, [modified_at(record, image.revision), created_at(key, owner.created)], [delete(key)]
        ).found

    def _ending(self, image: Image) -> Sequence[Operation]:
        """What an image that nobody transfers any more has around it: those who hold it."""
        over = [delete(self._layout.owner(image.id)), delete(self._layout.carrier(image.id))]
        replicas = self._layout.replicas(image.id)
        if image.status is Status.COMPLETE:
            return [*over, self.holding(image.id)]
        return [*over, delete(replicas, end_of(replicas))]

    def holding(self, image_id: str) -> Operation:
        """Notes that this member holds it."""
        verified = format_time(datetime.now(UTC))
        note = {"verified": verified, "site": self._member.site, "url": self._member.url}
        return put(self._layout.replica(image_id, self._member.id), json.dumps(note))

    def _carrier_note(self, until: float = 0.0) -> str:
        return json.dumps({"member": self._member.id, "url": self._member.url, "until": until})

    def _own_again(self, lease: int) -> None:
        """What is as we left it, and nobody owns, is ours again; what is still ours is on the new lease."""
        with self._lock:
            before = dict(self._own)
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="own-again") as threads:
            # All are begun, whatever becomes of one; the first error is raised.
            for done in [threads.submit(self._own_one_again, each, own, lease) for each, own in before.items()]:
                done.result()

    def _own_one_again(self, image_id: str, own: _Own, lease: int) -> None:
        created = 0
        for _ in range(_ATTEMPTS):
            done = self._keys.transact(
                image_id,
                [
                    modified_at(self._layout.record(image_id), own.revision),
                    created_at(self._layout.owner(image_id), created),
                ],
                [put(self._layout.owner(image_id), self._member.id, lease)],
                timeout=_RESTORE_SECONDS,
            )
            record, owner = done.found.record, done.found.owner
            # What is lost is told to its transfer with its next write.
            if record is None or owner is None or record.modified != own.revision or not self.is_mine(owner):
                return
            if done.succeeded:
                with self._lock:
                    if self._own.get(image_id) == own:
                        self._own[image_id] = _Own(own.revision, owner.created)
                return
            created = owner.created


def document_of(image: Image) -> str:
    """Raises Invalid when etcd could not store it."""
    document = stored_document(image)
    try:
        size = len(document.encode())
    except UnicodeEncodeError as error:
        raise Invalid("source or comment has half a surrogate pair, which is no text") from error
    if size > _LARGEST_DOCUMENT:
        raise Invalid(f"source and comment make a record of {size} bytes, of which etcd takes {_LARGEST_DOCUMENT}")
    return document
