"""What only the store in etcd promises: its layout, sharing, size, and that an answer that gets lost does no harm."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from structlog.testing import capture_logs

from imgsvc.errors import Conflict, Invalid, NoSpace, NotFound, SourceTaken, Unavailable
from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import Layout
from imgsvc.etcd_messages import Etcd3Client, put
from imgsvc.metadata.etcd import EtcdMetadataStore
from imgsvc.metadata.etcd_images import stored_document
from imgsvc.metadata.image import Image, ImageType, Status, new_id, parse_time
from imgsvc.metadata.store import Entry, Member
from tests.etcd_cluster import QUOTA, EtcdCluster
from tests.harness import wait_for
from tests.lossy_proxy import LossyProxy
from tests.metadata.etcd_store import OwnedEtcdStore, new_member, open_store
from tests.metadata.helpers import at_once, entry, image, listed

SOURCE = "http://source.example/ä.gz"
# As `openssl dgst -sha256` has it.
SOURCE_SHA256 = "860a4d1e9497dc204ad1a93872854c7bba2aed64769019faf2949bae26368d3a"

MANY = 20_000


@pytest.fixture
def member() -> Member:
    return new_member("one")


@pytest.fixture
def store(etcd: EtcdCluster, etcd_prefix: str, member: Member) -> Iterator[OwnedEtcdStore]:
    with closing(open_store(etcd.endpoints, etcd_prefix, member)) as store:
        yield store


@pytest.fixture
def other(etcd: EtcdCluster, etcd_prefix: str) -> Iterator[OwnedEtcdStore]:
    """The store as another host has it."""
    with closing(open_store(etcd.endpoints, etcd_prefix, new_member("other"))) as store:
        yield store


class Raw:
    """Keys and values as they are, read and written past the store."""

    def __init__(self, endpoint: str, prefix: str) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self.client = Etcd3Client(host=host, port=int(port), timeout=5)
        self.prefix = prefix

    def all(self) -> dict[str, str]:
        """Everything of images under the prefix, which the keys here are without."""
        found = self.client.get_prefix(self.prefix)
        values = {about.key.decode().removeprefix(self.prefix): value.decode() for value, about in found}
        return {
            key: value for key, value in values.items() if not key.startswith(("/image-members/", "/image-records"))
        }

    def lease(self, key: str) -> int:
        return int(self.client.get(self.prefix + key)[1].lease_id)

    def put(self, key: str, value: str) -> None:
        self.client.put(self.prefix + key, value)

    def delete(self, key: str) -> None:
        assert self.client.delete(self.prefix + key)

    def close(self) -> None:
        self.client.close()


@pytest.fixture
def raw(etcd: EtcdCluster, etcd_prefix: str) -> Iterator[Raw]:
    with closing(Raw(etcd.endpoints[0], etcd_prefix)) as raw:
        yield raw


def from_go(raw: Raw, status: str = "complete", source: str = "") -> str:
    """Puts a record as the Go program wrote it, alone, and returns its id."""
    image_id = new_id()
    raw.put(
        f"/images/{image_id}/metadata",
        f'{{"id":"{image_id}","source":"{source}","type":"kvm","comment":"old","status":"{status}","size":24,'
        '"expected_size":24,"download_start":"2015-03-02T07:04:35.123456789Z",'
        '"download_end":"2015-03-02T07:04:36Z"}',
    )
    return image_id


class TestLayout:
    def test_the_life_of_an_image(self, store: OwnedEtcdStore, member: Member, raw: Raw) -> None:
        """Key by key and byte by byte, what other programs read: in transfer, complete, and deleted."""
        current = store.create(image(SOURCE, comment='a "b"'))
        top = f"/images/{current.id}"
        document = (
            f'{{"id":"{current.id}","source":"http://source.example/ä.gz","type":"kvm","comment":"a \\"b\\"",'
            '"status":"pending","size":0,"expected_size":0,"download_start":"0001-01-01T00:00:00Z",'
            '"download_end":"0001-01-01T00:00:00Z","sha256":"","error":""}'
        )
        claim = f"/image-sources/{SOURCE_SHA256}"
        carrier = f'{{"member": "{member.id}", "url": "{member.url}", "until": 0.0}}'
        in_transfer = {
            f"{top}/metadata": document,
            claim: current.id,
            f"{top}/owner": member.id,
            f"{top}/transfer": carrier,
        }
        assert raw.all() == in_transfer
        assert raw.lease(f"{top}/owner") == store.membership.lease_id
        assert raw.lease(f"{top}/metadata") == raw.lease(claim) == raw.lease(f"{top}/transfer") == 0

        current = store.update(current.started(24))
        assert set(raw.all()) == set(in_transfer)
        assert raw.lease(f"{top}/owner") == store.membership.lease_id

        current = store.update(current.completed(24, "ab"))
        found = raw.all()
        assert set(found) == {f"{top}/metadata", claim, f"{top}/replicas/{member.id}"}
        assert found[f"{top}/metadata"] == stored_document(current)
        assert current.replicas == (member.id,)
        note = json.loads(found[f"{top}/replicas/{member.id}"])
        assert note == {"verified": note["verified"], "site": member.site, "url": member.url}
        verified = parse_time(note["verified"])
        assert verified is not None
        assert abs(datetime.now(UTC) - verified) < timedelta(minutes=1)
        assert raw.lease(f"{top}/replicas/{member.id}") == 0

        store.delete(current.id)
        assert raw.all() == {}

    def test_an_image_in_error(self, store: OwnedEtcdStore, other: OwnedEtcdStore, raw: Raw) -> None:
        """It keeps its record and its claim, and has neither owner nor holder, whoever held it."""
        current = store.update(store.create(image(SOURCE)).completed(1, "ab"))
        other.hold(current.id)
        current = store.update(current.failed("lost"))
        assert raw.all() == {
            f"/images/{current.id}/metadata": stored_document(current),
            f"/image-sources/{SOURCE_SHA256}": current.id,
        }

    def test_an_upload_claims_nothing(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """An image without source has no claim, and no claim of another goes with it."""
        store.create(image(SOURCE))
        upload = store.create(image())
        assert [key for key in raw.all() if "sources" in key] == [f"/image-sources/{SOURCE_SHA256}"]
        store.delete(upload.id)
        assert [key for key in raw.all() if "sources" in key] == [f"/image-sources/{SOURCE_SHA256}"]

    @pytest.mark.parametrize("prefix", ["/lochness", "lochness", "lochness/", "//lochness//"])
    def test_prefixes(self, prefix: str) -> None:
        """Slashes around a prefix make no difference."""
        assert Layout(prefix).record("x") == "/lochness/images/x/metadata"

    def test_no_prefix(self) -> None:
        """Without a prefix, keys still begin with a slash, as the Go program's did."""
        assert Layout("").record("x") == Layout("/").record("x") == "/images/x/metadata"
        assert Layout("/a/b").member("x") == "/a/b/image-members/x"

    def test_identity(self, store: OwnedEtcdStore, other: OwnedEtcdStore, etcd: EtcdCluster) -> None:
        """The same for all members; another in another cluster, whatever the prefix."""
        assert store.identity == other.identity
        with (
            closing(EtcdCluster()) as elsewhere,
            closing(open_store(elsewhere.endpoints, "/x")) as stranger,
            closing(open_store(etcd.endpoints, "/x")) as namesake,
        ):
            assert len({store.identity, stranger.identity, namesake.identity}) == 3


class TestForeignRecords:
    def test_reading(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """A record of the Go program is one of ours, without claim, holder or owner."""
        image_id = from_go(raw, source=SOURCE)
        assert store.get(image_id).comment == "old"
        assert [each.id for each in listed(store)] == [image_id]
        assert entry(store, image_id) == Entry(store.get(image_id), owner=None, here=False)

    def test_deleting(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """It goes as others do."""
        store.delete(from_go(raw, source=SOURCE))
        assert raw.all() == {}

    def test_a_survey_claims(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """After a survey its source is claimed; a second record of that source is left without."""
        first, second = sorted(from_go(raw, source=SOURCE) for _ in range(2))
        upload = from_go(raw)
        list(store.survey())
        list(store.survey())
        assert store.get_by_source(SOURCE).id == first
        store.delete(second)
        store.delete(upload)
        assert store.get_by_source(SOURCE).id == first

    @pytest.mark.parametrize("status", ["pending", "downloading"])
    def test_a_survey_ends_transfers(self, store: OwnedEtcdStore, other: OwnedEtcdStore, raw: Raw, status: str) -> None:
        """What the Go program was transferring is in error, whichever member looks first; our own transfers go on."""
        image_id = from_go(raw, status, source=SOURCE)
        current = store.create(image())
        for pages in (other.survey(), store.survey()):
            (page,) = pages
            found = {each.image.id: each for each in page}
            failed = found[image_id].image
            assert (failed.status, found[image_id].owner) == (Status.ERROR, None)
            assert "mistify-image-service stopped" in failed.error
            assert failed == store.get_by_source(SOURCE)
            assert found[current.id].image == current

    def test_a_survey_explains(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """An image that the Go program left in error has a sentence for whoever asks."""
        image_id = from_go(raw, "error")
        list(store.survey())
        assert "did not record why" in store.get(image_id).error

    def test_holding_claims(self, store: OwnedEtcdStore, member: Member, raw: Raw) -> None:
        """Who holds it says so, and claims its source."""
        image_id = from_go(raw, source=SOURCE)
        store.hold(image_id)
        assert f"/images/{image_id}/replicas/{member.id}" in raw.all()
        assert store.get_by_source(SOURCE).id == image_id
        assert entry(store, image_id).here

    @pytest.mark.parametrize("document", ["", "{", "[]", "\xff", '{"id": 1}', "another's"])
    def test_nonsense(self, store: OwnedEtcdStore, raw: Raw, document: str) -> None:
        """What is no document is named in the log and in the error, and hides no other image."""
        good = store.create(image())
        key = f"/images/{new_id()}/metadata"
        with capture_logs() as logs:
            raw.put(key, good.to_json() if document == "another's" else document)
            raw.put(f"/images/{new_id()}/else", "x")
            wait_for(lambda: [log.get("key") for log in logs] == [raw.prefix + key], 5, "a word in the log")
            assert listed(store) == [good]
        assert [each.image for page in store.survey() for each in page] == [good]
        with pytest.raises(Unavailable, match=key):
            store.get(key.split("/")[2])

    def test_a_claim_without_a_record(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """A record removed by hand does not take its source with it."""
        removed = store.create(image(SOURCE))
        raw.delete(f"/images/{removed.id}/metadata")
        with pytest.raises(NotFound):
            store.get_by_source(SOURCE)
        created = store.create(image(SOURCE))
        assert store.get_by_source(SOURCE) == created

    def test_a_claim_of_nonsense(self, store: OwnedEtcdStore, raw: Raw) -> None:
        """A claim that names no image, because somebody wrote something else, claims nothing."""
        raw.client.put(f"{raw.prefix}/image-sources/{SOURCE_SHA256}", b"\xff")
        with pytest.raises(NotFound):
            store.get_by_source(SOURCE)
        created = store.create(image(SOURCE))
        assert store.get_by_source(SOURCE) == created

    @pytest.mark.parametrize("comment", ["x" * 2_000_000, "\ud800"], ids=["too long", "half a surrogate pair"])
    def test_what_etcd_cannot_take(self, store: OwnedEtcdStore, raw: Raw, comment: str) -> None:
        """A record that etcd could not store is the caller's mistake."""
        with pytest.raises(Invalid):
            store.create(image(comment=comment))
        assert raw.all() == {}


class TestSharing:
    def test_creates_of_one_source_at_two_members(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """Of 32 creates of one source at two members one makes an image, and the others are told which."""
        outcomes = at_once([partial(each.create, image(SOURCE)) for each in [store, other] * 16])
        (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Image)]
        assert all(outcome.image == winner for outcome in outcomes if isinstance(outcome, SourceTaken))
        assert listed(store) == [winner]
        wait_for(lambda: listed(other) == [winner], 5, "the same list at the other")

    def test_equal_updates_of_two_members(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """Two members that fetch a failed image again write the same record; one of them may."""
        failed = store.update(store.create(image(SOURCE)).failed("no route"))
        outcomes = at_once([partial(each.update, failed.requeued()) for each in (store, other)])
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Conflict", "Image"]
        winner = store if isinstance(outcomes[0], Image) else other
        assert entry(store, failed.id).owner == winner.member.id

    def test_a_transfer_of_another_member(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """Nobody but its owner writes its record; but anybody may delete it."""
        created = store.create(image())
        for change in (created.started(5), created.completed(5, "ab"), created.failed("by hand"), created.requeued()):
            with pytest.raises(Conflict):
                other.update(change)
        assert entry(other, created.id) == Entry(created, store.member.id, here=False)
        store.update(created.started(5))
        other.delete(created.id)
        with pytest.raises(NotFound):
            store.update(created.started(5))

    def test_holders(self, store: OwnedEtcdStore, other: OwnedEtcdStore, raw: Raw) -> None:
        """Another member is named with its address: the present one if it runs, else that of its note."""
        held = store.update(store.create(image()).completed(1, "ab"))
        other.hold(held.id)
        gone = new_id()
        raw.put(f"/images/{held.id}/replicas/{gone}", '{"url": "http://gone.example"}')
        unknown = new_id()
        raw.put(f"/images/{held.id}/replicas/{unknown}", "nonsense")
        running = other.member.id
        raw.put(f"/images/{held.id}/replicas/{running}", '{"url": "http://old.example"}')
        assert sorted(store.holders(held.id)) == sorted(
            [
                f"{running} at http://other.example:20000",
                f"{gone} at http://gone.example",
                f"{unknown} at an unknown address",
            ]
        )
        assert f"{store.member.id} at http://one.example:20000" in other.holders(held.id)

    def test_one_copy_of_two_is_lost(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """The image stays, and the other's note; when that one is lost as well, the image is."""
        held = store.update(store.create(image()).completed(1, "ab"))
        other.hold(held.id)
        failed = held.failed("it rotted")
        assert not store.lose_copy(failed, lambda: True)
        assert not store.lose_copy(failed, lambda: True)
        assert store.get(held.id) == dataclasses.replace(held, replicas=(other.member.id,))
        assert other.lose_copy(failed, lambda: True)
        assert (store.get(held.id).status, store.get(held.id).replicas) == (Status.ERROR, ())

    def test_copies_that_come_and_go_while_one_is_lost(self, store: OwnedEtcdStore, other: OwnedEtcdStore) -> None:
        """What is compared are the notes as they are when it is written."""
        held = store.update(store.create(image()).completed(1, "ab"))
        changes = iter([partial(other.hold, held.id), partial(other.release, held.id), partial(other.hold, held.id)])

        def meanwhile() -> bool:
            next(changes, lambda: None)()
            return True

        assert not store.lose_copy(held.failed("it rotted"), meanwhile)
        assert store.get(held.id) == dataclasses.replace(held, replicas=(other.member.id,))

    @pytest.mark.parametrize("others", [False, True])
    def test_a_copy_that_comes_back_while_it_is_lost(
        self, store: OwnedEtcdStore, other: OwnedEtcdStore, *, others: bool
    ) -> None:
        """Its new note stays."""
        held = store.update(store.create(image()).completed(1, "ab"))
        if others:
            other.hold(held.id)
        looks: list[None] = []

        def is_gone() -> bool:
            """At the first look it is; then it comes."""
            looks.append(None)
            store.hold(held.id)
            return len(looks) == 1

        with pytest.raises(Conflict):
            store.lose_copy(held.failed("it rotted"), is_gone)
        assert store.get(held.id).revision == held.revision
        assert store.member.id in (store.get(held.id).replicas or ())

    def test_a_predecessor(self, etcd: EtcdCluster, etcd_prefix: str, store: OwnedEtcdStore, member: Member) -> None:
        """A member whose directory may have lost its marker is told what was held there before. Nothing more, as another
        host may have the same name and path: who has another id is another."""
        held = store.update(store.create(image()).completed(1, "ab"))
        successor = dataclasses.replace(member, id=new_id())
        elsewhere = dataclasses.replace(successor, site="two.example:/images")
        with closing(open_store(etcd.endpoints, etcd_prefix, successor)) as successor_store:
            assert entry(successor_store, held.id) == Entry(held, owner=None, here=False, was_here=True)
            assert len(successor_store.holders(held.id)) == 1
        with closing(open_store(etcd.endpoints, etcd_prefix, elsewhere)) as elsewhere_store:
            assert entry(elsewhere_store, held.id) == Entry(held, owner=None, here=False)
            assert len(elsewhere_store.holders(held.id)) == 1


@pytest.fixture(scope="module")
def many(etcd: EtcdCluster) -> Iterator[OwnedEtcdStore]:
    """MANY images, every second one a container."""
    prefix = f"/test-{new_id()}"
    types = itertools.cycle(ImageType)
    records = [Image(new_id(), next(types), status=Status.COMPLETE, sha256="ab" * 32) for _ in range(MANY)]
    random.shuffle(records)
    layout = Layout(prefix)
    with closing(Etcd(etcd.endpoints)) as connection:
        for i in range(0, MANY, 100):
            connection.transact([], [put(layout.record(each.id), each.to_json()) for each in records[i : i + 100]])
    with closing(open_store(etcd.endpoints, prefix)) as store:
        yield store


def ids_of(*pages: Sequence[str]) -> list[str]:
    return [Image.from_json(document).id for page in pages for document in page]


class TestSize:
    def test_a_list(self, many: OwnedEtcdStore) -> None:
        """20,000 images list in order, by pages, in seconds."""
        start = time.monotonic()
        pages = list(many.list())
        assert time.monotonic() - start < 20
        ids = ids_of(*pages)
        assert len(ids) == len(set(ids)) == MANY
        assert ids == sorted(ids)
        assert max(len(page) for page in pages) <= 1_000
        assert len([each for page in many.list(ImageType.KVM) for each in page]) == MANY // 2

    def test_held(self, many: OwnedEtcdStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who goes through it for days costs etcd nothing, nor memory for what others hold; who has no mirror reads the
        keys alone."""
        started = many.create(image()).started(5)
        held = many.update(many.update(started).completed(5, "ab"))
        released = many.update(many.create(image()).completed(5, "cd"))
        many.release(released.id)
        beside = EtcdMetadataStore(many.etcd, many._layout.prefix, many.member, many.membership)
        assert list(beside.held()) == [(held.id,)]
        with monkeypatch.context() as patch:
            patch.setattr(many.etcd, "range", None)
            assert list(many.held()) == [[held.id]]
        for each in (held, released):
            many.delete(each.id)

    def test_compaction_between_pages(self, many: OwnedEtcdStore, etcd: EtcdCluster) -> None:
        """A survey goes on when etcd drops the revision that it was reading; what exists throughout is in it once."""
        pages = many.survey()
        first = next(pages)
        added, doomed = many.create(image()), first[0].image
        many.delete(doomed.id)
        etcd.call("/v3/kv/compaction", {"revision": many.etcd.range("x").revision})
        ids = [each.image.id for page in itertools.chain([first], pages) for each in page]
        assert len(ids) == len(set(ids))
        assert len(set(ids) - {added.id}) == MANY
        many.delete(added.id)
        many.create(doomed)


class TestLostAnswers:
    @pytest.fixture
    def proxy(self, etcd: EtcdCluster) -> Iterator[LossyProxy]:
        with closing(LossyProxy(etcd.endpoints[0])) as proxy:
            yield proxy

    @pytest.fixture
    def unlucky(self, etcd: EtcdCluster, etcd_prefix: str, proxy: LossyProxy) -> Iterator[OwnedEtcdStore]:
        """A store whose first endpoint will lose answers, and whose second does not."""
        connection = Etcd([proxy.url, *etcd.endpoints], attempt_timeout=0.5)
        with closing(OwnedEtcdStore(connection, etcd_prefix, new_member())) as store:
            store.ping()
            store.membership.lease()
            yield store

    def test_create(self, unlucky: OwnedEtcdStore, proxy: LossyProxy) -> None:
        """A create that was carried out, and whose answer was lost, succeeds."""
        proxy.lose_answers()
        created = unlucky.create(image(SOURCE))
        assert listed(unlucky) == [created] == [unlucky.get_by_source(SOURCE)]

    def test_update(self, unlucky: OwnedEtcdStore, proxy: LossyProxy) -> None:
        """So does an update, and the next one goes on from it."""
        created = unlucky.create(image(SOURCE))
        proxy.lose_answers()
        current = unlucky.update(created.started(5))
        assert current == unlucky.get(created.id)
        unlucky.update(current.completed(5, "ab"))

    def test_losing_the_last_copy(self, unlucky: OwnedEtcdStore, proxy: LossyProxy) -> None:
        """So does the record of an image that is lost."""
        held = unlucky.update(unlucky.create(image(SOURCE)).completed(5, "ab"))
        proxy.lose_answers()
        assert unlucky.lose_copy(held.failed("it rotted"), lambda: True)
        assert unlucky.get(held.id).status is Status.ERROR

    def test_delete(self, unlucky: OwnedEtcdStore, proxy: LossyProxy, raw: Raw) -> None:
        """So does the transaction of a delete, and knows what it deleted; a later delete finds nothing."""
        created = unlucky.create(image(SOURCE))
        found = unlucky._find(created.id)
        proxy.lose_answers()
        assert set(unlucky._delete(created, found)) == set(found.parts.values())
        assert raw.all() == {}
        with pytest.raises(NotFound):
            unlucky.delete(created.id)


class TestLateRequests:
    """A request that got no answer is sent again, to another member; the first may still arrive, much later."""

    @pytest.fixture
    def proxy(self, etcd: EtcdCluster) -> Iterator[LossyProxy]:
        with closing(LossyProxy(etcd.endpoints[0])) as proxy:
            yield proxy

    @pytest.mark.parametrize("words", [b"/image-sources/", b'"expected_size"'])
    def test_create(self, etcd: EtcdCluster, etcd_prefix: str, proxy: LossyProxy, words: bytes) -> None:
        """A create that arrives when its image has been deleted does not bring it back, whichever step of it is late."""
        connection = Etcd([proxy.url, *etcd.endpoints], attempt_timeout=0.5)
        with closing(OwnedEtcdStore(connection, etcd_prefix, new_member())) as store:
            store.ping()
            proxy.delay(words)
            created = store.create(image(SOURCE))
            store.delete(created.id)
            proxy.deliver()
            self.assert_stays_gone(store, created.id)

    @pytest.mark.parametrize("words", [b"/image-sources/", b'"expected_size"'])
    def test_an_abandoned_create(self, etcd: EtcdCluster, etcd_prefix: str, proxy: LossyProxy, words: bytes) -> None:
        """The same of one that nobody answered, and whose image was then deleted although it was not there."""
        member, abandoned = new_member(), image(SOURCE)
        connection = Etcd([proxy.url], timeout=1, attempt_timeout=0.5)
        with closing(OwnedEtcdStore(connection, etcd_prefix, member)) as cut_off:
            cut_off.ping()
            proxy.delay(words)
            with pytest.raises(Unavailable):
                cut_off.create(abandoned)
            with closing(open_store(etcd.endpoints, etcd_prefix, member)) as store:
                with pytest.raises(NotFound):
                    store.delete(abandoned.id)
                proxy.deliver()
                self.assert_stays_gone(store, abandoned.id)

    @staticmethod
    def assert_stays_gone(store: OwnedEtcdStore, image_id: str) -> None:
        time.sleep(0.5)
        assert listed(store) == []
        with pytest.raises(NotFound):
            store.get(image_id)
        with pytest.raises(NotFound):
            store.get_by_source(SOURCE)
        assert store.create(image(SOURCE)).source == SOURCE


class TestFull:
    def test_deleting_from_a_full_cluster(self) -> None:
        """When etcd takes no more, writes raise NoSpace, reads go on, and images can be deleted with their claim."""
        with ExitStack() as stack:
            cluster = stack.enter_context(closing(EtcdCluster(flags=[QUOTA])))
            store = stack.enter_context(closing(open_store(cluster.endpoints, "/full")))
            raw = stack.enter_context(closing(Raw(cluster.endpoints[0], "/full")))
            created = store.create(image(SOURCE))
            held = store.update(store.create(image()).completed(1, "ab"))
            raw.put(f"/images/{held.id}/replicas/other", "{}")
            cluster.fill()
            with pytest.raises(NoSpace):
                store.create(image())
            with pytest.raises(NoSpace):
                store.update(created.started(5))
            assert not store.lose_copy(held.failed("it rotted"), lambda: True)
            assert store.get(held.id).replicas == ("other",)
            raw.delete(f"/images/{held.id}/replicas/other")
            with pytest.raises(NoSpace):
                store.lose_copy(held.failed("it rotted"), lambda: True)
            store.delete(held.id)
            assert listed(store) == [created]
            assert store.delete(created.id) == created
            assert raw.all() == {}
