"""What every metadata store promises."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from imgsvc.errors import Conflict, NoSpace, Unavailable
from imgsvc.metadata.image import Image, ImageType, Status

# Looks at who else holds one image; more in a row is no accident.
_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Member:
    """This one, as records name it: `id` by `cluster.memberId` or the image store's marker, `site` (host name and
    directory) for telling that an unmarked directory is one that held images before, `url` where it is reached."""

    id: str
    site: str
    url: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A record with its surroundings. `owner` is the id of the member that is transferring it, None when nobody is
    known to; `here` says that this member is on record as holding it. In a store that nobody shares, a complete
    image is here. `was_here` says that one with another id is, which noted that on this member's site: perhaps this very
    directory before it lost its marker, perhaps another host's, as two may have the same name and path."""

    image: Image
    owner: str | None
    here: bool
    was_here: bool = False


class MetadataStore(Protocol):
    """Records, shared by whoever shares the store. Every method may be called from any thread, and all but `peek` may
    block.

    Any method raises Unavailable when the store cannot answer; after a write the outcome is then unknown, and
    repeating the same `create` or `update` is safe: it succeeds if it had succeeded. A write also raises NoSpace.
    A missing record always raises NotFound; nothing returns None for it. `create`, `get` and `get_by_source` cost
    the same with ten images and with 100,000.
    """

    @property
    def identity(self) -> str:
        """Names this set of records, so that a directory can tell whose images it holds: another set, were it at the
        same place, has another name. Raises Unavailable."""

    def mark(self, last: str) -> str:
        """Which records these are, and how far this member has come with them, to be kept for its next run: so that it
        knows of them when they were restored from a backup. `last` is what was kept last, and what is returned when
        there is nothing new; "" is nothing. Nothing is ever new where nobody shares them. Raises Unavailable."""

    def list(self, image_type: ImageType | None = None) -> Iterator[Sequence[str]]:
        """Pages of at most 1,000 documents, as `Image.to_json` writes them, ordered by id; what exists throughout is in
        it exactly once. As new as what `peek` shows, or as `stale` says."""

    @property
    def stale(self) -> float | None:
        """For how many seconds what `list` shows may be out of date, as the store does not answer; None when it is not:
        then it shows at once what this member has written, and what others have within a second. It never blocks."""

    def survey(self) -> Iterator[Sequence[Entry]]:
        """As `list`, but images, with who is transferring and who holds. It keeps what grows with the number of images
        until it is over."""

    def held(self) -> Iterator[Sequence[str]]:
        """Pages of ids, ordered, of the images that this member is on record as holding, in a store that nobody
        shares of the complete ones; what is so throughout is in it exactly once. It may take days to go through."""

    def get(self, image_id: str) -> Image: ...

    def look(self, image_id: str) -> tuple[Image, float | None]:
        """As `get`, and within a second: when the store does not answer, what was last heard of the image, with the
        seconds since. Raises Unavailable when nothing was."""

    def peek(self, image_id: str) -> str | None:
        """The record's document, or None when that cannot be said, or whether there is one, without waiting: this
        method never blocks. What this member has written it shows at once, what others have within a second."""

    def get_by_source(self, source: str) -> Image: ...

    def create(self, image: Image) -> Image:
        """Stores a new record and, when its source is not empty, claims the source, in one step.

        Returns it with its revision. Raises SourceTaken with the image that has the source, Conflict when the id
        is in use; then nothing was written.
        """

    def update(self, image: Image) -> Image:
        """Replaces the record whose revision is `image.revision`, and returns it with the new one; never creates.

        The writer of a record in transfer becomes its owner and its carrier, the writer of a complete one a holder; in
        `error` it has neither. Raises Conflict when the stored record has another revision, or when another member is
        transferring the image, NotFound when it is gone. A transfer of this member's own that another has taken over
        since is a Conflict also when that one is gone by now.
        """

    def expect(self, image_id: str, until: float) -> None:
        """Notes that nobody else may end this member's transfer of the image before the Unix time `until`, although
        this member be dead. Raises Conflict when it is not transferring it."""

    def may_own(self, image_id: str) -> bool:
        """Whether this member may go on with a transfer of the image that it began: nobody else is on record as its
        owner, nor, dead by now or not, as who carried it after us.

        Who asks after `get` and then updates what it got is fenced: another member becomes the owner only by a write
        of the record, which that update then conflicts with.
        """

    def carrier(self, image_id: str) -> str:
        """Names, for a person, the other member, live or not, that is on record as transferring the image; "" when
        there is none."""

    def delete(self, image_id: str) -> Image:
        """Removes record, source claim, owner and holders in one step, and returns the image as it was."""

    def hold(self, image: Image) -> None:
        """Notes, in a store that members share, that this member holds the complete image's bytes; may be repeated.
        Raises Conflict when the record is not complete, or has another digest: of other bytes, then."""

    def release(self, image_id: str) -> None:
        """Takes that note away; may be repeated, and does not mind a record that is gone."""

    def drop_copy(self, image_id: str, keep: Collection[str]) -> bool:
        """As `release`, but only while every other member of `keep` is on record as holding the bytes, of which there
        must be one: so two members cannot each rely on the other. False when that is not so; then the note stays."""

    def lose_copy(self, failed: Image, is_gone: Callable[[], bool]) -> bool:
        """This member's copy is no good. As `release` while others are on record as holding the bytes, and False; else
        as `update` to `failed`, which is the complete image in `error`, and True. That is one step: a note that another
        makes meanwhile stays, with the record, and two members that lose theirs cannot each rely on the other. Safe to
        be repeated, as `update` is.

        `is_gone` says whether the copy is still no good. It is asked when the note that may go is known, so that the note
        of a new copy stays. Raises Conflict when it says no, or when the record has another revision.
        """

    def holders(self, image_id: str) -> Sequence[str]:
        """Names, for a person, each other member that holds the bytes."""

    def follow_deletions(self, deleted: Callable[[str], None], gap: Callable[[], None]) -> None:
        """From now on, in a thread of the store's own, until `close`: calls `deleted(id)` within two seconds of any
        member's deletion of a record, and `gap()` when some may have been missed, again and again until it does not
        raise. A store that no other process shares calls neither."""

    def ping(self) -> None:
        """Raises Unavailable unless reads and writes can work now."""

    def close(self) -> None:
        """Ends its threads and lets go of its files; may be called twice."""


def let_go(records: MetadataStore, image_id: str, me: str) -> bool:
    """Takes the note of a copy that is no good away before its bytes go, while others are on record: one of them may
    drop a good copy because of it. False when there are none; then the note stays, and `lose_copy` is due after the
    bytes. Raises Unavailable and NotFound."""
    for _ in range(_ATTEMPTS):
        others = set(records.get(image_id).replicas or ()) - {me}
        if not others:
            return False
        try:
            if records.drop_copy(image_id, others):
                return True
        except NoSpace:
            return False  # others cannot drop theirs either
    raise Unavailable(f"copies of image {image_id} come and go all the time")


def require_same(stored: Image, image: Image) -> None:
    """Raises Conflict unless what is stored is complete, and has the bytes of this image, as far as its digest says."""
    if stored.status is not Status.COMPLETE:
        raise Conflict(f"image {image.id} is not complete any more")
    if stored.sha256 != image.sha256:
        raise Conflict(f"image {image.id} has other bytes by now")
