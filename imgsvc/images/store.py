"""What every image store promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from imgsvc.errors import Invalid, NotFound
from imgsvc.metadata.image import is_id

# How far the scrub got; how far the records had come.
Topic = Literal["scrub", "records"]


def require_id(image_id: str) -> str:
    """The id itself; raises Invalid unless it is one, so that nothing else ever names a file."""
    if not is_id(image_id):
        raise Invalid("an image id is a lower-case UUID")
    return image_id


def is_stored(images: ImageStore, image_id: str) -> bool:
    """Whether the image's bytes are there, at this moment. Raises Unavailable."""
    try:
        images.size(image_id)
    except NotFound:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes: `free` may be written by this service, of `total`. Quotas count."""

    free: int
    total: int


class ImageReader(Protocol):
    """One complete image, open for reading. It stays whole when the image is deleted meanwhile.

    Some are still on their way here: then only bytes that have `arrived` may be read or sent, and only by one thread at
    a time."""

    size: int

    def arrived(self, offset: int) -> int:
        """How many bytes from `offset` on may be read now. Never blocks. Raises what `read` does."""

    def wait(self, offset: int, length: int, wake: Callable[[], None]) -> None:
        """Has `wake` called, once and from any thread, when the byte at `offset` has arrived or never will; it must not
        block. So many bytes from there on are wanted. Waits for nothing itself; a second call takes the place of the
        first."""

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer only at the end, and of an image that is on its way."""

    def send(self, descriptor: int, offset: int, length: int) -> int:
        """Writes up to `length` bytes from `offset`, which is before the end, to a socket that does not block.

        Returns how many it took, 0 when it takes none now. Raises ConnectionError or TimeoutError when it never will
        again, and what `read` raises.
        """

    def close(self) -> None: ...


class ImageWriter(Protocol):
    """One image on its way in, front to back, by one thread at a time. `size` is the number of its bytes so far.

    Nothing can be opened before `commit`. After `commit`, `abort` or `close` any of these three may be called again
    and does nothing, except that a commit which cannot keep its promise never returns: after `abort`, `close` or a
    failed write, truncation or commit it raises Unavailable, as does everything else. All but `abort` and `close` raise
    NoSpace, or Unavailable for any other trouble with the disk; then `abort` (or `close`) is still due.
    """

    @property
    def size(self) -> int: ...

    def write(self, block: bytes | bytearray | memoryview) -> None:
        """Behind what is there."""

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` of the bytes so far; fewer only at the end."""

    def truncate(self, size: int) -> None:
        """Drops all but the first `size` bytes."""

    def note(self, line: str) -> None:
        """Keeps a line of text, which is not empty, for whoever goes on with the image, after `close` or a crash. Notes
        go with `commit`, `abort` and a writer that begins anew. They are no safer from a loss of power than the bytes
        are."""

    def notes(self) -> Sequence[str]:
        """In the order in which they were made. One whose `note` did not return may be among them, or a part of it."""

    def follow(self, size: int) -> ImageReader:
        """A reader of the image that will have `size` bytes, for as far as it is written: to ask for more raises
        Unavailable. It may be used by another thread, and goes on after `commit` and `close`; `abort` may
        take the bytes from it."""

    def commit(self) -> None:
        """When this returns, the image is on the disk under its name, whatever happens next.

        Raises Conflict when that name is taken; an image is never overwritten.
        """

    def abort(self) -> None:
        """Gives the space back and leaves the claim, for the record may still have to be settled. Never raises."""

    def close(self) -> None:
        """Lets go of the file and leaves the image unfinished, for the next start to find."""


class ImageStore(Protocol):
    """The bytes of images, by id. Every method may be called from any thread and may block.

    An id that is no UUID raises Invalid, whatever the method. Disk trouble raises NoSpace or Unavailable.
    """

    @property
    def member(self) -> str:
        """The id of the member whose images these are: made on first use, or given by `rename`; kept in the marker."""

    @property
    def home(self) -> str:
        """Tells this directory from all others whatever its member is called: a UUID, made on first use and kept in
        the marker."""

    @property
    def place(self) -> str:
        """Names it for a person: the directory."""

    @property
    def fresh(self) -> bool:
        """True until `mark`, when there was no marker: a new directory, or one that is not mounted."""

    @property
    def marked_for(self) -> str:
        """The identity of the records that the marker names; "" when fresh."""

    def mark(self, identity: str) -> None:
        """Writes the marker, naming the records that these images belong to; `member` stays what it was.

        Before it, nothing is written, and what would write raises Unavailable. Raises ConfigError when it cannot.
        """

    def rename(self, member: str) -> None:
        """The member has this id from now on, and the marker says so when this returns, if there is one. Raises
        ConfigError when it cannot."""

    def claim(self, image_id: str) -> None:
        """Leaves a durable note that a transfer of this image is under way here; `writer` takes it over."""

    def unclaim(self, image_id: str) -> None:
        """Removes the claim and what an earlier writer left; missing is fine. Raises Conflict while one is open."""

    def unfinished(self) -> Iterator[str]:
        """The ids that are claimed or were being written: what a crash left, when there is no transfer yet."""

    def writer(self, image_id: str, *, keep: bool = False, followed: bool = False) -> ImageWriter:
        """Begins the image anew, claiming it, and dropping what an earlier unfinished writer left; or, to `keep` that,
        goes on behind it. The claim goes with `commit` or `unclaim`. Raises Conflict when the image is committed, or
        another writer of it is open.

        One that is `followed` is read while it is written, and nobody needs its claim after a loss of power."""

    def size(self, image_id: str) -> int:
        """Bytes of a committed image. Raises NotFound."""

    def open(self, image_id: str) -> ImageReader:
        """Raises NotFound unless the image was committed."""

    def delete(self, image_id: str) -> None:
        """Removes a committed image; missing is fine."""

    def ids(self) -> Iterator[str]:
        """The ids of all committed images. Files that are not named by an id are not looked at."""

    def count(self) -> int:
        """How many images are committed: for people, and cheap, so it may be a little old where there are many."""

    def quarantine(self, image_id: str, read: ImageReader | None = None) -> None:
        """Sets a committed image aside, for good when this returns: it is no image any more, and its bytes are kept
        until a person removes them. What was set aside under this id before is kept as well.

        With a reader of this store that is still open, only what that one reads: raises Conflict when other bytes have
        this id by now. Raises NotFound; when it raises anything, the image is where it was if the disk allowed that.
        """

    def quarantined(self) -> Iterator[str]:
        """The ids of what was set aside, each as often as it was."""

    def remember(self, topic: Topic, line: str) -> None:
        """Keeps a line about these images, durably, instead of the one before of the same topic."""

    def remembered(self, topic: Topic) -> str:
        """The line that was kept last; "" when there is none, or it was kept in a directory that this is a copy of: one
        without its marker."""

    def space(self) -> Space: ...

    def ping(self) -> None:
        """Raises Unavailable unless images can be read and written now; lack of space is not this method's business."""

    def close(self) -> None:
        """May be called twice."""
