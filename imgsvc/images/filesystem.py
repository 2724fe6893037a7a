"""Images as files in one directory. Nothing outside this module knows where an image's bytes are.

    {directory}/{id}             an image
    {directory}/.incoming/{id}   a claim (an empty file), or an image being written
    {directory}/.incoming/{id}.notes   what its writer noted
    {directory}/.quarantine/{id} an image that was set aside; {id}.2, {id}.3 … are later ones of the same id
    {directory}/.imgsvc          the marker: which member's images these are, and to which records they belong
    {directory}/.imgsvc-scrub    how far the scrub got
    {directory}/.imgsvc-records  how far the records had come, where members share them

Every path is relative to one descriptor of the directory, opened once. So when the file system is unmounted under the
running service, or another is mounted over it, no byte goes astray to what lies beneath; `ping` notices.

Nothing is needed that some file systems lack or do badly: no preallocation (ZFS writes every block of it), no
O_TMPFILE, no extended attributes; O_DIRECT only where it can be had."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Self, get_args

from imgsvc.errors import ConfigError, Conflict, NotFound, Unavailable
from imgsvc.foreign import read_json
from imgsvc.images.counting import Count
from imgsvc.images.directory import Directory, write_all
from imgsvc.images.files import NOTES, FileReader, FileWriter, disk_full, image_size, translated
from imgsvc.images.store import ImageReader, ImageWriter, Space, Topic, require_id
from imgsvc.metadata.image import is_id, new_id
from imgsvc.values import is_name

_INCOMING = ".incoming"
_QUARANTINE = ".quarantine"
_MARKER = ".imgsvc"
_NOTED = ".imgsvc-"
_PROBE = ".imgsvc-probe"
_MARKER_LIMIT = 64 * 1024


class FilesystemImageStore:
    """An ImageStore. Once it is closed, it and the writers still open raise Unavailable; open readers go on."""

    def __init__(self, directory: Path, *, beside: bool = False) -> None:
        """Opens the directory, or makes it in a parent that exists.

        It is made here and not in `mark`, because the lock needs it, and an empty directory does no harm where a file
        system is mounted later. Raises ConfigError, naming the directory, when it cannot be used or another service
        uses it.

        With `beside` the directory may be in use by a service, and must be marked by one: then what looks at images,
        and `quarantine`, may be called, and nothing that brings any in.
        """
        self._path = directory.absolute()
        self._lock = threading.Lock()
        self._probing = threading.Lock()
        self._writing: set[str] = set()
        self._count = Count(self._changed, self.ids)
        with self._required():
            if not self._path.parent.is_dir():
                raise ConfigError(f"image directory {self._path} cannot be made: there is no {self._path.parent}")
            self._directory = Directory(self._path, beside=beside)
            try:
                self._marker = self._read_marker()
                if beside:
                    self._require_known()
                elif self._marker is not None:
                    self._directory.make(_INCOMING)
                    self._drop_stray_notes()
                    self._probe()
            except BaseException:
                self._directory.close()
                raise
        self._member = self._home = new_id()
        if self._marker is not None:
            self._member, self._home = self._marker.member, self._marker.home

    @property
    def member(self) -> str:
        return self._member

    @property
    def home(self) -> str:
        return self._home

    @property
    def place(self) -> str:
        return str(self._path)

    @property
    def fresh(self) -> bool:
        return self._marker is None

    @property
    def marked_for(self) -> str:
        return "" if self._marker is None else self._marker.records

    def mark(self, identity: str) -> None:
        self._mark(_Marker(self._member, identity, self._home))

    def rename(self, member: str) -> None:
        if self._marker is not None:
            self._mark(_Marker(member, self._marker.records, self._home))
        self._member = member

    def claim(self, image_id: str) -> None:
        path = _incoming(image_id)
        self._require_marked()
        with translated(f"claim image {image_id}"):
            os.close(self._directory.open(path, os.O_WRONLY | os.O_CREAT))
            self._directory.sync(_INCOMING)

    def unclaim(self, image_id: str) -> None:
        path = _incoming(image_id)
        self._require_marked()
        with self._lock:
            self._refuse_second_writer(image_id)
        with translated(f"drop image {image_id}"):
            self._directory.remove(path + NOTES)
            self._directory.remove(path)

    def unfinished(self) -> Iterator[str]:
        return iter(()) if self.fresh else self._ids(_INCOMING)

    def writer(self, image_id: str, *, keep: bool = False, followed: bool = False) -> ImageWriter:
        path = _incoming(image_id)
        self._require_marked()
        with self._lock:
            self._refuse_second_writer(image_id)
            self._writing.add(image_id)
        try:
            with translated(f"write image {image_id}"):
                descriptor = self._begin(image_id, path, keep=keep, durably=not followed)
                ended = partial(self._ended, image_id)
                # Followers would have to read from the disk what went past the page cache.
                return FileWriter(self._directory, path, image_id, descriptor, ended, direct=not followed)
        except BaseException:
            self._ended(image_id)
            raise

    def size(self, image_id: str) -> int:
        name = require_id(image_id)
        with translated(f"find image {image_id}"), _found(image_id):
            return image_size(image_id, self._directory.stat(name))

    def open(self, image_id: str) -> ImageReader:
        name = require_id(image_id)
        with translated(f"read image {image_id}"), _found(image_id):
            return FileReader(image_id, self._directory.open(name, os.O_RDONLY))

    def delete(self, image_id: str) -> None:
        # Not synced: the record went first, so what a loss of power brings back is an orphan, which the next start
        # removes.
        name = require_id(image_id)
        self._require_marked()
        with translated(f"delete image {image_id}"):
            self._directory.remove(name)

    def ids(self) -> Iterator[str]:
        return self._ids(".")

    def count(self) -> int:
        return self._count.get()

    def quarantine(self, image_id: str, read: ImageReader | None = None) -> None:
        name = require_id(image_id)
        self._require_marked()
        with translated(f"set image {image_id} aside"), _found(image_id):
            self._directory.make(_QUARANTINE)
            aside = next(path for path in _names_aside(name) if not self._directory.exists(path))
            self._directory.rename(name, aside)
            if isinstance(read, FileReader) and not read.reads(self._directory.stat(aside)):
                self._directory.rename(aside, name)
                raise Conflict(f"image {image_id} has other bytes by now")
            try:
                self._directory.sync(_QUARANTINE)
                self._directory.sync()
            except OSError:
                self._directory.rename(aside, name)
                raise

    def quarantined(self) -> Iterator[str]:
        with translated("list the quarantine"):
            if self._directory.exists(_QUARANTINE):
                for entry in self._directory.entries(_QUARANTINE):
                    image_id, _, number = entry.name.partition(".")
                    if is_id(image_id) and (number.isdecimal() or entry.name == image_id):
                        yield image_id

    def remember(self, topic: Topic, line: str) -> None:
        self._require_marked()
        with translated(f"note how far the {topic} got"):
            self._put(_NOTED + topic, line)

    def remembered(self, topic: Topic) -> str:
        if self.fresh:
            return ""
        with translated(f"look how far the {topic} got"):
            try:
                descriptor = self._directory.open(_NOTED + topic, os.O_RDONLY)
            except FileNotFoundError:
                return ""
            try:
                return os.read(descriptor, _MARKER_LIMIT).decode(errors="replace").rstrip("\n")
            finally:
                os.close(descriptor)

    def space(self) -> Space:
        with translated("find out the free space"):
            found = self._directory.space()
        return Space(free=found.f_bavail * found.f_frsize, total=found.f_blocks * found.f_frsize)

    def ping(self) -> None:
        self._require_marked()
        with translated("use the image directory"):
            if not self._directory.in_place():
                raise Unavailable("another directory is in the image directory's place; is its file system mounted?")
            try:
                marker = self._read_marker()
            except ConfigError as error:
                raise Unavailable("the marker in the image directory is damaged") from error
            if marker != self._marker:
                raise Unavailable("the marker in the image directory is gone, or has changed")
            self._probe()

    def close(self) -> None:
        self._directory.close()

    def _mark(self, marker: _Marker) -> None:
        with self._required():
            self._directory.make(_INCOMING)
            if self._marker is None:
                self._forget()
            self._put(_MARKER, json.dumps(asdict(marker)))
        self._marker = marker

    def _forget(self) -> None:
        """What is remembered without a marker came with a copy of another directory. It goes for good before the marker
        comes, whenever the process dies."""
        noted = [_NOTED + topic for topic in get_args(Topic) if self._directory.exists(_NOTED + topic)]
        for name in noted:
            self._directory.remove(name)
        if noted:
            self._directory.sync()

    def _changed(self) -> int:
        with translated("look at the image directory"):
            return self._directory.stat(".").st_mtime_ns

    def _ids(self, path: str) -> Iterator[str]:
        with translated("list the image directory"):
            for entry in self._directory.entries(path):
                if is_id(entry.name) and entry.is_file():
                    yield entry.name

    def _put(self, name: str, line: str) -> None:
        """A file of one line, whole or not at all. It goes the way of an image, and so proves that images can go it."""
        temporary = f"{_INCOMING}/{name}"
        descriptor = self._directory.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            write_all(descriptor, line.encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._directory.rename(temporary, name)
        self._directory.sync()

    def _begin(self, image_id: str, path: str, *, keep: bool, durably: bool) -> int:
        if self._directory.exists(image_id):
            raise Conflict(f"image {image_id} is stored already")
        if not keep:
            self._directory.remove(path + NOTES)
        flags = os.O_RDWR | (0 if keep else os.O_TRUNC) | (0 if durably else os.O_CREAT)
        try:
            return self._directory.open(path, flags)
        except FileNotFoundError:
            self.claim(image_id)
            return self._directory.open(path, os.O_RDWR)

    def _drop_stray_notes(self) -> None:
        """Of images that were finished, or dropped, right before the process died."""
        names = {entry.name for entry in self._directory.entries(_INCOMING)}
        for name in names:
            if name.endswith(NOTES) and name.removesuffix(NOTES) not in names:
                self._directory.remove(f"{_INCOMING}/{name}")

    def _refuse_second_writer(self, image_id: str) -> None:
        if image_id in self._writing:
            raise Conflict(f"image {image_id} is being written")

    def _ended(self, image_id: str) -> None:
        with self._lock:
            self._writing.discard(image_id)

    def _require_marked(self) -> None:
        if self._marker is None:
            raise Unavailable("the image directory has not been marked as this service's yet")

    def _require_known(self) -> None:
        if self._marker is None:
            raise ConfigError(f"image directory {self._path} has no marker: no service has used it yet")

    @contextmanager
    def _required(self) -> Iterator[None]:
        """Without what is done here there is no service."""
        try:
            yield
        except BlockingIOError as error:
            raise ConfigError(f"image directory {self._path} is in use by another service") from error
        except OSError as error:
            raise ConfigError(f"image directory {self._path} cannot be used: {error.strerror}") from error

    def _read_marker(self) -> _Marker | None:
        """None when there is none; raises ConfigError when it is not to be understood."""
        try:
            descriptor = self._directory.open(_MARKER, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return _Marker.parse(os.read(descriptor, _MARKER_LIMIT))
        except ValueError as error:
            raise ConfigError(f"marker file {self._path / _MARKER} is damaged: {error}") from error
        finally:
            os.close(descriptor)

    def _probe(self) -> None:
        """Proves, by doing it, that a new file can go the way of an image.

        `.incoming` on another mount fails here. A full disk does not: that is for those to hear who want to write,
        while reads and deletions go on.
        """
        temporary = f"{_INCOMING}/{_PROBE}"
        with self._probing:
            try:
                os.close(self._directory.open(temporary, os.O_WRONLY | os.O_CREAT))
                self._directory.rename(temporary, _PROBE)
                self._directory.remove(_PROBE)
            except OSError as error:
                if not disk_full(error):
                    raise


@dataclass(frozen=True, slots=True)
class _Marker:
    member: str
    records: str
    home: str

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Raises ValueError."""
        match read_json(text):
            case {"member": str(member), "records": str(records), **rest} if is_name(member):
                # In the first markers the member's id was both.
                return cls(member, records, str(rest.get("home", member)))
        raise ValueError('it is no JSON object with "member" and "records"')


def _incoming(image_id: str) -> str:
    return f"{_INCOMING}/{require_id(image_id)}"


def _names_aside(name: str) -> Iterator[str]:
    yield f"{_QUARANTINE}/{name}"
    yield from (f"{_QUARANTINE}/{name}.{number}" for number in itertools.count(2))


@contextmanager
def _found(image_id: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"image {image_id} is not stored here") from error
