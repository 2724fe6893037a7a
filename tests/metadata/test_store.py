"""What every metadata store promises; failures first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from threading import Barrier
from typing import TypeVar

import pytest

from imgsvc.errors import Conflict, ImgsvcError, Invalid, NotFound, SourceTaken
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from imgsvc.metadata.store import Entry, MetadataStore
from imgsvc.settings import MetadataStoreSettings
from tests.metadata.conftest import KINDS, MEMBER, Kind, Opener

_T = TypeVar("_T")

SOURCE = "http://source.example/image.gz"


def image(source: str = "", image_type: ImageType = ImageType.KVM, comment: str = "") -> Image:
    return Image(id=new_id(), type=image_type, source=source, comment=comment)


def listed(store: MetadataStore, image_type: ImageType | None = None) -> list[Image]:
    """The images of a list, which has their documents, while nobody writes."""
    documents = [document for page in store.list(image_type) for document in page]
    images = [store.get(Image.from_json(document).id) for document in documents]
    assert documents == [image.to_json() for image in images]
    return images


def entry(store: MetadataStore, image_id: str) -> Entry:
    return next(entry for page in store.survey() for entry in page if entry.image.id == image_id)


def at_once(calls: Sequence[Callable[[], _T]]) -> list[_T | ImgsvcError]:
    """What each call returned or raised; they begin together, each in a thread of its own."""
    start = Barrier(len(calls))

    def run(call: Callable[[], _T]) -> _T | ImgsvcError:
        start.wait()
        try:
            return call()
        except ImgsvcError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_every_store_type_is_in_this_suite() -> None:
    """Whatever `metadataStoreType` may be in the settings passes this suite."""
    (field,) = [field for field in dataclasses.fields(MetadataStoreSettings) if field.name == "type"]
    expected: str = field.metadata["setting"].kind.expects
    assert set(expected.removeprefix("one of ").split(", ")) == set(KINDS)


class TestFailures:
    def test_get_of_a_missing_image(self, store: MetadataStore) -> None:
        """A missing id raises NotFound, whatever it looks like."""
        for missing in (new_id(), "", "../etc/passwd", "é'\"\\"):
            with pytest.raises(NotFound):
                store.get(missing)

    def test_get_by_source_of_a_missing_source(self, store: MetadataStore) -> None:
        """A source that no image has raises NotFound; so does the empty one, which claims nothing."""
        store.create(image())
        for missing in (SOURCE, ""):
            with pytest.raises(NotFound):
                store.get_by_source(missing)

    def test_delete_of_a_missing_image(self, store: MetadataStore) -> None:
        """Deleting raises NotFound for an id that never was, and the second time."""
        created = store.create(image())
        store.delete(created.id)
        for missing in (created.id, new_id()):
            with pytest.raises(NotFound):
                store.delete(missing)

    def test_update_of_a_missing_image(self, store: MetadataStore) -> None:
        """An update never creates."""
        missing = dataclasses.replace(image(SOURCE), revision=1)
        with pytest.raises(NotFound):
            store.update(missing)
        assert listed(store) == []

    def test_update_after_delete(self, store: MetadataStore) -> None:
        """Whoever still works on a deleted image gets NotFound, and nothing comes back."""
        created = store.create(image(SOURCE))
        store.delete(created.id)
        with pytest.raises(NotFound):
            store.update(created.completed(1, "ab"))
        with pytest.raises(NotFound):
            store.get(created.id)
        with pytest.raises(NotFound):
            store.get_by_source(SOURCE)

    def test_update_of_an_old_revision(self, store: MetadataStore) -> None:
        """An update of a state that is not the stored one raises Conflict and changes nothing."""
        created = store.create(image())
        current = store.update(created.started(10))
        with pytest.raises(Conflict):
            store.update(created.failed("too late"))
        assert store.get(created.id) == current

    def test_create_with_an_id_in_use(self, store: MetadataStore) -> None:
        """A second record with one id raises Conflict, writes nothing and claims no source."""
        created = store.create(image(comment="first"))
        with pytest.raises(Conflict) as conflict:
            store.create(dataclasses.replace(created, comment="second", source=SOURCE))
        assert not isinstance(conflict.value, SourceTaken)
        assert store.get(created.id) == created
        with pytest.raises(NotFound):
            store.get_by_source(SOURCE)

    def test_create_with_a_source_taken(self, store: MetadataStore) -> None:
        """A second record of one source raises SourceTaken with the first as it is now, and writes nothing."""
        first = store.create(image(SOURCE))
        first = store.update(first.started(5))
        second = image(SOURCE, ImageType.CONTAINER)
        with pytest.raises(SourceTaken) as taken:
            store.create(second)
        assert taken.value.image == first
        assert listed(store) == [first]

    def test_text_that_is_none(self, store: MetadataStore) -> None:
        """JSON can escape half a character (a lone surrogate), which no UTF-8 can hold: Invalid, and no trace."""
        with pytest.raises(Invalid):
            store.create(image(SOURCE, comment="\ud800"))
        with pytest.raises(Invalid):
            store.create(image(SOURCE + "\udfff"))
        created = store.create(image(SOURCE))
        with pytest.raises(Invalid):
            store.update(created.failed("\ud800"))
        assert listed(store) == [created]

    def test_hold_of_a_missing_image(self, store: MetadataStore) -> None:
        """Nobody can hold, and nobody is asked who holds, what is not there; letting go of it is fine."""
        with pytest.raises(NotFound):
            store.hold(new_id())
        with pytest.raises(NotFound):
            store.holders(new_id())
        store.release(new_id())

    def test_close_twice(self, store: MetadataStore) -> None:
        """The second close does nothing."""
        store.close()
        store.close()


class TestRepeating:
    def test_create(self, store: MetadataStore) -> None:
        """The same create once more, after an outcome that was not known, succeeds and adds nothing."""
        wanted = image(SOURCE)
        assert store.create(wanted) == store.create(wanted)
        assert len(listed(store)) == 1

    def test_update(self, store: MetadataStore) -> None:
        """The same update once more succeeds, and gives the revision that the next one needs."""
        downloading = store.create(image()).started(7)
        first = store.update(downloading)
        again = store.update(downloading)
        assert again == first == store.get(first.id)
        store.update(again.progressed(3))

    def test_update_that_another_has_followed(self, store: MetadataStore) -> None:
        """Once somebody else has changed the record, the same update once more is a conflict."""
        downloading = store.create(image()).started(7)
        current = store.update(store.update(downloading).progressed(3))
        with pytest.raises(Conflict):
            store.update(downloading)
        assert store.get(current.id) == current

    def test_hold_and_release(self, kind: Kind, store: MetadataStore) -> None:
        """Both may be repeated. Where no other host could hold it, a complete image is here whatever they say."""
        current = store.update(store.create(image()).completed(5, "ab"))
        store.release(current.id)
        store.release(current.id)
        assert entry(store, current.id).here is not kind.shared
        store.hold(current.id)
        store.hold(current.id)
        assert entry(store, current.id).here


class TestConcurrently:
    def test_creates_of_one_source(self, store: MetadataStore) -> None:
        """Of 32 creates of one source one makes an image, and the others are told which."""
        outcomes = at_once([partial(store.create, image(SOURCE)) for _ in range(32)])
        (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Image)]
        losers = [outcome for outcome in outcomes if isinstance(outcome, SourceTaken)]
        assert len(losers) == 31
        assert all(loser.image == winner for loser in losers)
        assert listed(store) == [winner] == [store.get_by_source(SOURCE)]

    def test_creates_of_one_id(self, store: MetadataStore) -> None:
        """Of 16 creates of one id one wins; the others get Conflict."""
        wanted = image()
        outcomes = at_once(
            [partial(store.create, dataclasses.replace(wanted, comment=str(number))) for number in range(16)]
        )
        assert [type(outcome) for outcome in outcomes].count(Conflict) == 15
        assert listed(store) == [outcome for outcome in outcomes if isinstance(outcome, Image)]

    def test_updates_of_one_revision(self, store: MetadataStore) -> None:
        """Of 16 updates of one state one wins; the others get Conflict."""
        created = store.create(image())
        outcomes = at_once([partial(store.update, created.progressed(number)) for number in range(16)])
        assert [type(outcome) for outcome in outcomes].count(Conflict) == 15
        assert [store.get(created.id)] == [outcome for outcome in outcomes if isinstance(outcome, Image)]

    def test_increments(self, store: MetadataStore) -> None:
        """Eight threads that each add one 10 times, trying again after a conflict, add 80."""
        created = store.create(image())

        def add_ten(who: str) -> None:
            for number in range(10):
                while True:
                    # The comment tells each write from every other: of two that are the same, both succeed.
                    current = dataclasses.replace(store.get(created.id), comment=f"{who} {number}")
                    try:
                        store.update(current.progressed(current.size + 1))
                        break
                    except Conflict:
                        continue

        assert at_once([partial(add_ten, str(number)) for number in range(8)]) == [None] * 8
        assert store.get(created.id).size == 80

    def test_delete_against_updates(self, store: MetadataStore) -> None:
        """Whatever a delete runs into, the record is gone afterwards, and its source is free."""
        for _ in range(10):
            created = store.create(image(SOURCE))
            updates = [partial(store.update, created.progressed(number)) for number in range(3)]
            at_once([*updates, partial(store.delete, created.id)])
            with pytest.raises(NotFound):
                store.get(created.id)
            with pytest.raises(NotFound):
                store.get_by_source(SOURCE)

    def test_deletes_of_one_image(self, store: MetadataStore) -> None:
        """Of eight deletes of one image one returns it; the others get NotFound."""
        created = store.create(image())
        outcomes = at_once([partial(store.delete, created.id)] * 8)
        assert [outcome for outcome in outcomes if isinstance(outcome, Image)] == [created]
        assert [type(outcome) for outcome in outcomes].count(NotFound) == 7


class TestRecords:
    @pytest.mark.parametrize("status", Status)
    def test_comes_back_as_it_went_in(self, store: MetadataStore, status: Status) -> None:
        """Every field survives, sizes of a petabyte and times to the microsecond included."""
        created = store.create(image(SOURCE))
        changed = dataclasses.replace(
            created,
            comment="a comment",
            status=status,
            size=10**15,
            expected_size=-1,
            download_start=datetime(2026, 11, 23, 7, 4, 35, 123456, UTC),
            download_end=datetime(2026, 11, 23, 7, 4, 35, 1, UTC),
            sha256="ab" * 32,
            error="a sentence",
        )
        updated = store.update(changed)
        assert updated == dataclasses.replace(changed, revision=updated.revision, replicas=updated.replicas)
        assert updated.revision != created.revision
        assert store.get(created.id) == store.get_by_source(SOURCE) == updated
        assert listed(store) == [updated]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "'; DROP TABLE imgsvc_images; --",
            '"\\"',
            "a\0b",
            "\0",
            "é\u2028漢字🐧",
            "e\u0301",
            "%_*?",
            " x ",
            "x" * 100_000,
        ],
        ids=["empty", "quote", "double", "nul", "only nul", "unicode", "combining", "wildcards", "blanks", "long"],
    )
    def test_text_stays_as_it_is(self, store: MetadataStore, text: str) -> None:
        """Comment and source may be any text, and a source is found by exactly its own."""
        created = store.create(image(SOURCE + text, comment=text))
        assert store.get(created.id).comment == text
        assert store.get_by_source(SOURCE + text) == created
        with pytest.raises(NotFound):
            store.get_by_source(SOURCE + text + "\0")
        with pytest.raises(NotFound):
            store.get_by_source((SOURCE + text).upper())

    def test_images_without_source_do_not_meet(self, store: MetadataStore) -> None:
        """Uploads have no source; any number of them may be there."""
        created = [store.create(image()) for _ in range(3)]
        assert sorted(created, key=lambda image: image.id) == listed(store)

    def test_delete_returns_the_image_as_it_was(self, store: MetadataStore) -> None:
        """The last state comes back, and the source can be claimed again."""
        current = store.update(store.create(image(SOURCE)).completed(3, "ab"))
        assert store.delete(current.id) == current
        again = store.create(image(SOURCE))
        assert store.get_by_source(SOURCE) == again

    def test_update_keeps_the_claim(self, store: MetadataStore) -> None:
        """An image that failed still has its source, so that a new request can find and fetch it again."""
        failed = store.update(store.create(image(SOURCE)).failed("no route"))
        assert store.get_by_source(SOURCE) == failed
        with pytest.raises(SourceTaken):
            store.create(image(SOURCE))

    def test_ping(self, store: MetadataStore) -> None:
        """A store in order says nothing, and shows nothing of the question."""
        store.ping()
        assert listed(store) == []


class TestSurroundings:
    def test_a_transfer(self, store: MetadataStore) -> None:
        """Who writes a record in transfer owns it; who completes it holds it."""
        current = store.create(image(SOURCE))
        assert entry(store, current.id) == Entry(current, owner=MEMBER.id, here=False)
        current = store.update(current.started(5))
        assert entry(store, current.id) == Entry(current, owner=MEMBER.id, here=False)
        current = store.update(current.completed(5, "ab"))
        assert entry(store, current.id) == Entry(current, owner=None, here=True)

    def test_a_failure(self, store: MetadataStore) -> None:
        """An image in error has neither owner nor holder, even one that was whole; fetched again it has an owner."""
        current = store.update(store.create(image(SOURCE)).completed(5, "ab"))
        current = store.update(current.failed("the bytes have rotted"))
        assert entry(store, current.id) == Entry(current, owner=None, here=False)
        current = store.update(current.requeued())
        assert entry(store, current.id) == Entry(current, owner=MEMBER.id, here=False)

    def test_deletion_forgets_who_held(self, store: MetadataStore) -> None:
        """A record that comes later with the same id is held by nobody."""
        current = store.update(store.create(image()).completed(5, "ab"))
        store.delete(current.id)
        store.create(current.requeued())
        assert not entry(store, current.id).here

    def test_holding_is_no_change_of_the_record(self, store: MetadataStore) -> None:
        """A note of who holds leaves the revision alone: whoever read the record can still update it."""
        created = store.update(store.create(image()).completed(1, "ab"))
        store.hold(created.id)
        store.release(created.id)
        store.update(created.failed("an update of what was created"))

    def test_the_last_copy_is_lost(self, store: MetadataStore) -> None:
        """The image goes with it, also when that is said twice, but not at another revision."""
        current = store.update(store.create(image(SOURCE)).completed(5, "ab"))
        failed = current.failed("the bytes have rotted")
        assert store.lose_copy(failed, lambda: True)
        found = entry(store, current.id)
        assert (found.image.error, found.owner, found.here) == ("the bytes have rotted", None, False)
        with pytest.raises(Conflict):
            store.lose_copy(current.failed("for another reason"), lambda: True)
        assert store.get(current.id) == found.image
        with pytest.raises(NotFound):
            store.lose_copy(image().failed("never there"), lambda: True)

    def test_a_copy_that_is_not_lost(self, store: MetadataStore) -> None:
        """Who finds at the last moment that the bytes are there changes nothing."""
        current = store.update(store.create(image(SOURCE)).completed(5, "ab"))
        with pytest.raises(Conflict):
            store.lose_copy(current.failed("the bytes have rotted"), lambda: False)
        assert entry(store, current.id) == Entry(current, owner=None, here=True)

    def test_holders_names_others_only(self, store: MetadataStore) -> None:
        """This member is no other."""
        current = store.update(store.create(image()).completed(5, "ab"))
        assert list(store.holders(current.id)) == []


class TestListing:
    def test_empty(self, store: MetadataStore) -> None:
        """Without images there is no page."""
        assert list(store.list()) == []
        assert list(store.survey()) == []
        assert list(store.held()) == []

    def test_held(self, store: MetadataStore) -> None:
        """Those that are complete, in order, and no others."""
        store.create(image())
        store.update(store.create(image()).failed("gone"))
        complete = [store.update(store.create(image()).completed(5, "ab")) for _ in range(3)]
        store.delete(complete.pop().id)
        assert [each for page in store.held() for each in page] == sorted(image.id for image in complete)

    def test_pages(self, store: MetadataStore) -> None:
        """2,500 images come in three pages, ordered by id, and so do they with their surroundings."""
        with ThreadPoolExecutor(8) as pool:
            created = sorted(pool.map(store.create, [image() for _ in range(2_500)]), key=lambda image: image.id)
        pages = list(store.list())
        assert [len(page) for page in pages] == [1_000, 1_000, 500]
        assert [document for page in pages for document in page] == [image.to_json() for image in created]
        assert [entry.image for page in store.survey() for entry in page] == created

    def test_type(self, store: MetadataStore) -> None:
        """A type lists its own images; both together are all."""
        kvm = [store.create(image()) for _ in range(3)]
        container = [store.create(image(image_type=ImageType.CONTAINER)) for _ in range(2)]
        assert listed(store, ImageType.KVM) == sorted(kvm, key=lambda image: image.id)
        assert listed(store, ImageType.CONTAINER) == sorted(container, key=lambda image: image.id)
        assert len(listed(store)) == 5

    def test_changes_between_pages(self, store: MetadataStore) -> None:
        """What exists throughout is listed exactly once, whatever comes and goes between the pages."""
        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(store.create, [image() for _ in range(2_200)]))
        doomed, kept = created[:400], {image.id for image in created[400:]}
        seen: list[str] = []
        for page in store.list():
            seen += [Image.from_json(document).id for document in page]
            for _ in range(100):
                store.delete(doomed.pop().id)
                store.create(image())
        assert len(seen) == len(set(seen))
        assert kept <= set(seen)

    def test_writes_while_a_list_waits(self, store: MetadataStore) -> None:
        """A list that nobody reads on holds up no writer."""
        for _ in range(3):
            store.create(image())
        waiting = [iter(store.list()) for _ in range(20)]
        for pages in waiting:
            next(pages)
        created = store.create(image(SOURCE))
        assert store.delete(created.id) == created


class TestReopening:
    def test_records_stay(self, reopen: Opener) -> None:
        """Records, claims, revisions, holders and the identity are there after a restart."""
        store = reopen()
        identity = store.identity
        complete = store.update(store.create(image(SOURCE)).completed(5, "ab"))
        pending = store.create(image(image_type=ImageType.CONTAINER))
        store = reopen()
        assert store.identity == identity
        assert store.get_by_source(SOURCE) == complete
        assert entry(store, complete.id).here
        assert listed(store, ImageType.CONTAINER) == [pending]
        with pytest.raises(SourceTaken):
            store.create(image(SOURCE))
        store.update(pending.failed("interrupted"))

    def test_deletions_stay(self, reopen: Opener) -> None:
        """What was deleted is gone after a restart, its claim too."""
        store = reopen()
        store.delete(store.create(image(SOURCE)).id)
        store = reopen()
        assert listed(store) == []
        store.create(image(SOURCE))

    def test_two_places_differ(self, new_place: Callable[[], Opener]) -> None:
        """Two sets of records have two identities."""
        one, other = new_place()(), new_place()()
        try:
            assert one.identity != other.identity
        finally:
            one.close()
            other.close()
