"""What a running member says of itself, to all others: one key in etcd, on its lease."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from imgsvc.cluster.this_member import ThisMember
from imgsvc.errors import ImgsvcError, Unavailable
from imgsvc.etcd import Etcd
from imgsvc.etcd_layout import Layout
from imgsvc.etcd_messages import KeyValue, created_at, modified_at, put
from imgsvc.metadata.mirror import LiveMember, Mirror

# Seconds between two looks at oneself, and after which others are told whatever has changed. Each is told of each: a
# thousand members that said something every second would be a million messages a second.
_LOOK_SECONDS = 10.0
_TELL_SECONDS = 60.0
# What is worth telling at once: a part of the disk, or of the number of images; and a few images more or less are not.
_MUCH = 0.05
_FEW = 100
# How long the first lease waits for what is to be measured: a disk that hangs is a reason to say less, not nothing.
_PATIENCE_SECONDS = 1.0
_TELL_TIMEOUT = 5.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Place:
    """The revision of the key's creation, and the lease that it is on."""

    created: int
    lease: int


class MemberKey:
    """The key of one member. `seat` names the directory that this process has locked, on this machine since it was
    booted: what has it is this process, or one that was here before and is dead. Anybody else with the same id is
    another member, and this one must not take its place."""

    def __init__(self, etcd: Etcd, prefix: str, this: ThisMember, seat: str) -> None:
        self._etcd = etcd
        self._key = Layout(prefix).member(this.id)
        self._this = this
        self._seat = seat
        self._says = this.unmeasured
        self._measured = threading.Event()
        self._there: KeyValue | None = None
        self._place: _Place | None = None
        self._told = this.unmeasured
        self._told_at = 0.0
        self._lost: Callable[[], None] = lambda: None
        self._stop = threading.Event()
        self._wake = threading.Event()
        # A daemon, as the disk that it looks at may hang for ever. It is not the lease's thread for the same reason.
        self._thread = threading.Thread(target=self._run, name="etcd-member", daemon=True)

    def start(self, lost: Callable[[], None]) -> None:
        """Keeps what the key says true from now on, and calls `lost` when somebody has taken it away."""
        self._lost = lost
        self._thread.start()

    def require_free(self, timeout: float) -> None:
        """Raises Unavailable, and says who it is, when another live member has this id."""
        found = self._etcd.range(self._key, timeout=timeout).items
        self._there = found[0] if found else None
        if self._there is None or (self._place and self._there.created == self._place.created):
            return
        note = self._there.document
        if note.get("seat") != self._seat:
            raise Unavailable(
                f"the member id {self._this.id} is in use at {note.get('url')}, on host {note.get('host')}: one of the"
                " two needs another cluster.memberId"
            )

    def put(self, lease: int, timeout: float) -> None:
        """Puts the key on this lease, if it is still as `require_free` has found it. Raises Unavailable."""
        self._measured.wait(_PATIENCE_SECONDS)
        there, says = self._there, self._says
        outcome = self._etcd.transact(
            [modified_at(self._key, there.modified if there else 0)],
            [put(self._key, self._document(says), lease)],
            timeout=timeout,
        )
        if not outcome.succeeded:
            # Perhaps by this very request, whose answer was lost; the next attempt sees.
            raise Unavailable(f"what member {self._this.id} says of itself was written meanwhile")
        self._place = _Place(there.created if there else outcome.revision, lease)
        self._told, self._told_at = says, time.monotonic()

    def is_in(self, mirror: Mirror) -> bool:
        """Whether it is this run's that the mirror has."""
        seen = mirror.members().get(self._this.id)
        return seen is not None and seen.started == self._this.unmeasured.started

    def miss(self) -> None:
        """Has it looked for at once, as it is not in a mirror where it should be. Never blocks."""
        self._wake.set()

    def close(self) -> None:
        """Returns at once; may be called twice."""
        self._stop.set()
        self._wake.set()

    def _run(self) -> None:
        missed = False
        while not self._stop.is_set():
            try:
                self._look(missed=missed)
                missed = False
            except ImgsvcError as error:
                log.info("others not told of this member", member=self._this.id, reason=str(error))
            except Exception:  # or nobody would be told anything any more
                log.exception("others not told of this member", member=self._this.id)
            if self._wake.wait(_LOOK_SECONDS):
                self._wake.clear()
                missed = True

    def _look(self, *, missed: bool) -> None:
        says = self._says = self._this.measured()
        self._measured.set()
        if missed or differs_much(self._told, says) or time.monotonic() >= self._told_at + _TELL_SECONDS:
            place = self._place
            if place is not None:
                self._tell(says, place)

    def _tell(self, says: LiveMember, place: _Place) -> None:
        """What says nothing new is not written: it is only looked whether it is there."""
        written = [] if says == self._told else [put(self._key, self._document(says), place.lease)]
        outcome = self._etcd.transact([created_at(self._key, place.created)], written, timeout=_TELL_TIMEOUT)
        if outcome.succeeded:
            self._told, self._told_at = says, time.monotonic()
        elif self._place is place:
            self._lost()

    def _document(self, says: LiveMember) -> str:
        document = dataclasses.asdict(says)
        del document["id"]
        return json.dumps({**document, "host": socket.gethostname(), "seat": self._seat})


def differs_much(told: LiveMember, now: LiveMember) -> bool:
    """Whether others should know at once."""
    if told.free is None or now.free is None or now.total is None:
        space = told.free != now.free
    else:
        space = told.total != now.total or abs(told.free - now.free) > _MUCH * now.total
    return space or abs(told.images - now.images) > max(_FEW, _MUCH * told.images)
