"""Who is there: this member's lease in etcd, with what it says of itself on it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import structlog

from imgsvc.cluster.member_key import MemberKey
from imgsvc.cluster.renaming import Renaming
from imgsvc.cluster.this_member import ThisMember
from imgsvc.deadline import time_left
from imgsvc.errors import ImgsvcError, Unavailable
from imgsvc.etcd import Etcd, LeaseLost
from imgsvc.images.store import ImageStore
from imgsvc.metadata.mirror import Mirror

LEASE_SECONDS = 10
# Between attempts while etcd is away.
_RETRY_SECONDS = 1.0
# How long a caller waits for a lease while there is none: a little more than a grant takes when all is well.
_PATIENCE_SECONDS = 2.0
# How long a start waits for its own key to be in the mirror, and between two looks.
_SIGHT_SECONDS = 5.0
_SIGHT_INTERVAL = 0.01

log = structlog.get_logger()


def _now() -> float:
    """Seconds by a clock that nobody sets, and that goes on while the machine sleeps: `time.monotonic` does not, and
    would believe in a lease that ran out meanwhile. A virtual machine that its host stops knows of nothing when it goes
    on, by whatever clock; then it is etcd that refuses what is written with the old lease."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Membership:
    """Keeps a lease of `ttl` seconds alive from a thread of its own, and gets a new one when it was lost.

    What is put on the lease goes when this member dies, or is cut off for that long.
    """

    def __init__(self, etcd: Etcd, prefix: str, this: ThisMember, *, seat: str, ttl: int = LEASE_SECONDS) -> None:
        """`seat` as `MemberKey` has it."""
        self._etcd = etcd
        self._prefix = prefix
        self._id = this.id
        self._ttl = ttl
        self._key = MemberKey(etcd, prefix, this, seat)
        self._restore: list[Callable[[int], None]] = []
        self._changed = threading.Condition()
        self._lease: int | None = None
        self._announced = False
        self._trusted_until = 0.0
        self._trouble = ""
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="etcd-lease", daemon=True)
        self._thread.start()
        self._key.start(self._key_lost)

    @property
    def lease_id(self) -> int | None:
        """The lease, or None while it cannot be relied on."""
        with self._changed:
            return self._lease if _now() < self._trusted_until else None

    def lease(self, lost: int | None = None) -> int:
        """A lease to put keys on; waits a moment for one. `lost` is one that etcd no longer knows.

        Raises Unavailable while there is none.
        """
        with self._changed:
            if lost is not None and lost == self._lease:
                self._trusted_until = 0.0
            if self.lease_id is None and not self._trouble:
                self._wake.set()  # it was lost just now, or while the machine slept
            self._changed.wait_for(
                lambda: self._stop.is_set() or self.lease_id not in (None, lost), time_left(_PATIENCE_SECONDS)
            )
            lease = self.lease_id
        if lease is None or lease == lost:
            raise Unavailable(f"this member has no lease now: {self._trouble or f'{self._etcd} has not answered yet'}")
        return lease

    def on_new_lease(self, restore: Callable[[int], None]) -> None:
        """Has `restore(lease)` called when a lease has replaced a lost one, and again while that raises an ImgsvcError:
        it puts back what was on the old one."""
        self._restore.append(restore)

    def take_place(self, images: ImageStore, mirror: Mirror) -> None:
        """To be called before anything is done in this member's name: nobody else has it, it is the name of the
        directory from now on, whose images are on record under it, and the mirror shows it among the live. Raises
        Unavailable, and may then be called again; ConfigError when the name is another directory's."""
        self.lease()
        Renaming(self._etcd, self._prefix, images, self._id).settle()
        self._wait_to_be_seen(mirror)

    def stay_in(self, mirror: Mirror) -> None:
        """From now on the key is put back as soon as the mirror has lost it: whoever deletes it makes all others believe
        that this member is dead."""

        def changed(image_id: str) -> None:
            if not image_id and not self._key.is_in(mirror):
                self._key.miss()

        mirror.listen(changed)

    def close(self) -> None:
        """Ends the thread and, if etcd answers, the lease with all that is on it; may be called twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._wake.set()
        self._key.close()
        self._thread.join()
        with self._changed:
            self._trusted_until, self._trouble = 0.0, "it is leaving"
            self._changed.notify_all()
        self._end_lease()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._renew()
                self._trouble = ""
            except ImgsvcError as error:
                self._in_trouble(str(error))
            except Exception as error:  # a member whose thread dies would never have a lease again
                log.exception("lease not renewed", member=self._id)
                self._trouble = repr(error)
            self._wake.wait(_RETRY_SECONDS if self._trouble else self._ttl / 3)
            self._wake.clear()

    def _wait_to_be_seen(self, mirror: Mirror) -> None:
        """The key may be put after the records were read, and come into the mirror later; that of an earlier run may
        still be there. Who acted before that would take what it holds itself for lost."""
        deadline = time.monotonic() + _SIGHT_SECONDS
        while not self._key.is_in(mirror):
            if self._stop.is_set() or time.monotonic() > deadline:
                raise Unavailable("etcd has not told of this member yet")
            time.sleep(_SIGHT_INTERVAL)

    def _in_trouble(self, reason: str) -> None:
        if not self._trouble:
            log.warning("lease not renewed", member=self._id, reason=reason)
        self._trouble = reason

    def _renew(self) -> None:
        """One attempt, of which no step takes longer than a third of the lease."""
        # etcd counts from when it hears of it, which is later: what we believe always ends first.
        asked = _now()
        lease = self._kept()
        is_new = lease is None
        if lease is None:
            self._distrust()
            asked, lease = self._new_lease()
        elif not self._announced:
            self._announce(lease)
        with self._changed:
            self._lease, self._trusted_until = lease, asked + self._ttl
            self._changed.notify_all()
        if is_new:
            threading.Thread(target=self._restore_on, args=(lease,), name="etcd-restore", daemon=True).start()

    def _kept(self) -> int | None:
        """The lease, with its full time again; None when there is none any more."""
        if self._lease is not None:
            with contextlib.suppress(LeaseLost):
                self._etcd.keep_alive(self._lease, timeout=self._ttl / 3)
                return self._lease
        return None

    def _new_lease(self) -> tuple[float, int]:
        """When it was asked for, and the lease."""
        self._key.require_free(self._ttl / 3)
        asked = _now()
        lease = self._etcd.grant(self._ttl, timeout=self._ttl / 3)
        self._key.put(lease, self._ttl / 3)
        self._announced = True
        log.info("lease granted", member=self._id, lease=f"{lease:x}")
        return asked, lease

    def _restore_on(self, lease: int) -> None:
        """Beside the thread that keeps the lease: thousands of keys may take longer than it lasts."""
        while not self._stop.is_set() and self._lease == lease:
            try:
                for restore in self._restore:
                    restore(lease)
            except ImgsvcError as error:
                log.info("what was on the lost lease is not on the new one yet", reason=str(error))
                self._stop.wait(_RETRY_SECONDS)
            except Exception:  # whoever it is will find its key gone
                log.exception("what was on the lost lease is not on the new one")
                return
            else:
                return

    def _announce(self, lease: int) -> None:
        """Again, on the lease that there is. Where another member has taken our name meanwhile, we own nothing."""
        try:
            self._key.require_free(self._ttl / 3)
            self._key.put(lease, self._ttl / 3)
        except ImgsvcError:
            self._distrust()
            self._end_lease()
            raise
        self._announced = True

    def _distrust(self) -> None:
        with self._changed:
            self._trusted_until = 0.0

    def _key_lost(self) -> None:
        self._announced = False
        self._wake.set()

    def _end_lease(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            with contextlib.suppress(ImgsvcError):
                self._etcd.revoke(lease, timeout=1)


class NoLease:
    """For who works on records beside the member itself, and transfers nothing."""

    def lease(self, lost: int | None = None) -> int:  # noqa: ARG002 - as the protocol has it
        raise Unavailable("there is no lease on etcd for this work")

    def on_new_lease(self, restore: Callable[[int], None]) -> None:
        """There will be none."""
