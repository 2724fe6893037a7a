"""Copies that go, and copies that turn out to be lost: whether the note may go, and whether the image goes with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable

from imgsvc.errors import Conflict, NoSpace, NotFound, Unavailable
from imgsvc.etcd_layout import Layout, end_of
from imgsvc.etcd_messages import Comparison, delete, exists, modified_at, none_between, put
from imgsvc.metadata.etcd_images import Found
from imgsvc.metadata.etcd_keys import ImageKeys
from imgsvc.metadata.etcd_transfers import document_of
from imgsvc.metadata.image import Image

# Looks at what others note of one image at this very moment; more in a row is no accident.
_ATTEMPTS = 20


class Copies:
    """The notes are compared themselves, as they leave the record's revision alone: those of others, and this member's
    own, so that a request which arrives late does not take away what a new copy has noted."""

    def __init__(self, keys: ImageKeys, layout: Layout, me: str, hold: Callable[[Image], None]) -> None:
        self._keys = keys
        self._layout = layout
        self._me = me
        self._hold = hold

    def drop(self, image_id: str, keep: Collection[str]) -> bool:
        """As `MetadataStore.drop_copy`."""
        others = set(keep) - {self._me}
        found = self._keys.read(image_id)
        if not others or not others <= set(found.replicas):
            return False
        done = self._keys.transact(
            image_id,
            [*self._held(image_id, others), self._same_note(found)],
            [delete(self._layout.replica(image_id, self._me))],
        )
        if done.succeeded or not done.outcome.repeated or self._me in done.found.replicas:
            return done.succeeded
        # An attempt whose answer was lost has taken the note away.
        if not others <= set(done.found.replicas):
            with contextlib.suppress(NotFound, Conflict, ValueError):  # then there is nothing any more to be held
                self._hold(found.image())
            return False
        return True

    def lose(self, failed: Image, is_gone: Callable[[], bool]) -> bool:
        """As `MetadataStore.lose_copy`."""
        document = document_of(failed)
        found = self._keys.read(failed.id)
        for _ in range(_ATTEMPTS):
            record = found.record
            if record is None:
                raise NotFound(f"there is no image {failed.id}")
            if record.modified != failed.revision:
                if record.value == document.encode():
                    return True  # an earlier attempt, whose answer was lost
                raise Conflict(f"image {failed.id} has changed since it was read")
            # Asked after the note was read, which is compared: a copy that comes from now on makes another.
            if not is_gone():
                raise Conflict(f"the bytes of image {failed.id} are here again")
            others = sorted(set(found.replicas) - {self._me})
            done, found = self._release(found, others) if others else self._condemn(failed, document, found)
            if done:
                return not others
        raise Unavailable(f"copies of image {failed.id} come and go all the time")

    def _release(self, found: Found, others: list[str]) -> tuple[bool, Found]:
        """While those others are on record; whether they were, and what is there now."""
        own = self._layout.replica(found.id, self._me)
        try:
            done = self._keys.transact(found.id, [*self._held(found.id, others), self._same_note(found)], [delete(own)])
        except NoSpace:
            # Some releases of etcd, when full, delete only outside of transactions.
            self._keys.delete(found.id, own)
            now = self._keys.read(found.id)
            return set(others) <= set(now.replicas), now
        return done.succeeded, done.found

    def _condemn(self, failed: Image, document: str, found: Found) -> tuple[bool, Found]:
        """While nobody else is on record; whether that was so, and what is there now."""
        record, replicas = self._layout.record(failed.id), self._layout.replicas(failed.id)
        own = self._layout.replica(failed.id, self._me)
        done = self._keys.transact(
            failed.id,
            [
                modified_at(record, failed.revision),
                self._same_note(found),
                none_between(replicas, own),
                none_between(own + "\0", end_of(replicas)),
            ],
            [put(record, document), delete(replicas, end_of(replicas))],
        )
        return done.succeeded, done.found

    def _held(self, image_id: str, members: Iterable[str]) -> list[Comparison]:
        """That all of them are on record."""
        return [exists(self._layout.replica(image_id, member)) for member in sorted(members)]

    def _same_note(self, found: Found) -> Comparison:
        """That this member's note is the one that was found, or there is still none."""
        note = found.notes_by_member.get(self._me)
        return modified_at(self._layout.replica(found.id, self._me), 0 if note is None else note.modified)
