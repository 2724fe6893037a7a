"""What every image store promises, whatever keeps the bytes; the failures first."""

from __future__ import annotations

import importlib
import pkgutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

import imgsvc.images
from imgsvc.errors import Conflict, Invalid, NoSpace, NotFound, Unavailable
from imgsvc.images.memory import MemoryImageStore
from imgsvc.images.store import ImageStore, ImageWriter
from imgsvc.metadata.image import is_id, new_id
from tests.images.conftest import IMAGE_STORES, RECORDS
from tests.images.helpers import BLOCK, content, content_of, put

BY_ID: dict[str, Callable[[ImageStore, str], object]] = {
    "claim": lambda store, image_id: store.claim(image_id),
    "unclaim": lambda store, image_id: store.unclaim(image_id),
    "writer": lambda store, image_id: store.writer(image_id),
    "size": lambda store, image_id: store.size(image_id),
    "open": lambda store, image_id: store.open(image_id),
    "delete": lambda store, image_id: store.delete(image_id),
}
WRITING = ("claim", "unclaim", "writer", "delete")
ENDINGS: dict[str, Callable[[ImageWriter], None]] = {
    "commit": lambda writer: writer.commit(),
    "abort": lambda writer: writer.abort(),
    "close": lambda writer: writer.close(),
}

A_UUID = "0b53a0a6-6c41-4f43-9d2c-6c0d2b2f9a11"
NO_IDS = (
    "",
    ".",
    "..",
    "../x",
    f"../{A_UUID}",
    f"./{A_UUID}",
    f"{A_UUID}/",
    f"{A_UUID}\n",
    f"{A_UUID}\0",
    f"{A_UUID}.part",
    A_UUID.upper(),
    A_UUID.replace("-", ""),
    f"{{{A_UUID}}}",
    ".incoming",
    ".imgsvc",
    "a" * 300,
    "\udc80" * 36,
    "\u0660" * 8 + A_UUID[8:],
)


def test_every_store_is_in_the_suite() -> None:
    """A class of the package that is named as an image store is tested here."""
    found = {
        value
        for module in pkgutil.iter_modules(imgsvc.images.__path__, "imgsvc.images.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if name.endswith("ImageStore") and value is not ImageStore
    }
    assert found == set(IMAGE_STORES)


@pytest.mark.parametrize("bad_id", NO_IDS, ids=ascii)
@pytest.mark.parametrize("method", BY_ID)
def test_no_uuid_is_invalid(store: ImageStore, method: str, bad_id: str) -> None:
    """Nothing but a canonical UUID names an image, whatever the method."""
    with pytest.raises(Invalid):
        BY_ID[method](store, bad_id)


def test_every_method_with_an_id_is_held_against_bad_ones() -> None:
    """A method that is added to the protocol and takes an id must be added to the table above."""
    taking_ids = {
        name for name, method in vars(ImageStore).items() if "image_id" in getattr(method, "__annotations__", {})
    }
    assert taking_ids == set(BY_ID)


@pytest.mark.parametrize("method", WRITING)
def test_nothing_is_written_before_mark(fresh_store: ImageStore, image_id: str, method: str) -> None:
    """A store without a marker may be the wrong directory: it refuses whatever would write."""
    with pytest.raises(Unavailable):
        BY_ID[method](fresh_store, image_id)
    with pytest.raises(Unavailable):
        fresh_store.ping()
    assert fresh_store.fresh


def test_a_fresh_store_is_empty_and_readable(fresh_store: ImageStore, image_id: str) -> None:
    """What only reads works before `mark`."""
    assert list(fresh_store.ids()) == []
    assert list(fresh_store.unfinished()) == []
    with pytest.raises(NotFound):
        fresh_store.size(image_id)
    assert fresh_store.space().total > 0
    assert fresh_store.marked_for == ""


def test_mark(fresh_store: ImageStore) -> None:
    """`mark` ends freshness, keeps the member's id, and names the records."""
    member = fresh_store.member
    assert is_id(member)
    fresh_store.mark(RECORDS)
    assert (fresh_store.fresh, fresh_store.marked_for, fresh_store.member) == (False, RECORDS, member)
    fresh_store.mark("other records")
    assert (fresh_store.fresh, fresh_store.marked_for, fresh_store.member) == (False, "other records", member)
    fresh_store.ping()


@pytest.mark.parametrize("method", ["size", "open"])
def test_missing_image(store: ImageStore, image_id: str, method: str) -> None:
    """An image that was never there is not found."""
    with pytest.raises(NotFound):
        BY_ID[method](store, image_id)


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


def test_delete(store: ImageStore, image_id: str) -> None:
    """A deleted image is gone; deleting it again is fine."""
    put(store, image_id, b"whole")
    store.delete(image_id)
    store.delete(image_id)
    assert list(store.ids()) == []
    with pytest.raises(NotFound):
        store.open(image_id)


def test_delete_leaves_what_is_unfinished(store: ImageStore, image_id: str) -> None:
    """`delete` is about committed images; a claim is not touched."""
    store.claim(image_id)
    store.delete(image_id)
    assert list(store.unfinished()) == [image_id]


def test_reader_outlives_deletion(store: ImageStore, image_id: str) -> None:
    """An image being read stays whole for its reader, even when another takes its name."""
    expected = content_of(image_id, 3 * BLOCK)
    put(store, image_id, expected)
    with closing(store.open(image_id)) as reader:
        first = reader.read(0, BLOCK)
        store.delete(image_id)
        put(store, image_id, b"another")
        assert first + reader.read(BLOCK, 2 * BLOCK) == expected
        assert reader.size == len(expected)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 12_345])
def test_exact_bytes(store: ImageStore, image_id: str, size: int) -> None:
    """What is read is what was written, to the byte."""
    expected = content_of(image_id, size)
    put(store, image_id, expected)
    assert content(store, image_id) == expected
    assert store.size(image_id) == size


def test_read_at_offsets(store: ImageStore, image_id: str) -> None:
    """A read gives the bytes from the offset, fewer only at the end, and none after it."""
    put(store, image_id, b"0123456789")
    with closing(store.open(image_id)) as reader:
        assert reader.size == 10
        assert reader.read(3, 4) == b"3456"
        assert reader.read(8, 4) == b"89"
        assert reader.read(9, 1) == b"9"
        assert reader.read(10, 1) == b""
        assert reader.read(1_000, 4) == b""
        assert reader.read(0, 0) == b""
        assert reader.read(0, 4) == b"0123"


def test_closed_reader(store: ImageStore, image_id: str) -> None:
    """A reader may be closed twice, and reads nothing afterwards."""
    put(store, image_id, b"whole")
    reader = store.open(image_id)
    reader.close()
    reader.close()
    with pytest.raises(Unavailable):
        reader.read(0, 1)


def test_kinds_of_blocks(store: ImageStore, image_id: str) -> None:
    """A block may be bytes, a bytearray or a view, also of items wider than a byte; it is the caller's again at once."""
    reused = bytearray(b"cd")
    writer = store.writer(image_id)
    writer.write(b"ab")
    writer.write(reused)
    reused[:] = b"ef"
    writer.write(memoryview(b"-ef-")[1:3])
    writer.write(memoryview(b"ghijklmn").cast("I"))
    writer.write(b"")
    writer.commit()
    assert content(store, image_id) == b"abcdefghijklmn"


def test_many_writers_at_once(store: ImageStore) -> None:
    """Images written by many threads side by side do not mix."""
    ids = [new_id() for _ in range(24)]

    def write(image_id: str) -> None:
        expected = content_of(image_id, 200_000)
        with closing(store.writer(image_id)) as writer:
            for offset in range(0, len(expected), 10_000):
                writer.write(expected[offset : offset + 10_000])
            writer.commit()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, ids))
    assert set(store.ids()) == set(ids)
    assert list(store.unfinished()) == []
    for image_id in ids:
        assert content(store, image_id) == content_of(image_id, 200_000)


def test_ids_while_images_come_and_go(store: ImageStore) -> None:
    """A listing that others write and delete beside lists at least what stays throughout, once."""
    stays = {new_id() for _ in range(50)}
    for image_id in stays:
        put(store, image_id, b"stays")
    listing = store.ids()
    seen = [next(listing)]
    for _ in range(50):
        passing = new_id()
        put(store, passing, b"passes")
        store.delete(passing)
    seen += listing
    assert stays <= set(seen)
    assert len(seen) == len(set(seen))


def test_two_listings_at_once(store: ImageStore) -> None:
    """Listings do not disturb each other."""
    ids = {new_id() for _ in range(20)}
    for image_id in ids:
        put(store, image_id, b"x")
    first, second = store.ids(), store.ids()
    pairs = list(zip(first, second, strict=True))
    assert {one for one, _ in pairs} == {other for _, other in pairs} == ids


def test_space(store: ImageStore, image_id: str) -> None:
    """There is no more free space than space."""
    space = store.space()
    assert 0 <= space.free <= space.total


def test_a_full_memory_store() -> None:
    """With no room for a block the write says so, and abort gives the room back; other images are unharmed."""
    store = MemoryImageStore(capacity=3 * BLOCK)
    store.mark(RECORDS)
    kept, lost = new_id(), new_id()
    put(store, kept, content_of(kept, BLOCK))
    writer = store.writer(lost)
    writer.write(bytes(BLOCK))
    with pytest.raises(NoSpace):
        writer.write(bytes(BLOCK + 1))
    with pytest.raises(Unavailable):
        writer.commit()
    assert store.space().free == BLOCK
    writer.abort()
    assert store.space().free == 2 * BLOCK
    assert content(store, kept) == content_of(kept, BLOCK)
    put(store, new_id(), bytes(2 * BLOCK))
    assert store.space().free == 0


def test_closed_store(store: ImageStore, image_id: str) -> None:
    """A closed store does nothing more, but who is reading may go on."""
    other = new_id()
    put(store, image_id, b"whole")
    reader = store.open(image_id)
    writer = store.writer(other)
    writer.write(b"half")
    store.close()
    store.close()
    assert reader.read(0, 5) == b"whole"
    reader.close()
    with pytest.raises(Unavailable):
        writer.commit()
    writer.abort()
    for call in BY_ID.values():
        with pytest.raises(Unavailable):
            call(store, image_id)
    for listing in (store.ids, store.unfinished):
        with pytest.raises(Unavailable):
            list(listing())
    with pytest.raises(Unavailable):
        store.space()
    with pytest.raises(Unavailable):
        store.ping()
