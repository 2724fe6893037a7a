"""An answer of etcd that gets lost does no harm, nor does a request that arrives much later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from imgsvc.errors import NotFound, SourceTaken, Unavailable
from imgsvc.etcd import Etcd
from imgsvc.metadata.image import Status
from tests.etcd_cluster import EtcdCluster
from tests.lossy_proxy import LossyProxy
from tests.metadata.etcd.helpers import SOURCE, Raw
from tests.metadata.etcd_store import OwnedEtcdStore, new_member, open_store
from tests.metadata.helpers import image, listed
from tests.rooms import wait_until


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

    def test_create_and_a_deletion(
        self, unlucky: OwnedEtcdStore, other: OwnedEtcdStore, proxy: LossyProxy, raw: Raw
    ) -> None:
        """What was carried out, seen and deleted by others before it is asked for again, is not done twice."""
        unlucky.etcd._attempt_timeout = 1.5  # which others have for it
        proxy.lose_answers(b'"expected_size"')
        with ThreadPoolExecutor(1) as pool:
            creating = pool.submit(unlucky.create, image(SOURCE))
            wait_until(lambda: bool(listed(other)))
            deleted = other.delete(listed(other)[0].id)
            with pytest.raises(Unavailable, match=f"{deleted.id} may have been created, and deleted since"):
                creating.result()
        assert raw.all() == {}

    def test_create_of_a_source_that_others_take(
        self, unlucky: OwnedEtcdStore, other: OwnedEtcdStore, proxy: LossyProxy, raw: Raw
    ) -> None:
        """Of one whose source was taken before its first step was asked for again, nothing is left."""
        unlucky.etcd._attempt_timeout = 1.5
        proxy.lose_answers(b"/image-sources/")
        with ThreadPoolExecutor(1) as pool:
            creating = pool.submit(unlucky.create, image(SOURCE))
            wait_until(lambda: any(key.endswith("/owner") for key in raw.all()))
            taken = other.create(image(SOURCE))
            with pytest.raises(SourceTaken) as caught:
                creating.result()
        assert caught.value.image == taken
        assert {key.split("/")[2] for key in raw.all() if key.startswith("/images/")} == {taken.id}

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
