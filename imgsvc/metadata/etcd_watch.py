"""Follows etcd, through its outages: all images and members into the mirror, and deletions to who wants to know.

Two threads. One reads everything, at one revision, and from there on takes changes from a watch; a watch that ends is
opened again where it ended, and everything is read again only when etcd has compacted that away or is another etcd. The
other asks etcd twice a second for one key, which a majority of its members must answer: that is how a frozen etcd is
told from a quiet one, and, as the answer says at which revision etcd is, a frozen watch from one that has nothing to
tell.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import structlog

from imgsvc.deadline import time_left
from imgsvc.errors import ImgsvcError, Unavailable
from imgsvc.etcd import Compacted, Etcd, Watch
from imgsvc.etcd_layout import RECORD, Layout, end_of
from imgsvc.etcd_messages import Change, Changes, KeyValue, Page, modified_at, put
from imgsvc.etcd_scan import scan
from imgsvc.metadata.etcd_count import NotedCount
from imgsvc.metadata.etcd_deletions import Deletions
from imgsvc.metadata.etcd_images import changed, grouped, read_member
from imgsvc.metadata.etcd_keys import named_records
from imgsvc.metadata.image import is_id, new_id
from imgsvc.metadata.mirror import Mirror

# Seconds between two questions, and how long an answer may take.
_BEAT_SECONDS = 0.5
_ANSWER_SECONDS = 1.0
# Seconds for a page of everything.
_PAGE_SECONDS = 4.0
# Seconds for which a watch may lag behind what etcd says before another endpoint is watched.
_LAG_SECONDS = 1.5
# Seconds between attempts while etcd is away.
_RETRY_SECONDS = 0.5
# How long who begins to follow deletions waits for the beginning of what is followed.
_PATIENCE_SECONDS = 2.0

log = structlog.get_logger()


class Follower:
    """Fills the mirror until `close`. `answers` says whether etcd does, as far as is known."""

    def __init__(self, etcd: Etcd, layout: Layout, mirror: Mirror, position: str = "") -> None:
        """`position` is what an earlier run of this member came to."""
        self._answering = threading.Event()
        self._answering.set()
        self._etcd = etcd
        self._layout = layout
        self._mirror = mirror
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._loaded = threading.Event()
        # Set once no change can be missed any more.
        self._positioned = threading.Event()
        self._lock = threading.Lock()
        self._listeners: list[Deletions] = []
        self._gap_due = False
        self._watch: Watch | None = None
        # The revision up to which all is in the mirror; None when it must be read.
        self._at: int | None = None
        # The revision that etcd was found at by the last beat, and up to which the watch has said to have told all.
        self._found = 0
        self._told = 0
        # Whether the watch was asked how far it is, and has said nothing since.
        self._asked = False
        self._identity: tuple[int, str] | None = None
        self._went_back = False
        # The name goes with the images, whatever their member is called.
        self._history = new_id()
        self._count = NotedCount(etcd, layout.history(self._history), 0)
        self._go_on_from(position)
        self._trouble = ""
        self._threads = [
            threading.Thread(target=self._run, name="etcd-watch", daemon=True),
            threading.Thread(target=self._beat, name="etcd-heartbeat", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def answers(self) -> bool:
        return self._answering.is_set()

    def mark(self, last: str) -> str:
        """Which etcd is followed and how far, for the next run, unless that is `last`; etcd is told first that this is
        noted. "" before it is known. Raises Unavailable."""
        identity = self._identity
        if identity is None or last == self._position(identity):
            return last
        if not self._count.add():
            self._start_anew()  # where this is found once more, and said
            return last
        # Else it is another one by now.
        return self._position(identity) if identity == self._identity else last

    def wait_for_position(self) -> None:
        """Returns once it is known which etcd it is. Raises Unavailable when that takes long."""
        if not self._positioned.wait(time_left(_PATIENCE_SECONDS)):
            raise Unavailable("the records are about to be read")

    def wait(self, seconds: float) -> bool:
        """Whether all has been read once, at the latest after so many seconds."""
        return self._loaded.wait(seconds)

    def doubt(self) -> None:
        """Somebody got no answer: etcd counts as gone until it gives one."""
        self._lost()
        self._wake.set()

    def follow_deletions(self, deleted: Callable[[str], None], gap: Callable[[], None]) -> None:
        """As the metadata store promises."""
        self._positioned.wait(_PATIENCE_SECONDS)
        with self._lock:
            self._listeners.append(Deletions(deleted, gap))
            if not self._positioned.is_set():
                self._gap_due = True

    def close(self) -> None:
        """Ends the threads; may be called twice."""
        self._stop.set()
        self._wake.set()
        self._answering.set()
        self._end_watch()
        for thread in self._threads:
            thread.join()
        for listener in self._listeners:
            listener.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            # A member of etcd that has just come back may not know yet what the others have done meanwhile.
            if not self._answering.wait(_RETRY_SECONDS):
                continue
            try:
                if self._at is None:
                    self._load()
                self._follow(self._at or 0)
            except Compacted as error:
                log.info("records are read again", reason=str(error))
                self._forget()
            except ImgsvcError as error:
                if self._at is None:
                    self._forget()
                self._note_trouble(error)
                self._stop.wait(_RETRY_SECONDS)
            except Exception:  # without this thread, no change would be seen any more
                log.exception("records not followed")
                self._forget()
                self._stop.wait(_RETRY_SECONDS)

    def _forget(self) -> None:
        with self._lock:
            self._at = None
            self._positioned.clear()
            self._gap_due = bool(self._listeners)

    def _load(self) -> None:
        """Reads all of it, at one revision."""
        newest = self._mirror.newest
        first = self._first(newest)
        revision = first.revision
        with self._lock:
            self._positioned.set()
        identity = _identity(first)
        images = grouped(self._layout, self._scan(self._layout.images, revision))
        parsed = (changed(None, found.id, found.parts, complain=True) for found in images)
        known = [each for each in parsed if each is not None]
        members = [
            read_member(item.key.removeprefix(self._layout.members), item)
            for item in self._scan(self._layout.members, revision)
        ]
        another = self._identity is not None and self._identity != identity
        self._mirror.replace(known, members, revision, anew=another or revision < newest)
        # Nothing of this refers to itself, and looking through 100,000 images for what does stops everything for 0.4 s.
        gc.freeze()
        with self._lock:
            self._at = self._told = self._found = revision
            self._identity = identity
            self._went_back = False
            gap_due, self._gap_due = self._gap_due, False
        self._mirror.heard()
        self._loaded.set()
        if gap_due:
            for listener in self._listeners:
                listener.tell_gap()

    def _first(self, newest: int) -> Page:
        """Which etcd it is, and where. One that has gone back was restored from a backup: what it lacks was not
        deleted. So its records get another name, to which no directory belongs that was filled with the lost ones, and
        nobody takes what is there for orphans."""
        first = named_records(self._etcd, self._layout, _ANSWER_SECONDS)
        went_back = self._went_back or first.revision < newest or self._count.has_gone_back()
        if went_back and self._identity == _identity(first):
            log.error(
                "etcd was restored from a backup: what was recorded since is lost", revision=first.revision, was=newest
            )
            key, another = first.items[0], [put(self._layout.records, str(uuid.uuid4()))]
            self._etcd.transact([modified_at(key.key, key.modified)], another, timeout=_ANSWER_SECONDS)
            first = named_records(self._etcd, self._layout, _ANSWER_SECONDS)
        if went_back:
            self._count.forget()
        return first

    def _go_on_from(self, position: str) -> None:
        match position.split(" "):
            case [cluster, name, newest, history, count] if newest.isdecimal() and count.isdecimal() and is_id(history):
                with contextlib.suppress(ValueError):  # it is damaged
                    self._identity = (int(cluster, 16), name)
                    self._history = history
                    self._count = NotedCount(self._etcd, self._layout.history(history), int(count))
                    self._mirror.reached(int(newest))

    def _position(self, identity: tuple[int, str]) -> str:
        cluster, name = identity
        return f"{cluster:x} {name} {self._mirror.newest} {self._history} {self._count.number}"

    def _scan(self, start: str, revision: int) -> Iterator[KeyValue]:
        for item in scan(self._etcd, start, revision=revision, timeout=_PAGE_SECONDS):
            if self._stop.is_set():
                raise Unavailable("this member is stopping")
            yield item

    def _follow(self, at: int) -> None:
        """One watch, to its end. What it would follow may have been restored since the last one, and gone on."""
        if self._count.has_gone_back():
            self._start_anew()
            return
        watch = self._etcd.watch(self._layout.members, end_of(self._layout.images), at + 1)
        with self._lock:
            self._watch, self._asked = watch, False
            over = self._at is None or self._stop.is_set()
        try:
            if over:
                return
            for changes in watch:
                self._apply(changes)
                if self._at is None:
                    break
        finally:
            self._end_watch()

    def _apply(self, news: Changes) -> None:
        self._asked = False
        if news.changes and news.changes[0].revision <= (self._at or 0):
            self._went_back = True  # for this etcd was asked for what comes after
            self._start_anew()
            return
        deleted = self._apply_to_images(news.changes)
        for change in news.changes:
            if change.key.startswith(self._layout.members):
                self._apply_to_members(change)
        with self._lock:
            self._told = max(self._told, news.revision)
            if news.changes and self._at is not None:
                self._at = news.revision
                self._mirror.followed(news.revision)
        for image_id in deleted:
            for listener in self._listeners:
                listener.tell(image_id)

    def _apply_to_images(self, changes: Sequence[Change]) -> list[str]:
        """Returns the ids of those that were deleted. What one transaction did to an image is seen at once."""
        images: dict[tuple[str, int], dict[str, KeyValue | None]] = {}
        for change in changes:
            if change.key.startswith(self._layout.images):
                image_id, name = self._layout.split(change.key)
                images.setdefault((image_id, change.revision), {})[name] = change.item
        for (image_id, revision), parts in images.items():
            self._mirror.follow(image_id, partial(changed, image_id=image_id, parts=parts, complain=True), revision)
        return [image_id for (image_id, _), parts in images.items() if RECORD in parts and parts[RECORD] is None]

    def _apply_to_members(self, change: Change) -> None:
        member = change.key.removeprefix(self._layout.members)
        if change.item is None:
            self._mirror.leave(member)
        else:
            self._mirror.join(read_member(member, change.item))

    def _start_anew(self) -> None:
        log.warning("etcd is another one, or was restored; records are read again")
        self._forget()
        self._end_watch()

    def _end_watch(self) -> None:
        with self._lock:
            watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    def _beat(self) -> None:
        while not self._stop.is_set():
            try:
                before = self._mirror.newest
                page = self._etcd.range(self._layout.records, timeout=_ANSWER_SECONDS)
                self._answering.set()
                self._judge(page, before)
            except ImgsvcError as error:
                self._lost()
                self._note_trouble(error)
            except Exception:  # without this thread, an outage would not be seen any more
                log.exception("etcd not asked")
            self._wake.wait(_BEAT_SECONDS)
            self._wake.clear()

    def _judge(self, page: Page, before: int) -> None:
        """What etcd's answer says of the mirror, and of the watch; `before` is what was known when it was asked."""
        if self._at is None or before <= page.revision < self._at:
            return  # of what was asked before the mirror was filled there is nothing to say
        if page.revision < before or self._is_another(page):
            self._went_back = page.revision < before
            self._start_anew()
            return
        reached = max(self._at, self._told)
        if reached >= page.revision or reached >= self._found:
            self._mirror.heard()
            self._trouble = ""
        elif self._mirror.age > _LAG_SECONDS:
            self._mirror.lost()
        self._look_after_watch(page.revision, reached)
        self._found = page.revision

    def _look_after_watch(self, revision: int, reached: int) -> None:
        """A watch that says nothing when asked, or only what is long past, is left for one at another endpoint."""
        with self._lock:
            watch = self._watch
        if watch is None or reached >= revision:
            return
        if self._asked or not watch.in_use or self._mirror.age > _LAG_SECONDS:
            watch.fail()
        else:
            self._asked = True
            watch.ask_progress()

    def _is_another(self, page: Page) -> bool:
        """One set up anew may have the same cluster's id, which is made of its command line."""
        return self._identity not in (None, _identity(page))

    def _lost(self) -> None:
        if not self._stop.is_set():
            self._answering.clear()
        self._mirror.lost()

    def _note_trouble(self, error: ImgsvcError) -> None:
        if not self._trouble:
            log.warning("etcd cannot be followed now", reason=str(error))
        self._trouble = str(error)


def _identity(page: Page) -> tuple[int, str]:
    return page.cluster, page.items[0].text if page.items else ""
