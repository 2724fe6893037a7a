"""Every metadata store against a plain dict: random calls one after the other, and random calls from many threads."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from imgsvc.errors import Conflict, NotFound, SourceTaken
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from imgsvc.metadata.store import MetadataStore
from tests.metadata.conftest import MEMBER, Kind, Opener

Step = Callable[[Image], Image]

# Few, so that they are taken often; alike, so that a store which folds or trims text mixes them up.
SOURCES = [
    "",
    "http://a.example/x",
    "http://a.example/X",
    "http://a.example/x ",
    "http://a.example/x\0",
    "é",
    "e\u0301",
]

STEPS: dict[str, Step] = {
    "start": lambda image: image.started(10**15),
    "progress": lambda image: image.progressed(image.size + 1),
    "complete": lambda image: image.completed(image.size, "ab" * 32),
    "fail": lambda image: image.failed("it failed"),
    "requeue": lambda image: image.requeued(),
}


class MetadataMachine(RuleBasedStateMachine):
    """Makes the same calls on a store and on dicts; both must agree on every result."""

    states = Bundle("states")  # every state that a record ever had, also of records that are gone

    def __init__(self, place: Opener, *, keeps_records: bool, shared: bool) -> None:
        super().__init__()
        self.place = place
        self.keeps_records = keeps_records
        self.shared = shared
        self.store: MetadataStore = place()
        self.identity = self.store.identity
        self.images: dict[str, Image] = {}
        self.claims: dict[str, str] = {}
        self.held: set[str] = set()
        self.owned: set[str] = set()
        self.last_update: tuple[Image, Image] | None = None
        self.serial = itertools.count()

    def shown(self, image: Image) -> Image:
        """As the store shows it: with those who hold it, where members share records."""
        holders = (MEMBER.id,) if image.id in self.held else ()
        return dataclasses.replace(image, replicas=holders if self.shared else None)

    def remember(self, image: Image) -> None:
        self.images[image.id] = image
        if image.in_transfer:
            self.owned.add(image.id)
        else:
            self.owned.discard(image.id)
        if image.status is Status.COMPLETE:
            self.held.add(image.id)
        else:
            self.held.discard(image.id)

    @initialize()
    def empty(self) -> None:
        assert list(self.store.list()) == []

    @rule(target=states, source=st.sampled_from(SOURCES), image_type=st.sampled_from(ImageType), comment=st.text())
    def create(self, source: str, image_type: ImageType, comment: str) -> Image | MultipleResults[Image]:
        wanted = Image(id=new_id(), type=image_type, source=source, comment=comment)
        if source in self.claims:
            with pytest.raises(SourceTaken) as taken:
                self.store.create(wanted)
            assert taken.value.image == self.shown(self.images[self.claims[source]])
            return multiple()
        created = self.store.create(wanted)
        self.remember(created)
        assert created == self.shown(wanted.at_revision(created.revision))
        if source:
            self.claims[source] = created.id
        return created

    @rule(state=states)
    def create_again(self, state: Image) -> None:
        current = self.images.get(state.id)
        if current is None:  # an id is never used twice
            return
        if self.shown(state.at_revision(current.revision)) == self.shown(current):
            assert self.store.create(state) == self.shown(current)
        else:
            with pytest.raises(Conflict):
                self.store.create(state)

    @rule(target=states, state=states, step=st.sampled_from(sorted(STEPS)))
    def update(self, state: Image, step: str) -> Image | MultipleResults[Image]:
        # A comment of its own tells each update from a repetition of another.
        wanted = dataclasses.replace(STEPS[step](state), comment=f"update {next(self.serial)}")
        current = self.images.get(state.id)
        if current is None or current.revision != state.revision:
            with pytest.raises(NotFound if current is None else Conflict):
                self.store.update(wanted)
            return multiple()
        updated = self.store.update(wanted)
        assert updated.revision != state.revision
        self.remember(updated)
        assert updated == self.shown(wanted.at_revision(updated.revision))
        self.last_update = (wanted, updated)
        return updated

    @precondition(lambda self: self.last_update is not None)
    @rule()
    def repeat_the_last_update(self) -> None:
        assert self.last_update is not None
        wanted, updated = self.last_update
        if self.images.get(wanted.id) == updated:
            assert self.store.update(wanted) == self.shown(updated)

    @rule(state=states)
    def delete(self, state: Image) -> None:
        current = self.images.pop(state.id, None)
        if current is None:
            with pytest.raises(NotFound):
                self.store.delete(state.id)
            return
        assert self.store.delete(state.id) == self.shown(current)
        self.claims.pop(current.source, None)
        self.held.discard(current.id)
        self.owned.discard(current.id)

    @rule(state=states)
    def hold(self, state: Image) -> None:
        self.last_update = None  # repeating it may or may not decide again who holds
        current = self.images.get(state.id)
        if current is not None and current.status is Status.COMPLETE and current.sha256 == state.sha256:
            self.store.hold(state)
            self.held.add(state.id)
        else:
            with pytest.raises(NotFound if current is None else Conflict):
                self.store.hold(state)

    @rule(state=states)
    def release(self, state: Image) -> None:
        self.last_update = None
        self.store.release(state.id)
        self.held.discard(state.id)

    @rule(state=states)
    def get(self, state: Image) -> None:
        if state.id in self.images:
            current = self.shown(self.images[state.id])
            assert self.store.get(state.id) == current
            assert self.store.look(state.id) == (current, None)
            assert self.store.peek(state.id) in (None, self.images[state.id].to_json())
        else:
            assert self.store.peek(state.id) is None
            for read in (self.store.get, self.store.look):
                with pytest.raises(NotFound):
                    read(state.id)

    @rule(source=st.sampled_from(SOURCES))
    def get_by_source(self, source: str) -> None:
        if source in self.claims:
            assert self.store.get_by_source(source) == self.shown(self.images[self.claims[source]])
        else:
            with pytest.raises(NotFound):
                self.store.get_by_source(source)

    @rule()
    def look_at_everything(self) -> None:
        images = [self.shown(self.images[image_id]) for image_id in sorted(self.images)]
        for wanted in (None, *ImageType):
            listed = [document for page in self.store.list(wanted) for document in page]
            assert listed == [image.to_json() for image in images if wanted in (None, image.type)]
        surveyed = [entry for page in self.store.survey() for entry in page]
        assert [entry.image for entry in surveyed] == images
        assert {entry.image.id for entry in surveyed if entry.owner == MEMBER.id} == self.owned
        assert all(entry.owner in (MEMBER.id, None) for entry in surveyed)
        complete = {image.id for image in images if image.status is Status.COMPLETE}
        assert {entry.image.id for entry in surveyed if entry.here} == (self.held if self.shared else complete)

    @precondition(lambda self: self.keeps_records)
    @rule()
    def reopen(self) -> None:
        self.store.close()
        if self.shared:
            self.owned.clear()
            self.last_update = None  # another process repeats nothing: it takes the transfer over, which is a write
        self.store = self.place()
        assert self.store.identity == self.identity

    def teardown(self) -> None:
        try:
            self.look_at_everything()
        finally:
            self.store.close()


def test_a_store_is_a_dict(kind: Kind, new_place: Callable[[], Opener]) -> None:
    """Whatever calls are made, in whatever order, a store answers as dicts would."""

    class Machine(MetadataMachine):
        def __init__(self) -> None:
            super().__init__(new_place(), keeps_records=kind.keeps_records, shared=kind.shared)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=kind.examples,
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],  # a store in a cluster takes its time
        ),
    )


class Client:
    """One of many that work on one store at once, and what it was told."""

    def __init__(self, store: MetadataStore, seed: str, ids: list[str]) -> None:
        self.store = store
        self.random = random.Random(seed)
        self.name = seed
        self.ids = ids  # shared by all clients
        self.created: list[Image] = []
        self.updated: list[tuple[int, Image]] = []
        self.deleted: list[Image] = []
        self.claimants: list[Image] = []

    def work(self) -> None:
        for number in range(80):
            (call,) = self.random.choices([self.create, self.update, self.delete], [3, 6, 1])
            try:
                call(number)
            except SourceTaken as taken:
                self.claimants.append(taken.image)
            except (Conflict, NotFound):
                continue

    def create(self, number: int) -> None:
        source = self.random.choice([*SOURCES, "", "", ""])
        wanted = Image(id=new_id(), type=ImageType.KVM, source=source, comment=f"{self.name}.{number}")
        self.created.append(self.store.create(wanted))
        self.ids.append(wanted.id)

    def update(self, number: int) -> None:
        if self.ids:
            current = self.store.get(self.random.choice(self.ids[-8:]))
            wanted = dataclasses.replace(current.progressed(number), comment=f"{self.name}.{number}")
            self.updated.append((current.revision, self.store.update(wanted)))

    def delete(self, _number: int) -> None:
        if self.ids:
            self.deleted.append(self.store.delete(self.random.choice(self.ids[-8:])))


@pytest.mark.parametrize("seed", range(3))
def test_many_clients_at_once(store: MetadataStore, seed: int) -> None:
    """From what every call returned follows one history, and what the store holds in the end is its end.

    The updates of each image form one chain, from its creation to its present state or its deletion: none is lost,
    and no two begin at the same state.
    """
    ids: list[str] = []
    clients = [Client(store, f"{seed}.{number}", ids) for number in range(8)]
    with ThreadPoolExecutor(len(clients)) as pool:
        for future in [pool.submit(client.work) for client in clients]:
            future.result()

    ends = {image.id: image for client in clients for image in client.created}
    updates = [(base, image) for client in clients for base, image in client.updated]
    following = {(image.id, base): image for base, image in updates}
    assert len(following) == len(updates) > 50
    for image_id, image in ends.items():
        end = image
        while (next_one := following.pop((image_id, end.revision), None)) is not None:
            end = next_one
        ends[image_id] = end
    assert following == {}

    deleted = [image for client in clients for image in client.deleted]
    assert len(deleted) > 5
    for image in deleted:
        assert ends.pop(image.id) == image

    assert {entry.image.id: entry.image for page in store.survey() for entry in page} == ends
    claimed = [image.source for image in ends.values() if image.source]
    assert len(claimed) == len(set(claimed))
    for image in ends.values():
        assert store.get(image.id) == image
        if image.source:
            assert store.get_by_source(image.source) == image
    created = {image.id: image.source for client in clients for image in client.created}
    assert all(created[image.id] == image.source for client in clients for image in client.claimants)
