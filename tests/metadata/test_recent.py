"""What the SQLite store answers without a look at the disk: never what is no longer so."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgsvc.errors import Conflict, NotFound, Unavailable
from imgsvc.metadata.image import Image, ImageType, new_id
from imgsvc.metadata.recent import Recent
from imgsvc.metadata.sqlite import SqliteMetadataStore
from tests.harness import wait_for
from tests.metadata.conftest import MEMBER


def image(comment: str = "") -> Image:
    return Image(id=new_id(), type=ImageType.KVM, comment=comment)


@pytest.fixture
def filename(tmp_path: Path) -> Path:
    return tmp_path / "imgsvc.db"


@pytest.fixture
def store(filename: Path) -> Iterator[SqliteMetadataStore]:
    with contextlib.closing(SqliteMetadataStore(filename, MEMBER)) as store:
        yield store


def read(store: SqliteMetadataStore, image_id: str) -> Image:
    """A record, which can be had without waiting from now on."""
    wait_for(lambda: store.get(image_id) and store.peek(image_id), 2, "a record that was read is known")
    return store.get(image_id)


def test_what_was_read_is_known(store: SqliteMetadataStore) -> None:
    """As its document; what was not, and what is not there, is not."""
    created, other = store.create(image("é")), store.create(image())
    assert read(store, created.id) == created
    assert store.peek(created.id) == created.to_json()
    assert store.peek(other.id) is None
    assert store.peek("no id") is None


def test_it_stays_known(store: SqliteMetadataStore) -> None:
    """Longer than a look at other processes holds, and whatever becomes of other records."""
    created, other = store.create(image()), store.create(image())
    read(store, created.id)
    for size in range(15):
        other = store.update(other.progressed(size))
        time.sleep(0.1)
        assert store.peek(created.id) == created.to_json()


def test_who_writes_sees_it_at_once(store: SqliteMetadataStore) -> None:
    """A change, a change that was refused, and the end."""
    current = read(store, store.create(image()).id)
    for size in range(5):
        before, current = current, store.update(current.progressed(size))
        assert store.peek(current.id) in (None, current.to_json())
        with pytest.raises(Conflict):
            store.update(before.progressed(77))
        assert read(store, current.id) == current
    store.delete(current.id)
    assert store.peek(current.id) is None
    with pytest.raises(NotFound):
        store.get(current.id)
    assert store.peek(current.id) is None


def test_another_process_is_seen_within_a_second(store: SqliteMetadataStore, filename: Path) -> None:
    """Its changes and its deletions."""
    with contextlib.closing(SqliteMetadataStore(filename, MEMBER)) as other:
        current = read(store, store.create(image()).id)
        for size in range(3):
            current = other.update(current.progressed(size + 1))
            began = time.monotonic()
            while store.peek(current.id) not in (None, current.to_json()):
                assert time.monotonic() - began < 1
                time.sleep(0.01)
            assert read(store, current.id) == current
        other.delete(current.id)
        wait_for(lambda: store.peek(current.id) is None, 1, "the deletion is seen")
        with pytest.raises(NotFound):
            store.get(current.id)


def test_while_nobody_can_look_at_other_processes(store: SqliteMetadataStore, filename: Path) -> None:
    """Nothing is answered: here somebody locks the file, and a write of ours waits for it."""
    created = read(store, store.create(image()).id)
    with contextlib.closing(sqlite3.connect(filename, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = threading.Thread(target=store.ping)
        waiting.start()
        wait_for(lambda: store.peek(created.id) is None, 1.5, "what cannot be known is not said")
        other.execute("ROLLBACK")
        waiting.join()
    assert read(store, created.id) == created


def documents(store: SqliteMetadataStore, image_type: ImageType | None = None) -> list[str]:
    return [document for page in store.list(image_type) for document in page]


def test_a_list_is_as_new(store: SqliteMetadataStore, filename: Path) -> None:
    """Who writes sees it at once, page by page and type by type, and another process is seen within a second."""
    images = sorted((store.create(image()) for _ in range(3)), key=lambda each: each.id)
    for size in range(3):
        images[1] = store.update(images[1].progressed(size))
        for _ in range(2):
            assert documents(store) == documents(store, ImageType.KVM) == [each.to_json() for each in images]
            assert documents(store, ImageType.CONTAINER) == []
    store.delete(images.pop().id)
    assert documents(store) == [each.to_json() for each in images]
    with contextlib.closing(SqliteMetadataStore(filename, MEMBER)) as other:
        other.delete(images.pop().id)
        wait_for(lambda: documents(store) == [images[0].to_json()], 1, "the deletion is seen")


def test_closed(filename: Path) -> None:
    """What is closed knows nothing."""
    with contextlib.closing(SqliteMetadataStore(filename, MEMBER)) as store:
        created = read(store, store.create(image()).id)
        assert documents(store)
    assert store.peek(created.id) is None
    with pytest.raises(Unavailable):
        documents(store)


def test_nobody_goes_back(store: SqliteMetadataStore) -> None:
    """Whoever has seen a state of a record, in whatever way, does not see an older one later."""
    current = store.create(image())
    over = threading.Event()
    went_back: list[tuple[int, int]] = []

    def look() -> None:
        seen = 0
        while not over.is_set():
            store.get(current.id)
            document = store.peek(current.id)
            for size in (Image.from_json(document).size if document else seen, store.get(current.id).size):
                if size < seen:
                    went_back.append((seen, size))
                seen = size

    readers = [threading.Thread(target=look) for _ in range(4)]
    for reader in readers:
        reader.start()
    written = current
    for size in range(1, 200):
        written = store.update(written.progressed(size))
        assert store.peek(current.id) in (None, written.to_json())
    over.set()
    for reader in readers:
        reader.join()
    assert went_back == []


class TestRecent:
    """Each step of what must not be kept, in the order in which it may happen."""

    @pytest.fixture
    def recent(self) -> Recent:
        recent = Recent()
        recent.trust(time.monotonic() + 60)
        return recent

    def test_read_before_a_write_and_kept_during_it(self, recent: Recent) -> None:
        old = image()
        state = recent.state
        with recent.writing(old.id):
            recent.keep(old, state)
            assert recent.get(old.id) is None
        assert recent.get(old.id) is None

    def test_read_during_a_write(self, recent: Recent) -> None:
        """Nobody knows whether it was before or after the commit."""
        old = image()
        with recent.writing(old.id):
            state = recent.state
            recent.keep(old, state)
            assert recent.get(old.id) is None
        recent.keep(old, state)
        assert recent.get(old.id) is None

    def test_read_before_another_process_was_noticed(self, recent: Recent) -> None:
        old = image()
        state = recent.state
        recent.forget()
        recent.keep(old, state)
        assert recent.get(old.id) is None

    def test_a_write_that_fails(self, recent: Recent) -> None:
        old = image()
        recent.keep(old, recent.state)
        with contextlib.suppress(ZeroDivisionError), recent.writing(old.id):
            raise ZeroDivisionError
        assert recent.get(old.id) is None
        recent.keep(old, recent.state)
        assert recent.get(old.id) == old.to_json()

    def test_pages_that_may_be_old(self, recent: Recent) -> None:
        """Read during a write, before one, or before another process was noticed."""
        state = recent.state
        with recent.writing("any"):
            recent.keep_page("a", (["old"], None), state)
            during = recent.state
            recent.keep_page("a", (["old"], None), during)
            assert recent.page("a") is None
        for before in (state, during):
            recent.keep_page("a", (["old"], None), before)
            assert recent.page("a") is None
        recent.keep_page("a", (["new"], None), recent.state)
        assert recent.page("a") == (["new"], None)
        recent.forget()
        assert recent.page("a") is None

    def test_pages_of_a_long_list(self, recent: Recent) -> None:
        """The first ones are kept; after a write they make room for new ones."""
        for round_ in range(2):
            for number in range(30):
                recent.keep_page(number, ([f"{round_}"], None), recent.state)
            assert [number for number in range(30) if recent.page(number)] == list(range(16))
            assert recent.page(0) == ([f"{round_}"], None)
            with recent.writing("any"):
                pass

    def test_its_size(self, recent: Recent) -> None:
        """The oldest go when there are too many, and what is very long is not kept at all."""
        images = [image() for _ in range(10_000)]
        for each in (image("x" * 5_000), *images):
            recent.keep(each, recent.state)
        assert len(recent._documents) == 8_192
        assert recent.get(images[0].id) is None
        assert recent.get(images[-1].id) == images[-1].to_json()
        assert max(map(len, recent._documents.values())) < 1_000
