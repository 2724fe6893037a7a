"""Fetches outlive their source's bad moments and the service's own: the real program, killed, stopped and started."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

from tests.etcd_cluster import free_port
from tests.harness import Service, wait_for
from tests.service.conftest import Settings, StartService
from tests.source import Exchange, Resource, Source

MIB = 1 << 20
BODY = random.Random(3).randbytes(6 * MIB + 321)
ETAG = '"one"'
# Takes longer to be hashed than anybody has to wait for it; there is nothing in it.
LARGE = 64 << 30
GOOD = Resource(BODY, etag=ETAG)
LONG = {"Retry-After": "600"}


@pytest.fixture
def patient(start_service: StartService) -> Service:
    return start_service(fetch_retries=3, fetch_stall_timeout=1)


def fetched(service: Service, url: str, timeout: float = 20.0) -> dict[str, Any]:
    return service.wait_status(service.fetch(url)["id"], "complete", "error", timeout=timeout)


def assert_whole(service: Service, image: dict[str, Any], body: bytes = BODY) -> None:
    image = service.wait_status(image["id"], "complete", "error", timeout=30.0)
    assert (image["status"], image["error"]) == ("complete", "")
    assert (image["size"], image["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert service.download(image["id"]).body == body
    assert service.incoming() == set()


def in_vain(service: Service, image: dict[str, Any]) -> None:
    """Until its source broke off and it waits to be asked again."""
    wait_for(lambda: service.events("source broke off", image=image["id"]), 10, "the source broke off")


class TestRetries:
    def test_broken_off_more_often_than_it_may_in_vain(self, patient: Service, source: Source) -> None:
        """Each time there was some progress; no byte is sent twice, but for what was on its way."""

        def answer(exchange: Exchange) -> Resource:
            return Resource(BODY, etag=ETAG, cut_after=5 * MIB // 4).answer_to(exchange)

        image = fetched(patient, source.serve("/image", answer), timeout=30.0)
        assert_whole(patient, image)
        firsts = [exchange.first for exchange in source.exchanges]
        assert firsts == sorted(firsts)
        assert len(firsts) >= 5

    def test_stalls(self, patient: Service, source: Source) -> None:
        """A source that hangs is asked again for what is missing."""
        url = source.serve(
            "/image",
            lambda asked: Resource(BODY, etag=ETAG, stall_after=None if asked.number else MIB).answer_to(asked),
        )
        assert_whole(patient, fetched(patient, url))
        assert [exchange.first for exchange in source.exchanges] == [0, MIB]

    def test_busy(self, patient: Service, source: Source) -> None:
        """503 twice, and the moment that it names is waited for."""

        def answer(exchange: Exchange) -> Resource:
            return (
                GOOD
                if exchange.number == 2
                else Resource(status=503, headers={"Retry-After": "2"} if exchange.number else {})
            )

        assert_whole(patient, fetched(patient, source.serve("/image", answer)))
        first, second, third = (exchange.began for exchange in source.exchanges)
        assert 0.2 < second - first < 1.9
        assert 2.0 <= third - second < 4.0

    @pytest.mark.parametrize("killed", [False, True])
    def test_caught_lying(self, patient: Service, source: Source, *, killed: bool) -> None:
        """A part with a byte too many is not believed: nobody goes on behind it, although the source breaks off, or the
        service is killed, before the whole has come."""
        lie = bytes(len(BODY) - 2 * MIB + 1)

        def answer(exchange: Exchange) -> Resource:
            match exchange.number:
                case 0:
                    return Resource(BODY, etag=ETAG, cut_after=2 * MIB)
                case 1:
                    part = GOOD.answer_to(exchange)
                    assert exchange.first == 2 * MIB
                    return replace(part, body=lie, chunked=True, rate=3.0 * MIB)
                case 2:
                    return Resource(hold=True) if killed else Resource(garbage=b"")
            return GOOD.answer_to(exchange)

        image = patient.fetch(source.serve("/image", answer))
        source.wait_asked("/image", count=3)
        if killed:
            patient.kill()
            patient.start()
        assert_whole(patient, image)
        assert [exchange.range for exchange in source.exchanges[2:]] == [None, None]

    def test_not_there_yet(self, patient: Service) -> None:
        """A server that is down for a moment is waited for."""
        port = free_port()
        image = patient.fetch(f"http://127.0.0.1:{port}/image")
        in_vain(patient, image)
        with Source(port) as source:
            source.serve("/image", GOOD)
            assert_whole(patient, image)

    @pytest.mark.parametrize("kind", ["refused", "unknown", "503", "from zero"])
    def test_in_vain(self, start_service: StartService, source: Source, kind: str) -> None:
        """Who breaks off again and again and brings nothing new is given up, and the error says so."""
        service = start_service(fetch_retries=2)
        port = free_port()
        urls: dict[str, str] = {
            "refused": f"http://127.0.0.1:{port}/image",
            "unknown": "http://imgsvc-test.invalid/image",
            "503": source.serve("/503", Resource(status=503)),
            "from zero": source.serve("/zero", Resource(BODY, cut_after=MIB)),
        }
        image = fetched(service, urls[kind])
        assert image["status"] == "error"
        assert image["error"].endswith("; 2 retries brought no further byte")
        assert image["size"] == 0
        wait_for(lambda: service.incoming() == set(), 2, "nothing is left")
        assert len(service.events("source broke off")) == 2
        # And anew, when somebody asks.
        if kind == "from zero":
            again = service.fetch(source.serve("/zero", BODY))
            assert again["id"] == image["id"]
            assert_whole(service, again)

    def test_final(self, patient: Service, source: Source) -> None:
        """404 is not asked about again; nor is a wrong digest, after whatever it took to find out."""
        assert "404" in fetched(patient, source.serve("/gone", Resource(status=404)))["error"]
        url = source.serve(
            "/image", lambda asked: Resource(BODY, etag=ETAG, cut_after=None if asked.number else MIB).answer_to(asked)
        )
        answer = patient.post({"source": url, "type": "kvm", "sha256": "0" * 64})
        image = patient.wait_status(answer.json()["id"], "complete", "error")
        assert "SHA-256" in image["error"]
        assert [exchange.first for exchange in source.asked("/image")] == [0, MIB]
        assert len(source.asked("/gone")) == 1
        wait_for(lambda: patient.incoming() == set(), 2, "nothing is left")


class TestBackOff:
    @pytest.fixture
    def one_thread(self, start_service: StartService) -> Service:
        return start_service(fetch_concurrency=1, fetch_retries=3, shutdown_timeout=20)

    def waiting(self, service: Service, source: Source) -> dict[str, Any]:
        """One with some bytes, whose source wants to be left alone for ten minutes."""

        def answer(exchange: Exchange) -> Resource:
            if exchange.number:
                return Resource(status=503, headers=LONG)
            return Resource(BODY, etag=ETAG, cut_after=MIB)

        image = service.fetch(source.serve("/waiting", answer))
        wait_for(lambda: len(service.events("source broke off", image=image["id"])) == 2, 10, "it waits")
        return image

    def test_others_go_on(self, one_thread: Service, source: Source) -> None:
        """It does not take up a thread, and keeps no file open."""
        image = self.waiting(one_thread, source)
        wait_for(lambda: not any("/.incoming/" in name for name in one_thread.census().files), 2, "the file is closed")
        assert fetched(one_thread, source.serve("/other", b"other"))["status"] == "complete"
        assert one_thread.image(image["id"])["status"] == "downloading"

    @pytest.mark.parametrize("busy", [False, True])
    def test_deleted(self, one_thread: Service, source: Source, *, busy: bool) -> None:
        """It is gone within two seconds with all that there was of it, also when every thread has something to do."""
        image = self.waiting(one_thread, source)
        assert one_thread.incoming() == {image["id"], f"{image['id']}.notes"}
        others: set[str] = set()
        if busy:
            others = {one_thread.fetch(source.serve("/busy", Resource(BODY, stall_after=MIB)))["id"]}
            source.wait_asked("/busy")
        assert one_thread.delete(image["id"]).status == 200
        wait_for(lambda: one_thread.incoming() == others, 2, "nothing is left of it")
        assert one_thread.image_files() == [str(one_thread.images_dir / ".incoming" / each) for each in others]

    @pytest.mark.parametrize("kill", [False, True])
    def test_stopped(self, one_thread: Service, source: Source, *, kill: bool) -> None:
        """The end does not wait for it, and the next start goes on where it was, and does not wait at all."""
        image = self.waiting(one_thread, source)
        began = time.monotonic()
        if kill:
            one_thread.kill()
        else:
            assert one_thread.terminate() == 0
        assert time.monotonic() - began < 2.0
        source.serve("/waiting", GOOD)
        one_thread.start()
        assert_whole(one_thread, image)
        assert source.exchanges[-1].first == MIB


Damage = Callable[[Path, Path], object]


def _damages() -> list[ParameterSet]:
    """What may have become of the bytes and of the notes while the service was down."""
    quick: dict[str, Damage] = {
        "last bits": lambda partial, _: flip(partial, 3 * MIB),
        "shorter": lambda partial, _: partial.write_bytes(partial.read_bytes()[: MIB + 5]),
        "cut notes": lambda _, notes: notes.write_bytes(notes.read_bytes()[:-7]),
        "another scheme": lambda _, notes: notes.write_bytes(notes.read_bytes().replace(b"http:", b"htt0:")),
    }
    more: dict[str, Damage] = {
        "first bit": lambda partial, _: flip(partial, 0),
        "empty": lambda partial, _: partial.write_bytes(b""),
        "longer": lambda partial, _: partial.write_bytes(partial.read_bytes() + b"more"),
        "no notes": lambda _, notes: notes.unlink(),
        "empty notes": lambda _, notes: notes.write_bytes(b""),
        "notes cut in front": lambda _, notes: notes.write_bytes(notes.read_bytes()[30:]),
        "garbage": lambda _, notes: notes.write_bytes(bytes(range(256)) * 40),
        "another place": lambda _, notes: notes.write_bytes(notes.read_bytes().replace(b"/image", b"/imagf")),
        "another ETag": lambda _, notes: notes.write_bytes(notes.read_bytes().replace(b"one", b"onf")),
    }
    slow = [pytest.param(damage, id=name, marks=pytest.mark.release) for name, damage in more.items()]
    return [pytest.param(damage, id=name) for name, damage in quick.items()] + slow


class TestRestarts:
    def test_killed_on_several_connections(self, start_service: StartService, source: Source) -> None:
        """What came in order goes on; pieces that were ahead of it are fetched again, and nothing is out of place."""
        body = random.Random(4).randbytes(40 * MIB + 321)
        url = source.serve("/image", Resource(body, etag=ETAG, rate=4 * MIB))
        service = start_service(fetch_split_size=MIB, fetch_connections=4)
        image = service.fetch(url)
        wait_for(lambda: service.image(image["id"])["size"] > 8 * MIB, 20, "several connections have brought bytes")
        assert len(source.exchanges) > 4
        service.kill()
        source.exchanges.clear()
        service.start()
        assert_whole(service, image, body)
        assert source.exchanges[0].first > 0
        assert len(source.exchanges) > 2

    def test_killed_again_and_again(self, start_service: StartService, source: Source, seed: int) -> None:
        """At whatever moment: it goes on, if it had come so far as a checkpoint, and ends with the right bytes."""
        moments = random.Random(seed)
        body = moments.randbytes(24 * MIB)
        service = start_service(fetch_connections=1)
        image = service.fetch(source.serve("/image", Resource(body, etag=ETAG, rate=3.0 * MIB)))
        # Two are long enough for a checkpoint, which is made once a second.
        for life in moments.sample([moments.uniform(0.0, 1.0) for _ in range(3)] + [1.8, 2.2], 5):
            time.sleep(life)
            service.kill()
            service.start()
        source.serve("/image", Resource(body, etag=ETAG))
        service.kill()
        service.start()
        assert_whole(service, image, body)
        assert any(exchange.first for exchange in source.exchanges)

    def test_stopped(self, start_service: StartService, source: Source) -> None:
        """What came before an orderly end is not asked for again, over one connection or several."""
        service = start_service(fetch_split_size=MIB, fetch_stall_timeout=60)
        image = service.fetch(source.serve("/image", Resource(BODY, etag=ETAG, stall_after=2 * MIB)))
        wait_for(lambda: service.image(image["id"])["size"] == 2 * MIB, 10, "all that came is there")
        assert service.terminate() == 0
        source.serve("/image", GOOD)
        service.start()
        assert_whole(service, image)
        assert source.exchanges[-1].first == 2 * MIB or source.exchanges[-2].first == 2 * MIB

    @pytest.mark.parametrize("records", ["etcd"], indirect=True)
    def test_its_own_host_goes_on(self, start_service: StartService, records: Settings, source: Source) -> None:
        """With shared records too, and while others look on."""
        service = start_service(**records)
        start_service(**records)
        image = stopped_halfway(service, source)
        service.start()
        assert_whole(service, image)
        assert source.exchanges[-1].first > 0

    @pytest.mark.parametrize("damage", _damages())
    def test_damaged_meanwhile(self, start_service: StartService, source: Source, damage: Damage) -> None:
        """Nothing that is there is believed: what comes of it has the right digest."""
        service = start_service()
        image = stopped_halfway(service, source)
        partial = service.images_dir / ".incoming" / image["id"]
        damage(partial, partial.with_name(f"{partial.name}.notes"))
        service.start()
        assert_whole(service, image)

    @pytest.mark.parametrize("deleted", [True, False])
    def test_while_it_is_hashed_again(self, start_service: StartService, source: Source, *, deleted: bool) -> None:
        """What is there may be much: who is told to stop meanwhile does so within two seconds."""
        service = start_service(shutdown_timeout=20)
        image = stopped_halfway(service, source)
        partial = service.images_dir / ".incoming" / image["id"]
        notes = partial.with_name(f"{partial.name}.notes")
        last = json.loads(notes.read_text().splitlines()[-1])
        with notes.open("a") as file:
            file.write(json.dumps(last | {"size": LARGE}) + "\n")
        os.truncate(partial, LARGE)
        service.start()
        time.sleep(0.5)
        assert len(source.exchanges) == 1
        assert service.image(image["id"])["status"] == "pending"
        began = time.monotonic()
        if deleted:
            service.delete(image["id"])
            wait_for(lambda: service.incoming() == set(), 2, "nothing is left of it")
        else:
            service.terminate()
            assert time.monotonic() - began < 2.0
            os.truncate(partial, 5 * MIB)
            service.start()
            assert_whole(service, image)


def stopped_halfway(service: Service, source: Source) -> dict[str, Any]:
    """Its service is down, and the source would be ready to go on."""
    image = service.fetch(source.serve("/image", Resource(BODY, etag=ETAG, stall_after=4 * MIB)))
    wait_for(lambda: service.image(image["id"])["size"] == 4 * MIB, 10, "all that came is there")
    service.terminate()
    source.serve("/image", GOOD)
    return image


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


class TestLimits:
    @pytest.mark.parametrize("connections", [1, 4])
    def test_bytes_a_second(self, start_service: StartService, source: Source, connections: int) -> None:
        """Two fetches together take no more, over however many connections; and not much less."""
        service = start_service(fetch_max_bytes_per_second=4 * MIB, fetch_connections=connections, fetch_split_size=MIB)
        began = time.monotonic()
        images = [service.fetch(source.serve(f"/{name}", GOOD)) for name in ("one", "two")]
        for image in images:
            service.wait_status(image["id"], "complete", timeout=30)
        assert 2.7 < time.monotonic() - began < 8.0
