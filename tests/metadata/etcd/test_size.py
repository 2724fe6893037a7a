"""Twenty thousand images in etcd, and an etcd that takes no more."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import pytest

from imgsvc.errors import NoSpace
from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import Layout
from imgsvc.etcd_messages import Page, put
from imgsvc.metadata.etcd import EtcdMetadataStore
from imgsvc.metadata.image import Image, ImageType, Status, new_id
from tests.etcd_cluster import QUOTA, EtcdCluster
from tests.metadata.etcd.helpers import SOURCE, Raw
from tests.metadata.etcd_store import OwnedEtcdStore, open_store
from tests.metadata.helpers import image, listed

MANY = 20_000


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

    def test_a_cluster_that_gets_room_meanwhile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Just then another member fetches from the same source anew: its claim stays."""
        with ExitStack() as stack:
            cluster = stack.enter_context(closing(EtcdCluster(flags=[QUOTA])))
            store, other = (stack.enter_context(closing(open_store(cluster.endpoints, "/full"))) for _ in range(2))
            doomed = store.create(image(SOURCE))
            other.ping()
            cluster.fill()
            newer: list[Image] = []
            read = store.etcd.range

            def read_long_ago(key: str, *args: Any, **kwargs: Any) -> Page:
                page = read(key, *args, **kwargs)
                if key == Layout("/full").source(SOURCE):
                    cluster.make_room()
                    newer.append(other.create(image(SOURCE)))
                return page

            monkeypatch.setattr(store.etcd, "range", read_long_ago)
            store.delete(doomed.id)
            assert [other.get_by_source(SOURCE)] == newer
