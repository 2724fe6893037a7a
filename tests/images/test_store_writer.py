"""What the writers of every image store promise, and the claims that they leave; the failures first."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from imgsvc.errors import Conflict, NotFound, Unavailable
from imgsvc.images.memory import MemoryImageStore
from imgsvc.images.store import ImageStore, ImageWriter
from imgsvc.metadata.image import new_id
from tests.images.helpers import BLOCK, content, put

ENDINGS: dict[str, Callable[[ImageWriter], None]] = {
    "commit": lambda writer: writer.commit(),
    "abort": lambda writer: writer.abort(),
    "close": lambda writer: writer.close(),
}


def test_nothing_shows_before_commit(store: ImageStore, image_id: str) -> None:
    """While an image is being written, nobody can read it or list it."""
    with closing(store.writer(image_id)) as writer:
        writer.write(b"some")
        with pytest.raises(NotFound):
            store.open(image_id)
        with pytest.raises(NotFound):
            store.size(image_id)
        assert list(store.ids()) == []
        writer.commit()
    assert list(store.ids()) == [image_id]


@pytest.mark.parametrize("ending", ENDINGS)
def test_write_after_the_end(store: ImageStore, image_id: str, ending: str) -> None:
    """A writer that has ended takes no more bytes, and what it had stored stays as it was."""
    writer = store.writer(image_id)
    writer.write(b"whole")
    ENDINGS[ending](writer)
    with pytest.raises(Unavailable):
        writer.write(b"more")
    if ending == "commit":
        assert content(store, image_id) == b"whole"


@pytest.mark.parametrize("ending", ["abort", "close"])
def test_commit_after_the_end_never_returns(store: ImageStore, image_id: str, ending: str) -> None:
    """A commit of what was dropped cannot keep its promise, so it raises, and nothing appears."""
    writer = store.writer(image_id)
    writer.write(b"half")
    ENDINGS[ending](writer)
    with pytest.raises(Unavailable):
        writer.commit()
    assert list(store.ids()) == []


@pytest.mark.parametrize("second", ENDINGS)
def test_endings_after_commit_do_nothing(store: ImageStore, image_id: str, second: str) -> None:
    """A committed image stays, however often its writer is ended."""
    writer = store.writer(image_id)
    writer.write(b"whole")
    writer.commit()
    ENDINGS[second](writer)
    ENDINGS[second](writer)
    assert content(store, image_id) == b"whole"
    assert list(store.unfinished()) == []


@pytest.mark.parametrize("second", ["abort", "close"])
def test_endings_after_abort_do_nothing(store: ImageStore, image_id: str, second: str) -> None:
    """Once aborted, a writer has no hold on the id: what the next writer stores is not touched."""
    writer = store.writer(image_id)
    writer.write(b"half")
    writer.abort()
    later = store.writer(image_id)
    later.write(b"whole")
    ENDINGS[second](writer)
    later.commit()
    assert content(store, image_id) == b"whole"


def test_abort_leaves_the_claim_and_gives_the_space_back(store: ImageStore, image_id: str) -> None:
    """An aborted image stays unfinished, without its bytes, until it is unclaimed."""
    free = store.space().free
    writer = store.writer(image_id)
    writer.write(bytes(4 * BLOCK))
    writer.abort()
    assert list(store.unfinished()) == [image_id]
    if isinstance(store, MemoryImageStore):  # others share their disk; the tests of a full one look at the space
        assert store.space().free == free
    store.unclaim(image_id)
    assert list(store.unfinished()) == []


@pytest.mark.parametrize("second", ["abort", "close"])
def test_endings_after_close_do_nothing(store: ImageStore, image_id: str, second: str) -> None:
    """A closed writer leaves its image unfinished, and an abort that comes late does not change that."""
    writer = store.writer(image_id)
    writer.write(b"half")
    writer.close()
    ENDINGS[second](writer)
    assert list(store.unfinished()) == [image_id]
    with pytest.raises(NotFound):
        store.open(image_id)


def test_a_failed_write_breaks_the_image(store: ImageStore, image_id: str) -> None:
    """After a block that was not stored, neither a further block nor a commit is accepted."""
    writer = store.writer(image_id)
    writer.write(b"first")
    with pytest.raises(TypeError):
        writer.write(None)  # type: ignore[arg-type]
    with pytest.raises(Unavailable):
        writer.write(b"third")
    with pytest.raises(Unavailable):
        writer.commit()
    writer.abort()
    assert list(store.unfinished()) == [image_id]
    assert list(store.ids()) == []


def test_claim_is_found_until_unclaimed(store: ImageStore, image_id: str) -> None:
    """A claim is unfinished work without bytes; it may be made and removed twice."""
    other = new_id()
    store.claim(image_id)
    store.claim(image_id)
    store.claim(other)
    assert set(store.unfinished()) == {image_id, other}
    assert list(store.ids()) == []
    store.unclaim(image_id)
    store.unclaim(image_id)
    assert list(store.unfinished()) == [other]


@pytest.mark.parametrize("claimed", [True, False], ids=["claimed", "not claimed"])
def test_writer_claims(store: ImageStore, image_id: str, *, claimed: bool) -> None:
    """A writer has its id among the unfinished from the first moment, claimed before or not, until it ends."""
    if claimed:
        store.claim(image_id)
    writer = store.writer(image_id)
    assert list(store.unfinished()) == [image_id]
    writer.commit()
    assert list(store.unfinished()) == []
    assert list(store.ids()) == [image_id]


def test_claim_does_not_disturb_a_writer(store: ImageStore, image_id: str) -> None:
    """A claim of an image that is being written loses none of its bytes."""
    writer = store.writer(image_id)
    writer.write(b"first ")
    store.claim(image_id)
    writer.write(b"second")
    writer.commit()
    assert content(store, image_id) == b"first second"


def test_unclaim_removes_leftovers(store: ImageStore, image_id: str) -> None:
    """What a closed writer left is removed, and an image is not."""
    whole = new_id()
    put(store, whole, b"whole")
    writer = store.writer(image_id)
    writer.write(b"half")
    writer.close()
    store.unclaim(image_id)
    store.unclaim(whole)
    assert list(store.unfinished()) == []
    assert content(store, whole) == b"whole"


def test_unclaim_leaves_an_open_writer_alone(store: ImageStore, image_id: str) -> None:
    """The claim of a writer that is open is its own to end."""
    writer = store.writer(image_id)
    with pytest.raises(Conflict):
        store.unclaim(image_id)
    writer.commit()
    assert list(store.ids()) == [image_id]


def test_writer_drops_leftovers(store: ImageStore, image_id: str) -> None:
    """Begun anew, an image holds nothing of an attempt before."""
    writer = store.writer(image_id)
    writer.write(b"a long first attempt")
    writer.close()
    put(store, image_id, b"short")
    assert content(store, image_id) == b"short"


def test_one_writer_at_a_time(store: ImageStore, image_id: str) -> None:
    """While one writer of an image is open there is no second; each way to end it makes room for the next."""
    for ending in ("abort", "close"):
        writer = store.writer(image_id)
        with pytest.raises(Conflict):
            store.writer(image_id)
        ENDINGS[ending](writer)
    put(store, image_id, b"whole")
    store.delete(image_id)
    put(store, image_id, b"again")
    assert content(store, image_id) == b"again"


def test_of_many_threads_one_becomes_the_writer(store: ImageStore, image_id: str) -> None:
    """Threads that ask at the same moment get one writer between them."""
    threads = 8
    start = threading.Barrier(threads)

    def ask() -> ImageWriter | None:
        start.wait()
        try:
            return store.writer(image_id)
        except Conflict:
            return None

    with ThreadPoolExecutor(threads) as pool:
        answers = [future.result() for future in [pool.submit(ask) for _ in range(threads)]]
    writers = [writer for writer in answers if writer is not None]
    assert len(writers) == 1
    writers[0].abort()


def test_a_committed_image_is_never_overwritten(store: ImageStore, image_id: str) -> None:
    """There is no writer for an image that exists; it can still be read, and written again when it is deleted."""
    put(store, image_id, b"first")
    with pytest.raises(Conflict):
        store.writer(image_id)
    assert content(store, image_id) == b"first"
    assert list(store.unfinished()) == []
    store.delete(image_id)
    put(store, image_id, b"second")
    assert content(store, image_id) == b"second"


def test_going_on(store: ImageStore, image_id: str) -> None:
    """A writer that keeps what another left goes on behind it."""
    first = store.writer(image_id)
    first.write(b"one")
    first.close()
    second = store.writer(image_id, keep=True)
    assert (second.size, second.read(0, 9), second.read(1, 1), second.read(3, 1)) == (3, b"one", b"n", b"")
    second.write(b"two")
    assert second.size == 6
    second.commit()
    assert content(store, image_id) == b"onetwo"


@pytest.mark.parametrize("claimed", [True, False])
def test_going_on_from_nothing(store: ImageStore, image_id: str, *, claimed: bool) -> None:
    """Where nothing was left, a writer that would have kept it begins the image."""
    if claimed:
        store.claim(image_id)
    writer = store.writer(image_id, keep=True)
    assert (writer.size, list(writer.notes())) == (0, [])
    writer.write(b"whole")
    writer.commit()
    assert content(store, image_id) == b"whole"


@pytest.mark.parametrize("size", [0, 2])
def test_truncate(store: ImageStore, image_id: str, size: int) -> None:
    """What is written next comes behind the bytes that were kept."""
    writer = store.writer(image_id)
    writer.write(b"one")
    writer.truncate(size)
    assert writer.size == size
    writer.write(b"two")
    writer.commit()
    assert content(store, image_id) == b"one"[:size] + b"two"


def test_notes(store: ImageStore, image_id: str) -> None:
    """They are there for the next writer that keeps what it finds, in order."""
    first = store.writer(image_id)
    first.note("first")
    first.note("späte")
    assert list(first.notes()) == ["first", "späte"]
    first.close()
    second = store.writer(image_id, keep=True)
    second.note("third")
    assert list(second.notes()) == ["first", "späte", "third"]
    second.close()


@pytest.mark.parametrize("ending", ["commit", "abort", "unclaim", "anew"])
def test_notes_go(store: ImageStore, image_id: str, ending: str) -> None:
    """With what they are about; whoever makes the image of this id once more finds none."""
    writer = store.writer(image_id)
    writer.note("a note")
    if ending == "commit":
        writer.commit()
        store.delete(image_id)
    elif ending == "abort":
        writer.abort()
    else:
        writer.close()
    if ending == "unclaim":
        store.unclaim(image_id)
    elif ending == "anew":
        store.writer(image_id).close()
    later = store.writer(image_id, keep=True)
    assert (later.size, list(later.notes())) == (0, [])
    later.close()


@pytest.mark.parametrize("step", ["write", "read", "truncate", "note", "notes"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_after_the_end(store: ImageStore, image_id: str, ending: str, step: str) -> None:
    """A writer that has ended neither reads nor changes anything."""
    steps: dict[str, Callable[[ImageWriter], object]] = {
        "write": lambda writer: writer.write(b"late"),
        "read": lambda writer: writer.read(0, 1),
        "truncate": lambda writer: writer.truncate(0),
        "note": lambda writer: writer.note("late"),
        "notes": lambda writer: writer.notes(),
    }
    writer = store.writer(image_id)
    ENDINGS[ending](writer)
    with pytest.raises(Unavailable):
        steps[step](writer)


def test_reading_between_blocks(store: ImageStore, image_id: str) -> None:
    """What was written can be read, byte by byte, also behind a whole block; and writing goes on."""
    block = memoryview(mmap.mmap(-1, BLOCK))
    block[:3] = b"one"
    writer = store.writer(image_id)
    writer.write(block)
    assert writer.read(1, 4) == b"ne\0\0"
    writer.write(block)
    writer.write(b"end")
    assert writer.read(2 * BLOCK, 9) == b"end"
    writer.truncate(BLOCK + 1)
    writer.write(block[:BLOCK])
    writer.commit()
    assert content(store, image_id) == bytes(block) + b"o" + bytes(block)
