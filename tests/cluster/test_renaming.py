"""A member that gets another id keeps all that it holds, and never takes what another one holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypeVar

import pytest

from imgsvc import etcd_scan
from imgsvc.cluster.renaming import Renaming
from imgsvc.errors import ConfigError, Unavailable
from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import REPLICAS, Layout, end_of
from imgsvc.etcd_messages import KeyValue
from imgsvc.etcd_messages import put as put_key
from imgsvc.images.filesystem import FilesystemImageStore
from imgsvc.images.store import ImageStore
from imgsvc.metadata.image import new_id
from tests.etcd_cluster import EtcdCluster
from tests.images.helpers import put

T = TypeVar("T")


class Killed(BaseException):
    pass


class Directories:
    """Directories of images, and what etcd has of them. A directory that is opened anew is closed before."""

    def __init__(self, etcd: Etcd, prefix: str, place: Path) -> None:
        self.etcd = etcd
        self.layout = Layout(prefix)
        self._place = place
        self._open: dict[str, FilesystemImageStore] = {}

    def open(self, name: str) -> FilesystemImageStore:
        if name in self._open:
            self._open[name].close()
        self._open[name] = FilesystemImageStore(self._place / name)
        return self._open[name]

    def start(self, name: str, member: str) -> FilesystemImageStore:
        """As a service does, which then marks the directory."""
        images = self.open(name)
        self.settle(images, member)
        if images.fresh:
            images.mark("these")
        return images

    def settle(self, images: ImageStore, member: str) -> None:
        Renaming(self.etcd, self.layout.prefix, images, member or images.member).settle()

    def hold(self, images: ImageStore, count: int = 1) -> list[str]:
        """New images, on record."""
        new = [new_id() for _ in range(count)]
        for image_id in new:
            put(images, image_id, b"content")
            self.etcd.transact([], [put_key(self.layout.replica(image_id, images.member), f'"{image_id}"')])
        return new

    def holders(self) -> dict[str, set[str]]:
        """Ids of members by image."""
        found: dict[str, set[str]] = {}
        for item in self.etcd.range(self.layout.images, end_of(self.layout.images)).items:
            image_id, rest = self.layout.split(item.key)
            kind, _, member = rest.partition("/")
            assert kind == REPLICAS
            assert item.text == f'"{image_id}"'
            found.setdefault(image_id, set()).add(member)
        return found

    def homes(self) -> Sequence[KeyValue]:
        return self.etcd.range(self.layout.homes, end_of(self.layout.homes)).items

    def close(self) -> None:
        for images in self._open.values():
            images.close()


@pytest.fixture
def directories(etcd: EtcdCluster, etcd_prefix: str, tmp_path: Path) -> Iterator[Directories]:
    with ExitStack() as opened:
        connection = opened.enter_context(closing(Etcd(etcd.endpoints)))
        yield opened.enter_context(closing(Directories(connection, etcd_prefix, tmp_path)))


def test_a_name_for_a_new_directory(directories: Directories) -> None:
    """It is the marker's from the beginning, and stays when the setting goes."""
    assert directories.start("one", "a").member == "a"
    assert directories.start("one", "").member == "a"


def test_a_name_for_an_old_one(directories: Directories) -> None:
    """All that it holds is on record under the new id, nothing under the old one, and the others' notes stay."""
    one, other = directories.start("one", ""), directories.start("other", "")
    mine, others = directories.hold(one, 30), directories.hold(other, 3)
    home, other_id = one.home, other.member
    one = directories.start("one", "a")
    assert directories.holders() == {i: {"a"} for i in mine} | {i: {other_id} for i in others}
    assert directories.start("one", "b").member == "b"
    assert directories.open("one").home == home
    assert directories.holders() == {i: {"b"} for i in mine} | {i: {other_id} for i in others}


def test_more_than_a_page(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much etcd has."""
    monkeypatch.setattr(etcd_scan, "_PAGE", 5)
    one = directories.start("one", "a")
    held = directories.hold(one, 23)
    directories.start("one", "b")
    assert directories.holders() == {image_id: {"b"} for image_id in held}


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("step", range(6))
def test_killed_in_between(directories: Directories, monkeypatch: pytest.MonkeyPatch, step: int, name: str) -> None:
    """Each image is on record under one of the two at least, and the next start goes on, or back."""
    one = directories.start("one", "a")
    held = directories.hold(one, 3)
    steps = itertools.count()

    def mortal(write: Callable[..., T]) -> Callable[..., T]:
        def dying(*arguments: object, **options: object) -> T:
            if next(steps) == step:
                raise Killed
            return write(*arguments, **options)

        return dying

    with monkeypatch.context() as patched:
        patched.setattr(directories.etcd, "transact", mortal(directories.etcd.transact))
        patched.setattr(one, "rename", mortal(one.rename))
        with pytest.raises(Killed):
            directories.settle(one, "b")
    assert {image_id for image_id, holders in directories.holders().items() if holders <= {"a", "b"}} == set(held)
    assert directories.start("one", name).member == name
    assert directories.holders() == {image_id: {name} for image_id in held}
    assert [item.key for item in directories.homes()] == [directories.layout.homes + name]


def test_the_name_of_another_directory(directories: Directories) -> None:
    """Whether that one runs or not: its images are not here, and must not be taken for lost."""
    one, other = directories.start("one", "a"), directories.start("other", "")
    (image_id,), mine = directories.hold(one), directories.hold(other)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"a is that of another directory.* {image_id}\)"):
            directories.settle(other, "a")
    assert other.member != "a"
    assert directories.holders() == {image_id: {"a"}, mine[0]: {other.member}}
    directories.start("one", "a")


def test_two_that_take_turns(directories: Directories) -> None:
    """Of two directories with one id, the one whose images are on record has it, however it came to that."""
    directories.start("one", "a")
    other = directories.start("other", "a")
    directories.hold(other)
    with pytest.raises(ConfigError, match="another directory"):
        directories.start("one", "a")
    directories.start("other", "a")


def test_an_image_that_is_lost(directories: Directories) -> None:
    """A file that is missing keeps no member from starting under its own id."""
    one = directories.start("one", "a")
    (image_id,) = directories.hold(one)
    one.delete(image_id)
    assert directories.start("one", "a").member == "a"


def test_a_marker_made_by_hand(directories: Directories, tmp_path: Path) -> None:
    """An empty directory takes the place of one that is lost, when a person says so."""
    one = directories.start("one", "a")
    (image_id,) = directories.hold(one)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".imgsvc").write_text('{"member": "a", "records": ""}')
    assert directories.start("new", "a").member == "a"
    assert directories.holders() == {image_id: {"a"}}
    assert [item.text for item in directories.homes()] == ["a"]


def test_a_directory_from_before(directories: Directories, tmp_path: Path) -> None:
    """Of the first markers: it is known by the id that it had then."""
    one = directories.start("one", "")
    (image_id,) = directories.hold(one)
    marker = tmp_path / "one" / ".imgsvc"
    marker.write_text(f'{{"member": "{one.member}", "records": "these"}}')
    assert directories.start("one", "a").home == one.home
    assert directories.holders() == {image_id: {"a"}}


def test_the_old_name_is_live(directories: Directories) -> None:
    """As that of the directory of which this one is a copy: what that one holds stays its own."""
    one = directories.start("one", "a")
    (image_id,) = directories.hold(one)
    lease = directories.etcd.grant(60)
    directories.etcd.transact([], [put_key(directories.layout.member("a"), "{}", lease)])
    with pytest.raises(Unavailable, match="that of member a, which seems to be live"):
        directories.settle(one, "b")
    directories.etcd.revoke(lease)
    directories.settle(one, "b")
    assert directories.holders() == {image_id: {"b"}}


def test_what_it_carries(directories: Directories) -> None:
    """Others are told of it by the name that it has now; what others carry, or nobody understands, stays."""
    directories.start("one", "a")
    notes = {
        new_id(): '{"member": "a", "url": "http://a.example", "until": 5.0}',
        new_id(): '{"member": "c", "url": "http://c.example", "until": 6.0}',
        new_id(): "[",
    }
    for image_id, note in notes.items():
        directories.etcd.transact([], [put_key(directories.layout.carrier(image_id), note)])
    directories.start("one", "b")
    found = [directories.etcd.range(directories.layout.carrier(image_id)).items[0].text for image_id in notes]
    assert found == [note.replace('"a"', '"b"') for note in notes.values()]
