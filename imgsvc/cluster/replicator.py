"""Sees to it, in the background, that each complete image has as many live copies as are wanted."""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Callable, Mapping

import structlog

from imgsvc.cluster.copies import Copier
from imgsvc.cluster.presence import Presence
from imgsvc.cluster.shortages import Shortages
from imgsvc.errors import ImgsvcError, NotFound
from imgsvc.metadata.image import Image
from imgsvc.metadata.mirror import Known, LiveMember, Mirror
from imgsvc.settings import ClusterSettings
from imgsvc.throttle import Throttle

# Copies at once.
_COPIES = 2
# Seconds between two looks at all images when nothing happens: what goes by events alone may go wrong once.
_PASS_INTERVAL = 300.0
# A look at all takes no more than this part of the time: with 1,000,000 images it takes two seconds of one core.
_PASS_SHARE = 0.1
# Seconds between two pages of 1,000 images in it, and as long as the page took: others want the interpreter as well.
_BREATH = 0.001
# Images that changed and were not looked at; with more, all are looked at.
_MOST_CHANGED = 10_000
# Seconds that the first member has for an image of no size, before the next one in its order takes its turn.
_TURN = 30.0
# Bytes a second that a line is taken for where no limit is set.
_LINE = 100_000_000
# Seconds before what could not be done now, for want of a lease or of records, is looked at again.
_LOOK_INTERVAL = 1.0

log = structlog.get_logger()


class Replicator:
    """One thread that knows what is missing, and two that copy. Every member has one, and they need not talk: all go
    by the same records and the same order of members (`Shortages` says whose turn it is).

    With 1,000,000 images, 1,000 members and two copies each, one that dies leaves 2,000 images short: each of the
    others finds them by one look at all, and looks closer at these alone, which takes 25 microseconds each, and half a
    millisecond when others have not done their part for an hour.
    """

    def __init__(
        self,
        mirror: Mirror,
        copier: Copier,
        settings: ClusterSettings,
        *,
        me: str,
        fits: Callable[[LiveMember, int], bool],
        may_work: Callable[[], bool],
        turn: float = _TURN,
    ) -> None:
        """`me` is this member's id. `fits` says whether a member has room for so many bytes. `may_work` is asked before
        each copy: whether this member is one of the cluster for certain."""
        self._mirror = mirror
        self._copier = copier
        self._wanted = settings.replicas
        self._delay = settings.rebalance_delay
        self._me = me
        self._may_work = may_work
        rate = settings.copy_bytes_per_second
        self._throttle = Throttle(rate)

        def patience(size: int) -> float:
            # They share the line, and may have half of it.
            return turn + 2 * _COPIES * size / (rate or _LINE)

        self._shortages = Shortages(me, self._wanted, patience, fits)
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._work = threading.Condition(self._lock)
        self._changed: set[str] = set()
        self._members: Mapping[str, LiveMember] = {}
        self._pass_due = 0.0
        self._pass_ended = -math.inf
        self._pass_took = 0.0
        # When to look at which image; what says another time than its shortage does is out of date.
        self._due: list[tuple[float, str]] = []
        self._copying: set[str] = set()
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._follow, name="replicas", daemon=True)]
        self._threads += [
            threading.Thread(target=self._copy_what_is_due, name=f"replicas-{n}", daemon=True) for n in range(_COPIES)
        ]

    def start(self) -> None:
        """Does nothing where one copy is enough: it is there, or there is none to copy."""
        if self._wanted > 1:
            self._mirror.listen(self.changed)
            for thread in self._threads:
                thread.start()

    def stop(self) -> None:
        """No copy is begun from now on."""
        self._closing.set()
        with self._lock:
            self._news.notify_all()
            self._work.notify_all()

    def close(self) -> None:
        """Returns when the copies that were under way have ended; who does them ends them before."""
        self.stop()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def changed(self, image_id: str) -> None:
        """Of the image, or of who is live when it is "". Returns at once."""
        with self._lock:
            if len(self._changed) < _MOST_CHANGED:
                self._changed.add(image_id)
            else:
                self._pass_due = 0.0
            self._news.notify()

    def _follow(self) -> None:
        while not self._closing.is_set():
            try:
                if self._is_trusted():
                    self._take_news()
                else:
                    self._members = {}
                    self._closing.wait(_LOOK_INTERVAL)
            except Exception:  # without this thread no image would get a copy any more
                log.exception("replicas not looked after")
                self._closing.wait(_LOOK_INTERVAL)

    def _take_news(self) -> None:
        """Waits for what changes, or for the time to look at all, and looks."""
        with self._lock:
            if not self._changed and not self._closing.is_set():
                self._news.wait(max(min(self._next_pass() - time.monotonic(), _LOOK_INTERVAL), 0.0))
            changed, self._changed = self._changed, set()
        presence = Presence(self._mirror, self._delay)
        for image_id in changed - {""}:
            self._look_up(image_id, presence)
        with self._lock:
            self._pass_due = min(self._pass_due, time.monotonic() + presence.changes_in)
            if presence.live.keys() != self._members.keys():
                self._members, self._pass_due = presence.live, 0.0
                self._shortages.forgive()
            due = self._next_pass()
        if time.monotonic() >= due:
            self._look_at_all()

    def _next_pass(self) -> float:
        return max(self._pass_due, self._pass_ended + self._pass_took / _PASS_SHARE)

    def _look_at_all(self) -> None:
        """Every image is asked whether it lacks copies, which is quick, and those that do are looked at."""
        began, lacking = time.monotonic(), 0
        presence = Presence(self._mirror, self._delay)
        with self._lock:
            self._pass_due = math.inf
            self._shortages.begin_round()
        for page in self._mirror.pages():
            turned = time.monotonic()
            for known in page:
                if self._shortages.lacks(known, presence):
                    lacking += 1
                    self._look_at(known, presence)
            if self._closing.wait(_BREATH + time.monotonic() - turned):
                return
        with self._lock:
            self._shortages.end_round(presence.live.keys())
            self._pass_ended = time.monotonic()
            self._pass_took = self._pass_ended - began
            self._pass_due = min(self._pass_due, self._pass_ended + min(_PASS_INTERVAL, presence.changes_in))
        log.debug("replicas looked at", lacking=lacking, seconds=round(self._pass_took, 3))

    def _look_up(self, image_id: str, presence: Presence) -> None:
        try:
            self._look_at(self._mirror.get(image_id), presence)
        except NotFound:
            with self._lock:
                self._shortages.forget(image_id)

    def _look_at(self, known: Known, presence: Presence) -> None:
        if self._me not in presence.live:
            return
        with self._lock:
            before = self._shortages.get(known.id)
            due = math.inf if before is None else before.due
            shortage = self._shortages.look(known, presence)
            if shortage is not None and shortage.due not in (due, math.inf) and known.id not in self._copying:
                heapq.heappush(self._due, (shortage.due, known.id))
                self._work.notify()

    def _copy_what_is_due(self) -> None:
        while not self._closing.is_set():
            try:
                if not self._is_trusted():
                    self._closing.wait(_LOOK_INTERVAL)
                elif (image_id := self._next_due()) is not None:
                    self._take_turn(image_id)
            except Exception:  # as above
                log.exception("replicas not copied")
                self._closing.wait(_LOOK_INTERVAL)

    def _next_due(self) -> str | None:
        """An image whose time has come, which is this thread's now; None after a wait, when there was none."""
        with self._lock:
            wait = self._due[0][0] - time.monotonic() if self._due else _LOOK_INTERVAL
            if wait > 0 and not self._closing.is_set():
                self._work.wait(min(wait, _LOOK_INTERVAL))
            while self._due and self._due[0][0] <= time.monotonic():
                due, image_id = heapq.heappop(self._due)
                shortage = self._shortages.get(image_id)
                if shortage is not None and shortage.due == due and image_id not in self._copying:
                    self._copying.add(image_id)
                    return image_id
            return None

    def _take_turn(self, image_id: str) -> None:
        """Looks once more, for others may have made the copy meanwhile, and copies."""
        presence = Presence(self._mirror, self._delay)
        try:
            self._look_up(image_id, presence)
            with self._lock:
                shortage = self._shortages.get(image_id)
            if shortage is not None and shortage.due <= time.monotonic():
                self._copy(self._mirror.get(image_id).image)
        except NotFound:
            pass
        finally:
            with self._lock:
                self._copying.discard(image_id)
                if (shortage := self._shortages.get(image_id)) is not None:
                    shortage.due = math.inf  # so that it is queued again
            self._look_up(image_id, presence)

    def _copy(self, image: Image) -> None:
        reason = ""
        try:
            self._copier.copy(image, self._throttle)
        except ImgsvcError as error:
            reason = str(error)
        finally:
            with self._lock:
                failures = self._shortages.tried(image.id)
        if reason:
            # Once is enough for a person.
            (log.warning if failures == 1 else log.debug)("image not copied", image=image.id, reason=reason)

    def _is_trusted(self) -> bool:
        return self._mirror.stale is None and self._may_work()
