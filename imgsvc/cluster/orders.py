"""Orders to other members to copy an image, for who waits until so many have it."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import structlog

from imgsvc.cluster.rendezvous import ranked
from imgsvc.errors import Conflict, ImgsvcError, Invalid, NotFound, Unavailable
from imgsvc.metadata.image import Image
from imgsvc.metadata.mirror import LiveMember, Mirror

# Seconds that the others have for an image of no size, and bytes a second that they take the rest at, at least.
_PATIENCE = 30.0
_LEAST_RATE = 20_000_000
# Orders at once; the next waits for one of them to end.
_AT_ONCE = 64
# Seconds between two looks at the records and the clock.
_LOOK = 0.25

log = structlog.get_logger()


class Peers(Protocol):
    def copy(self, member: LiveMember, image_id: str, within: float) -> None:
        """Returns when the member holds the image; raises an ImgsvcError when it does not within so many seconds."""


class Orders:
    """Every method may be called from any thread."""

    def __init__(
        self,
        mirror: Mirror | None,
        peers: Peers,
        me: str,
        fits: Callable[[LiveMember, int], bool],
        patience: float = _PATIENCE,
    ) -> None:
        """The mirror is None where records are not shared with other members. `fits` says whether a member has room
        for so many bytes."""
        self._mirror = mirror
        self._peers = peers
        self._me = me
        self._fits = fits
        self._patience = patience
        self._free = threading.BoundedSemaphore(_AT_ONCE)
        self._closing = threading.Event()

    def require(self, count: int) -> None:
        """Raises Invalid or Unavailable when so many members cannot hold an image, this one included. Never blocks."""
        if count == 1:
            return
        if self._mirror is None:
            raise Invalid(f"{count} members are to hold the image, and this service shares its records with no other")
        live = len(self._mirror.members())
        if count > live:
            raise Unavailable(f"{count} members are to hold the image, and {live} are live")

    def wait_for(self, image: Image, count: int) -> Image:
        """Returns when so many members hold the complete image, which this one does, and says which ones they are.
        Raises Unavailable, saying how many do, when they do not within half a minute and the time that its size needs,
        and Conflict when it is deleted."""
        if count == 1 or self._mirror is None:
            return image
        latest = time.monotonic() + self._patience + image.size / _LEAST_RATE
        answers: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        holders, asked, running = {self._me}, set[str](), 0
        while True:
            live = self._mirror.members()
            holders.update(member for member in self._replicas(self._mirror, image.id) if member in live)
            if len(holders) >= count:
                return dataclasses.replace(image, replicas=tuple(sorted(holders)))
            for member in self._next(image, live, holders | asked)[: max(count - len(holders) - running, 0)]:
                asked.add(member)
                running += 1
                order = threading.Thread(
                    target=self._give, args=(live[member], image.id, latest, answers), name="order", daemon=True
                )
                order.start()
            if not running or time.monotonic() >= latest or self._closing.is_set():
                break
            with contextlib.suppress(queue.Empty):
                member, done = answers.get(timeout=_LOOK)
                running -= 1
                holders.update({member} if done else ())
        raise Unavailable(f"the image {image.id} is complete here, and {len(holders)} of {count} members have it")

    def close(self) -> None:
        """Who waits is told soon. Orders that were given are not taken back."""
        self._closing.set()

    def _replicas(self, mirror: Mirror, image_id: str) -> Sequence[str]:
        try:
            return mirror.get(image_id).replicas
        except NotFound as error:
            raise Conflict("the image was deleted while it was copied") from error

    def _next(self, image: Image, live: Mapping[str, LiveMember], but: Collection[str]) -> list[str]:
        """Who is to be asked, in the image's order: first those with room for it, by what they say of themselves."""
        others = ranked(image.id, (member for member in live if member not in but))
        return sorted(others, key=lambda member: not self._fits(live[member], image.size))

    def _give(
        self, member: LiveMember, image_id: str, latest: float, answers: queue.SimpleQueue[tuple[str, bool]]
    ) -> None:
        """One order, in a thread of its own, which a shutdown need not wait for."""
        done = False
        try:
            if self._free.acquire(timeout=max(latest - time.monotonic(), 0)):
                try:
                    self._peers.copy(member, image_id, max(latest - time.monotonic(), 0))
                    done = True
                finally:
                    self._free.release()
        except ImgsvcError as error:
            log.warning("no copy there", image=image_id, member=member.id, reason=str(error))
        except Exception:
            log.exception("no copy there", image=image_id, member=member.id)
        finally:
            answers.put((member.id, done))
