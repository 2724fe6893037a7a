"""Parts of images on their way through this member, which keeps none of them: clients that are near each other share
them."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future
from contextlib import suppress

import structlog

from imgsvc.cluster.supply import Supply
from imgsvc.errors import ImgsvcError, PeerFailed, Stopping
from imgsvc.metadata.image import Image
from imgsvc.metadata.mirror import LiveMember

# Bytes that are asked for at a time, from a multiple of it on, where somebody wants them all.
_PART = 1 << 20
# Parts in memory, for who is about to want them.
_KEPT = 64
# Bytes that are given at a time: they wait in memory for each client.
_PIECE = 256 * 1024

log = structlog.get_logger()

# Bytes, and who gave them.
Given = tuple[bytes, LiveMember]
# Of an image: its id, and its digest, for it may come to be another one.
_Version = tuple[str, str]


class Parts:
    """Every method may be called from any thread; `get` and `ask` block."""

    def __init__(self, supply: Supply, threads: Executor) -> None:
        """`threads` fetch what will be wanted next."""
        self._supply = supply
        self._threads = threads
        self._lock = threading.Lock()
        self._users: Counter[_Version] = Counter()
        self._kept: OrderedDict[tuple[_Version, int], Future[Given]] = OrderedDict()
        self._ahead: set[tuple[_Version, int]] = set()
        self._closing = threading.Event()

    def use(self, image: Image) -> None:
        """Somebody begins to read the image, and will `leave` it."""
        with self._lock:
            self._users[_version(image)] += 1

    def leave(self, image: Image) -> None:
        with self._lock:
            self._users[_version(image)] -= 1
            last = self._users[_version(image)] == 0
            if last:
                del self._users[_version(image)]
        if last:
            self.forget(image)

    def forget(self, image: Image) -> None:
        """Its parts are asked for anew."""
        with self._lock:
            for key in [key for key in self._kept if key[0] == _version(image)]:
                del self._kept[key]

    def get(self, image: Image, offset: int, length: int, look: Callable[[], None]) -> Given:
        """The bytes from `offset` on, a piece of a part, to somebody who wants `length` of them. Raises PeerFailed
        when no member gives them, and what `look` does, which is called now and then."""
        start = offset - offset % _PART
        end = min(start + _PART, image.size)
        size = min(length, _PIECE, end - offset)
        wants_all = offset + length >= end and (offset == start or length >= _PART)
        if not image.sha256 or not (wants_all or (_version(image), start) in self._kept):
            return self.ask(image, offset, size, look)
        part, giver = self._part(image, start, end)
        if offset + length > end:
            self._read_ahead(image, end)
        return part[offset - start : offset - start + size], giver

    def ask(
        self, image: Image, offset: int, length: int, look: Callable[[], None], without: Collection[str] = ()
    ) -> Given:
        """So many bytes, for nobody else, from any member but those. Raises as `get` does."""
        tried = set(without)
        trouble = "no other is live, or known to have the right bytes"
        while (member := self._supply.choice.best(image, tried)) is not None:
            try:
                return self._supply.part(image, member, offset, length, look), member
            except PeerFailed as error:
                trouble = f"{member.id}: {error}"
                tried.add(member.id)
        raise self._supply.nobody(image, trouble)

    def close(self) -> None:
        """Whoever waits for a part is told soon."""
        self._closing.set()

    def _part(self, image: Image, start: int, end: int) -> Given:
        """Who is first asks for it; it does so to the end, as others may wait for it as well."""
        key = (_version(image), start)
        with self._lock:
            part = self._kept.get(key)
            mine = part is None
            if part is None:
                part = self._kept[key] = Future()
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
        if mine:
            try:
                part.set_result(self.ask(image, start, end - start, self._look))
            except BaseException as error:  # noqa: BLE001 - it is raised below, here and where others wait
                with self._lock:
                    if self._kept.get(key) is part:
                        del self._kept[key]
                part.set_exception(error)
        return part.result()

    def _read_ahead(self, image: Image, start: int) -> None:
        key = (_version(image), start)
        with self._lock:
            if key in self._kept or key in self._ahead:
                return
            self._ahead.add(key)
        with suppress(RuntimeError):  # the service is stopping
            self._threads.submit(self._fetch_ahead, image, key)

    def _fetch_ahead(self, image: Image, key: tuple[_Version, int]) -> None:
        version, start = key
        try:
            if version in self._users:
                self._part(image, start, min(start + _PART, image.size))
        except ImgsvcError:
            pass  # who wants it finds out
        except Exception:
            log.exception("bytes not passed on", image=image.id)
        finally:
            with self._lock:
                self._ahead.discard(key)

    def _look(self) -> None:
        if self._closing.is_set():
            raise Stopping("the service is stopping")


def _version(image: Image) -> _Version:
    return image.id, image.sha256
