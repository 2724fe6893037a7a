"""Taking over from the Go program: its config.json, its directory of images and its records work as they are."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sqlite3
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.etcd_cluster import EtcdCluster
from tests.harness import Service, wait_for
from tests.source import Resource, Source

MIB = 1 << 20
TABLE = "mistify-images"
CONSOLE_SCRIPT = Path(sys.executable).parent / "mistify-image-service"
ZERO_TIME = "0001-01-01T00:00:00Z"


class Leftovers:
    """What the Go program left in a directory: `config.json`, `images/` and, by the store that it used, records."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        self.images.mkdir()
        self.images.chmod(0o755)

    def configure(self, store_type: str, store_config: dict[str, Any]) -> None:
        config = {
            "imageStoreType": "fs",
            "imageStoreConfig": {"dir": str(self.images)},
            "metadataStoreType": store_type,
            "metadataStoreConfig": store_config,
        }
        (self.directory / "config.json").write_text(json.dumps(config, indent=4))

    def put(self, image_id: str, document: bytes) -> None:
        """Stores a record as the Go program did."""
        raise NotImplementedError

    def add(self, content: bytes | None, **changes: object) -> dict[str, Any]:
        """An image with this file, or none, and a complete record, but for the changes; returns the record."""
        image_id = str(uuid.uuid4())
        if content is not None:
            file = self.images / image_id
            file.write_bytes(content)
            file.chmod(0o755)
        size = len(content or b"")
        document = {
            "id": image_id,
            "source": "",
            "type": "kvm",
            "comment": "",
            "status": "complete",
            "size": size,
            "expected_size": size,
            "download_start": "2015-03-02T17:04:35.123456789-05:00",
            "download_end": "2015-03-02T17:04:36.5-05:00",
        } | changes
        self.put(image_id, json.dumps(document).encode())
        return document


class KviteLeftovers(Leftovers):
    """The records are in a file made by the statements of mistifyio/kvite, run by SQLite itself."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.filename = directory / "mistify.db"
        self.configure("kvite", {"filename": str(self.filename), "table": TABLE})
        self.execute(
            f"create TABLE IF NOT EXISTS '{TABLE}' (key text not null, bucket text not null, value blob not null)"
        )
        self.execute(f"create UNIQUE INDEX IF NOT EXISTS '{TABLE}_kvite_key_index' ON '{TABLE}' (key, bucket)")

    def put(self, image_id: str, document: bytes) -> None:
        self.execute(
            f"INSERT OR REPLACE INTO '{TABLE}' (key, value, bucket) VALUES (?, ?, ?)", image_id, document, "images"
        )

    def execute(self, statement: str, *parameters: object) -> None:
        with closing(sqlite3.connect(self.filename)) as connection, connection:
            connection.execute(statement, parameters)

    def dump(self) -> list[str]:
        """Everything in the file that is not ours, as SQL."""
        with closing(sqlite3.connect(self.filename)) as connection:
            return [line for line in connection.iterdump() if "imgsvc_" not in line]


class EtcdLeftovers(Leftovers):
    """The records are in etcd v3 as `etcdctl migrate` leaves those of etcd v2: the documents, and nothing else."""

    def __init__(self, directory: Path, etcd: EtcdCluster, prefix: str) -> None:
        super().__init__(directory)
        self.etcd = etcd
        self.prefix = prefix
        self.configure("etcd", {"machines": etcd.endpoints, "prefix": prefix})

    def put(self, image_id: str, document: bytes) -> None:
        key = f"{self.prefix}/images/{image_id}/metadata"
        self.etcd.call("/v3/kv/put", {"key": _base64(key.encode()), "value": _base64(document)})

    def keys(self) -> set[str]:
        """The keys below the prefix, which they are without; members apart."""
        start, end = self.prefix + "/", self.prefix + "0"
        found = self.etcd.call(
            "/v3/kv/range", {"key": _base64(start.encode()), "range_end": _base64(end.encode()), "keys_only": True}
        )
        keys = {base64.b64decode(item["key"]).decode().removeprefix(self.prefix) for item in found.get("kvs", [])}
        return {key for key in keys if not key.startswith(("/image-members/", "/image-homes/", "/image-history/"))}


class Successor(Service):
    """The service in the Go program's place: started by its name, with its flags and its config file."""

    def __init__(self, leftovers: Leftovers) -> None:
        super().__init__(leftovers.directory / "unused")
        self.leftovers = leftovers
        self.command = [
            str(CONSOLE_SCRIPT),
            *("-c", str(leftovers.directory / "config.json")),
            *("-a", "0"),
            *("-l", "info"),
        ]
        # The Go program listened on all addresses; a test does not.
        self.settings = {"host": "127.0.0.1", "shutdown_timeout": 2}

    @property
    def images_dir(self) -> Path:
        return self.leftovers.images


TakeOver = Callable[[Leftovers], Successor]


@pytest.fixture
def take_over() -> Iterator[TakeOver]:
    """Starts the service on what the Go program left."""
    with ExitStack() as running:
        yield lambda leftovers: running.enter_context(Successor(leftovers))


@pytest.fixture
def kvite(tmp_path: Path) -> KviteLeftovers:
    return KviteLeftovers(tmp_path)


@pytest.fixture
def migrated(tmp_path: Path, etcd: EtcdCluster, etcd_prefix: str) -> EtcdLeftovers:
    return EtcdLeftovers(tmp_path, etcd, etcd_prefix)


@pytest.fixture(params=["kvite", "migrated"])
def leftovers(request: pytest.FixtureRequest) -> Leftovers:
    """Once with each kind of record that the Go program kept."""
    leftovers: Leftovers = request.getfixturevalue(request.param)
    return leftovers


def test_complete_images_stay_where_they_are(leftovers: Leftovers, take_over: TakeOver) -> None:
    """Every complete image keeps its record and its bytes, whose file is not even touched, and gets its digest."""
    contents = [b"a guest", os.urandom(3 * MIB + 17), b""]
    documents = [leftovers.add(content, comment="ä 漢", type="container") for content in contents]
    files = [leftovers.images / document["id"] for document in documents]
    before = [file.stat() for file in files]
    service = take_over(leftovers)
    assert {image["id"] for image in service.images()} == {document["id"] for document in documents}
    for document, content in zip(documents, contents, strict=True):
        digest = hashlib.sha256(content).hexdigest()
        wait_for(lambda: service.image(document["id"])["sha256"] == digest, 10, "the digest is there")  # noqa: B023 - called at once
        image = service.image(document["id"])
        assert image.pop("replicas", None) in (None, [service.member])
        assert image == document | {
            "download_start": "2015-03-02T22:04:35.123456Z",
            "download_end": "2015-03-02T22:04:36.5Z",
            "sha256": digest,
            "error": "",
        }
        assert service.download(document["id"]).body == content
    for file, stat in zip(files, before, strict=True):
        now = file.stat()
        assert (now.st_ino, now.st_mtime_ns, now.st_mode) == (stat.st_ino, stat.st_mtime_ns, stat.st_mode)


def test_damaged_images(leftovers: Leftovers, take_over: TakeOver) -> None:
    """An image whose file has not the size of its record is in error, and says so; nobody gets its bytes."""
    short = leftovers.add(b"a part", size=1000, expected_size=1000)
    sound = leftovers.add(b"sound")
    with Successor(leftovers) as service:
        service.expect_errors("image lost here")
        image = service.image(short["id"])
        assert image["status"] == "error"
        assert "6 bytes" in image["error"]
        assert "1000" in image["error"]
        assert service.download(short["id"]).status == (503 if "replicas" in image else 404)
        assert service.download(sound["id"]).body == b"sound"
    with Successor(leftovers) as service:
        assert service.image(short["id"]) == image
        assert service.delete(short["id"]).status == 200
        assert service.stored() == {sound["id"]}


def test_missing_file(kvite: KviteLeftovers, take_over: TakeOver) -> None:
    """A complete record without its file is in error, and says so; with its source it can be fetched anew."""
    with Source() as source:
        lost = kvite.add(None, source=source.serve("/guest", b"a guest"), size=7)
        kvite.add(b"sound")
        service = take_over(kvite)
        service.expect_errors("image lost here")
        image = service.image(lost["id"])
        assert (image["status"], image["error"]) == ("error", "the image was lost: its file is missing")
        assert service.fetch(lost["source"])["id"] == lost["id"]
        service.wait_status(lost["id"], "complete")
        assert service.download(lost["id"]).body == b"a guest"


@pytest.mark.parametrize("partial", [None, b"the first half", b"more bytes than the source has"])
@pytest.mark.parametrize("status", ["pending", "downloading", "error"])
def test_unfinished_images(leftovers: Leftovers, take_over: TakeOver, status: str, partial: bytes | None) -> None:
    """What the Go program did not finish is in error, and says why. A POST of its source fetches it anew, whatever
    the Go program left under the final name; an upload can be deleted."""
    content = b"all of the guest image"
    with Source() as source:
        url = source.serve("/guest", content)
        unfinished = {"status": status, "download_end": ZERO_TIME, "expected_size": len(content)}
        fetch = leftovers.add(partial, source=url, **unfinished)
        upload = leftovers.add(partial, **unfinished)
        service = take_over(leftovers)
        for document in (fetch, upload):
            image = service.image(document["id"])
            assert image["status"] == "error"
            assert "mistify-image-service" in image["error"]
            assert service.download(document["id"]).status == 404
        assert source.asked("/guest") == []
        assert service.fetch(url)["id"] == fetch["id"]
        assert service.wait_status(fetch["id"], "complete", "error")["error"] == ""
        assert service.download(fetch["id"]).body == content
        assert len(source.asked("/guest")) == 1
        assert service.delete(upload["id"]).status == 200
        assert service.stored() == {fetch["id"]}


@pytest.mark.parametrize("status", ["pending", "downloading", "error"])
def test_bytes_of_unfinished_images_stay(leftovers: Leftovers, status: str) -> None:
    """What the Go program left of them may be all of it: it is there after each start, until the image is DELETEd."""
    image_id = leftovers.add(b"perhaps whole", status=status, download_end=ZERO_TIME, expected_size=13)["id"]
    for _ in range(3):
        with Successor(leftovers) as service:
            assert service.image(image_id)["status"] == "error"
            assert (leftovers.images / image_id).read_bytes() == b"perhaps whole"
    with Successor(leftovers) as service:
        assert service.delete(image_id).status == 200
        assert service.stored() == set()


def test_a_known_source_is_not_fetched(leftovers: Leftovers, take_over: TakeOver) -> None:
    """A POST of a source that the Go program has fetched answers with that image; it can be deleted, and then
    fetched as a new one."""
    with Source() as source:
        url = source.serve("/guest", b"a newer guest")
        known = leftovers.add(b"a guest", source=url)
        service = take_over(leftovers)
        assert service.fetch(url)["id"] == known["id"]
        assert service.download(known["id"]).body == b"a guest"
        assert source.asked("/guest") == []
        assert service.delete(known["id"]).status == 200
        assert service.get(f"/images/{known['id']}").status == 404
        new = service.fetch(url)
        assert new["id"] != known["id"]
        service.wait_status(new["id"], "complete")
        assert service.stored() == {new["id"]}


def test_two_images_of_one_source(kvite: KviteLeftovers, take_over: TakeOver) -> None:
    """Parallel requests made the Go program keep two images of one source. Both stay; a POST answers with a whole
    one, and with the other when that is gone."""
    with Source() as source:
        url = source.serve("/guest", Resource(status=500))
        first = kvite.add(None, source=url, status="downloading")
        second = kvite.add(b"a guest", source=url)
        service = take_over(kvite)
        assert {image["id"] for image in service.images()} == {first["id"], second["id"]}
        assert service.fetch(url)["id"] == second["id"]
        assert service.delete(first["id"]).status == 200
        assert service.fetch(url)["id"] == second["id"]
        assert source.asked("/guest") == []


def test_a_record_that_cannot_be_read(kvite: KviteLeftovers, take_over: TakeOver) -> None:
    """It is left out with a warning that names it, and hides no other; its file stays, also after the next start."""
    unreadable, sound = str(uuid.uuid4()), kvite.add(b"sound")
    kvite.put(unreadable, b'{"id": "half a docu')
    (kvite.images / unreadable).write_bytes(b"perhaps somebody wants it")
    for _ in range(2):
        with Successor(kvite) as service:
            service.expect_errors(
                "images without a record are left alone: the directory was not filled with these records"
            )
            assert [image["id"] for image in service.images()] == [sound["id"]]
            assert service.stored() == {sound["id"], unreadable}
            assert service.get(f"/images/{unreadable}").status == 404
            warnings = service.events("kvite record left out", level="warning")
    assert warnings == []
    assert (kvite.images / unreadable).read_bytes() == b"perhaps somebody wants it"


def test_second_start(kvite: KviteLeftovers) -> None:
    """The records are imported once, and the Go program's table stays as it was: what was deleted, added or changed
    since stays so."""
    kept, deleted = kvite.add(b"kept", source="http://source.example/"), kvite.add(b"deleted")
    failed = kvite.add(None, status="downloading")
    before = kvite.dump()
    with Successor(kvite) as service:
        assert [line["imported"] for line in service.events("kvite file imported")] == [3]
        assert service.delete(deleted["id"]).status == 200
        added = service.upload(b"added")
        wait_for(lambda: service.image(kept["id"])["sha256"], 10, "the digest is there")
        images = service.images()
    assert kvite.dump() == before
    with Successor(kvite) as service:
        assert service.events("kvite file imported") == []
        assert service.images() == images
        assert {image["id"] for image in images} == {kept["id"], failed["id"], added["id"]}
        assert service.stored() == {kept["id"], added["id"]}
    assert kvite.dump() == before


def test_without_its_images(leftovers: Leftovers) -> None:
    """Where the directory is empty, as when its file system is not mounted, the start of a kvite user is refused with
    a sentence that names the directory, and leaves no trace in it; hosts that share records may have no image."""
    document = leftovers.add(None, size=5)
    if isinstance(leftovers, KviteLeftovers):
        service = Successor(leftovers)
        service.start(wait=False)
        assert service.wait_exit() == 2
        assert str(leftovers.images) in service.tail()
        assert "mounted" in service.tail()
        assert list(leftovers.images.iterdir()) == []
    else:
        with Successor(leftovers) as service:
            answer = service.download(document["id"])
            service.expect_errors("bytes of a complete image are missing")
            assert (answer.status, "no other is known" in answer.message) == (503, True)


def test_several_hosts(migrated: EtcdLeftovers, take_over: TakeOver, tmp_path: Path) -> None:
    """A host that has an image's file says so in etcd, and claims its source, so that the other hosts know; once it
    is deleted at one of them nothing is left anywhere."""
    document = migrated.add(b"a guest", source="http://source.example/guest")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    here, there = take_over(migrated), take_over(EtcdLeftovers(elsewhere, migrated.etcd, migrated.prefix))
    assert migrated.keys() == {
        f"/images/{document['id']}/metadata",
        f"/images/{document['id']}/replicas/{here.member}",
        f"/image-sources/{hashlib.sha256(document['source'].encode()).hexdigest()}",
        "/image-records",
    }
    assert here.download(document["id"]).body == b"a guest"
    assert there.download(document["id"]).body == b"a guest"
    assert there.fetch(document["source"])["id"] == document["id"]
    assert there.delete(document["id"]).status == 200
    assert migrated.keys() == {"/image-records"}
    wait_for(lambda: here.stored() | there.stored() == set(), 10, "the files are gone")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
