"""What every image store promises, whatever keeps the bytes; its writers have test_store_writer.py."""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

import imgsvc.images
from imgsvc.errors import Conflict, Invalid, NoSpace, NotFound, Unavailable
from imgsvc.images.memory import MemoryImageStore
from imgsvc.images.store import ImageStore
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
    "quarantine": lambda store, image_id: store.quarantine(image_id),
}
WRITING = ("claim", "unclaim", "writer", "delete", "quarantine")

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


@pytest.mark.parametrize("method", ["size", "open", "quarantine"])
def test_missing_image(store: ImageStore, image_id: str, method: str) -> None:
    """An image that was never there is not found."""
    with pytest.raises(NotFound):
        BY_ID[method](store, image_id)


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


def test_quarantine(store: ImageStore, image_id: str) -> None:
    """What is set aside is no image any more, and cannot be set aside again; another of its id can come in."""
    put(store, image_id, b"damaged")
    store.quarantine(image_id)
    assert (list(store.ids()), list(store.unfinished())) == ([], [])
    with pytest.raises(NotFound):
        store.open(image_id)
    with pytest.raises(NotFound):
        store.quarantine(image_id)
    put(store, image_id, b"good")
    assert content(store, image_id) == b"good"
    assert list(store.quarantined()) == [image_id]


def test_quarantine_twice(store: ImageStore, image_id: str) -> None:
    """The second of an id leaves the first where it is, and so does a deletion."""
    other = new_id()
    assert list(store.quarantined()) == []
    for aside in (image_id, other, image_id, image_id):
        put(store, aside, b"damaged")
        store.quarantine(aside)
    store.delete(image_id)
    assert sorted(store.quarantined()) == sorted([image_id, image_id, image_id, other])


def test_what_is_set_aside_is_read_to_its_end(store: ImageStore, image_id: str) -> None:
    """As with a deletion."""
    put(store, image_id, b"damaged")
    with closing(store.open(image_id)) as reader:
        store.quarantine(image_id)
        assert reader.read(0, 7) == b"damaged"


def test_notes(store: ImageStore) -> None:
    """The last one of a topic counts."""
    store.remember("records", "another topic")
    assert store.remembered("scrub") == ""
    for note in ("a long note, which a short one follows", "short"):
        store.remember("scrub", note)
        assert store.remembered("scrub") == note
    assert store.remembered("records") == "another topic"
    assert (list(store.ids()), list(store.unfinished())) == ([], [])


def test_no_note_before_mark(fresh_store: ImageStore) -> None:
    """There, too, nothing is written."""
    assert (fresh_store.remembered("scrub"), list(fresh_store.quarantined())) == ("", [])
    with pytest.raises(Unavailable):
        fresh_store.remember("scrub", "note")


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


@pytest.mark.parametrize("has_sendfile", [True, False])
def test_send(store: ImageStore, image_id: str, has_sendfile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that does not block gets bytes from the offset, as many as it takes, also from a file system that has
    no sendfile."""
    if not has_sendfile:
        monkeypatch.setattr(os, "sendfile", no_sendfile)
    expected = content_of(image_id, 3 * BLOCK)
    put(store, image_id, expected)
    out, far = socket.socketpair()
    with closing(store.open(image_id)) as reader, out, far:
        out.setblocking(False)
        assert reader.send(out.fileno(), 5, 7) == 7
        assert far.recv(100) == expected[5:12]
        offset, received = 12, bytearray()
        while offset < len(expected):
            offset += (sent := reader.send(out.fileno(), offset, BLOCK))
            if sent == 0:
                received += far.recv(BLOCK)
        out.shutdown(socket.SHUT_WR)
        while piece := far.recv(BLOCK):
            received += piece
        assert received == expected[12:]


def test_send_to_nobody(store: ImageStore, image_id: str) -> None:
    """A socket whose other side has gone is no trouble with the disk, and it is said differently."""
    put(store, image_id, b"whole")
    out, far = socket.socketpair()
    with closing(store.open(image_id)) as reader, out:
        far.close()
        out.setblocking(False)
        with pytest.raises(ConnectionError):
            reader.send(out.fileno(), 0, 5)


def no_sendfile(*_: object) -> int:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_closed_reader(store: ImageStore, image_id: str) -> None:
    """A reader may be closed twice, and reads nothing afterwards."""
    put(store, image_id, b"whole")
    reader = store.open(image_id)
    reader.close()
    reader.close()
    with pytest.raises(Unavailable):
        reader.read(0, 1)
    out, far = socket.socketpair()
    with out, far, pytest.raises(Unavailable):
        reader.send(out.fileno(), 0, 1)


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
    for listing in (store.ids, store.unfinished, store.quarantined, lambda: store.remembered("scrub")):
        with pytest.raises(Unavailable):
            list(listing())
    with pytest.raises(Unavailable):
        store.remember("scrub", "note")
    with pytest.raises(Unavailable):
        store.space()
    with pytest.raises(Unavailable):
        store.ping()


def test_quarantine_of_what_was_read(store: ImageStore, image_id: str) -> None:
    """Who judged the bytes that a reader has sets these aside, and not others that came under the same id since."""
    put(store, image_id, b"rotten")
    with closing(store.open(image_id)) as judged:
        store.delete(image_id)
        put(store, image_id, b"sound")
        with pytest.raises(Conflict):
            store.quarantine(image_id, judged)
        assert content(store, image_id) == b"sound"
        assert list(store.quarantined()) == []
    with closing(store.open(image_id)) as judged:
        store.quarantine(image_id, judged)
    assert list(store.quarantined()) == [image_id]
    assert list(store.ids()) == []
