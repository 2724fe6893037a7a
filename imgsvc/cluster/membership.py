"""Who is there: this host's lease in etcd, and what it says of itself on it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from imgsvc import __version__
from imgsvc.deadline import time_left
from imgsvc.errors import ImgsvcError, Unavailable
from imgsvc.etcd import Etcd, LeaseLost
from imgsvc.etcd_layout import Layout
from imgsvc.etcd_messages import put
from imgsvc.metadata.image import format_time
from imgsvc.metadata.store import Member

LEASE_SECONDS = 10
# How often the member's free space is told anew.
_REPORT_SECONDS = 60
# Between attempts while etcd is away.
_RETRY_SECONDS = 1.0
# How long a caller waits for a lease while there is none: a little more than a grant takes when all is well.
_PATIENCE_SECONDS = 2.0

_log = structlog.get_logger()


class Membership:
    """Keeps a lease of `ttl` seconds alive from a thread of its own, and gets a new one when it was lost.

    What is put on the lease goes when this host dies, or is cut off for that long.
    """

    def __init__(
        self, etcd: Etcd, prefix: str, member: Member, free_space: Callable[[], int], ttl: int = LEASE_SECONDS
    ) -> None:
        """`free_space` tells the bytes that this member can still take; it may raise an ImgsvcError."""
        self._etcd = etcd
        self._key = Layout(prefix).member(member.id)
        self._member = member
        self._free_space = free_space
        self._ttl = ttl
        self._started = format_time(datetime.now(UTC))
        self._restore: list[Callable[[int], None]] = []
        self._changed = threading.Condition()
        self._lease: int | None = None
        self._trusted_until = 0.0
        self._reported = 0.0
        self._trouble = ""
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="etcd-lease", daemon=True)
        self._thread.start()

    @property
    def lease_id(self) -> int | None:
        """The lease, or None while it cannot be relied on."""
        with self._changed:
            return self._lease if time.monotonic() < self._trusted_until else None

    def lease(self, lost: int | None = None) -> int:
        """A lease to put keys on; waits a moment for one. `lost` is one that etcd no longer knows.

        Raises Unavailable while there is none.
        """
        with self._changed:
            if lost is not None and lost == self._lease:
                self._trusted_until = 0.0
                self._wake.set()
            self._changed.wait_for(
                lambda: self._stop.is_set() or self.lease_id not in (None, lost), time_left(_PATIENCE_SECONDS)
            )
            lease = self.lease_id
        if lease is None or lease == lost:
            raise Unavailable(f"this host has no lease now: {self._trouble or f'{self._etcd} has not answered yet'}")
        return lease

    def on_new_lease(self, restore: Callable[[int], None]) -> None:
        """Has `restore(lease)` called before a lease replaces a lost one; it puts back what was on the old one."""
        self._restore.append(restore)

    def close(self) -> None:
        """Ends the thread and, if etcd answers, the lease with all that is on it; may be called twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._wake.set()
        self._thread.join()
        with self._changed:
            self._trusted_until, self._trouble = 0.0, "it is leaving"
            self._changed.notify_all()
        if self._lease is not None:
            with contextlib.suppress(ImgsvcError):
                self._etcd.revoke(self._lease, timeout=1)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._renew()
                self._trouble = ""
            except ImgsvcError as error:
                if not self._trouble:
                    _log.warning("lease not renewed", member=self._member.id, reason=str(error))
                self._trouble = str(error)
            self._wake.wait(_RETRY_SECONDS if self._trouble else self._ttl / 3)
            self._wake.clear()

    def _renew(self) -> None:
        """One attempt, of which no step takes longer than a third of the lease."""
        # etcd counts from when it hears of it, which is later: what we believe always ends first.
        asked = time.monotonic()
        lease = self._kept() or self._new_lease()
        with self._changed:
            self._lease, self._trusted_until = lease, asked + self._ttl
            self._changed.notify_all()
        if asked > self._reported + _REPORT_SECONDS:
            self._report(lease)

    def _kept(self) -> int | None:
        """The lease, with its full time again; None when there is none any more."""
        if self._lease is not None:
            with contextlib.suppress(LeaseLost):
                self._etcd.keep_alive(self._lease, timeout=self._ttl / 3)
                return self._lease
        return None

    def _new_lease(self) -> int:
        lease = self._etcd.grant(self._ttl, timeout=self._ttl / 3)
        self._report(lease)
        for restore in self._restore:
            restore(lease)
        _log.info("lease granted", member=self._member.id, lease=f"{lease:x}")
        return lease

    def _report(self, lease: int) -> None:
        self._etcd.transact([], [put(self._key, json.dumps(self._description()), lease)], timeout=self._ttl / 3)
        self._reported = time.monotonic()

    def _description(self) -> dict[str, object]:
        free: int | None = None
        with contextlib.suppress(ImgsvcError):
            free = self._free_space()
        return {
            "url": self._member.url,
            "version": __version__,
            "free": free,
            "host": socket.gethostname(),
            "started": self._started,
        }


class NoLease:
    """For who works on records beside the member itself, and transfers nothing."""

    def lease(self, lost: int | None = None) -> int:  # noqa: ARG002 - as the protocol has it
        raise Unavailable("there is no lease on etcd for this work")

    def on_new_lease(self, restore: Callable[[int], None]) -> None:
        """There will be none."""
