"""Transfers whose member is gone: one of the others fetches anew, or says that the upload is lost; and what others have
taken from this one is let go."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable

import structlog

from imgsvc.cluster.rendezvous import place
from imgsvc.errors import Conflict, ImgsvcError, NoSpace, NotFound, TooLarge, Unavailable
from imgsvc.fetcher import Fetcher
from imgsvc.metadata.image import Image
from imgsvc.metadata.mirror import Known, Mirror
from imgsvc.metadata.store import MetadataStore
from imgsvc.transfers import Transfers
from imgsvc.uploads import Uploads

# All in lease times, from when the owner was seen to be gone. A member that was stopped to be started again has the
# first half of one to go on with what it had. One that is live has longer: after all of etcd was frozen, all leases are
# gone at once, and each member is about to own its transfers again on a new one.
_FIRST = 0.5
_FIRST_OF_LIVE = 1.5
# Between one member's turn and the next one's, and how many have turns of their own. All others come after them, when
# all of those are in no state to do anything, at random within so long.
_TURN = 0.125
_TURNS = 6
_REST = 0.25
# From the first one's turn; a fetch that no member has room for is ended then.
_GIVEN_UP = 1.25
_INTERVAL = 1 / 16
_LONGEST_INTERVAL = 1.0

_now = time.monotonic

log = structlog.get_logger()


class Takeover:
    """Looks after all records in transfer from a thread of its own.

    Members do not agree on who takes what over: an order that all of them work out alone says who tries first, and one
    transaction, which compares the record and finds no owner, who does it. A member that does not follow the records,
    or that has no lease to rely on, takes nothing over.
    """

    def __init__(
        self,
        member: str,
        mirror: Mirror,
        records: MetadataStore,
        fetcher: Fetcher,
        transfers: Transfers,
        *,
        uploads: Uploads,
        may_work: Callable[[], bool],
        lease_ttl: float,
    ) -> None:
        """`may_work` says whether this member's lease can be relied on now, `lease_ttl` is its seconds."""
        self._member = member
        self._mirror = mirror
        self._records = records
        self._fetcher = fetcher
        self._transfers = transfers
        self._uploads = uploads
        self._may_work = may_work
        self._ttl = lease_ttl
        # Images without an owner: since when, by `time.monotonic`, and how much later than the first this member has its
        # turn.
        self._orphans: dict[str, tuple[float, float]] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="takeover", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        interval = min(self._ttl * _INTERVAL, _LONGEST_INTERVAL)
        while not self._closing.wait(interval):
            try:
                self.look()
            except Exception:  # without this thread nothing would be taken over any more
                log.exception("transfers of members that are gone not looked after")

    def look(self) -> None:
        """Once at everything: what is due is done."""
        if self._mirror.stale is not None or not self._may_work():
            # What has happened meanwhile is not known, nor what others can have done.
            self._orphans.clear()
            return
        self._let_go()
        orphans = [known for known in self._mirror.in_transfer() if self._is_orphan(known)]
        self._forget_all_but({known.id for known in orphans})
        members = self._mirror.members()
        for known in orphans:
            since, turn = self._orphans.get(known.id) or self._found(known.id, members)
            live = known.carrier is not None and known.carrier.member in members
            waited = (_now() - since) / self._ttl - (_FIRST_OF_LIVE if live else _FIRST)
            if self._closing.is_set():
                return
            if waited >= turn:
                self._take(known, last=waited >= _GIVEN_UP)

    def _is_orphan(self, known: Known) -> bool:
        """Also one that has this very member as its owner, which knows nothing of it."""
        if known.owner not in (None, self._member) or self._is_known_here(known.id):
            return False
        waits_for_its_member = known.carrier is not None and known.carrier.until > time.time()
        return not waits_for_its_member or bool(known.image.source)

    def _is_known_here(self, image_id: str) -> bool:
        """Then it is ours, or about to be again, or about to be let go."""
        return (
            self._transfers.is_known(image_id) or self._fetcher.is_waiting(image_id) or self._uploads.is_known(image_id)
        )

    def _forget_all_but(self, orphans: set[str]) -> None:
        for image_id in self._orphans.keys() - orphans:
            del self._orphans[image_id]

    def _found(self, image_id: str, members: Iterable[str]) -> tuple[float, float]:
        before = place(image_id, self._member, members, _TURNS)
        turn = before * _TURN
        if before == _TURNS:
            turn += random.uniform(0, _REST)  # noqa: S311 - no secret
        self._orphans[image_id] = _now(), turn
        return self._orphans[image_id]

    def _take(self, known: Known, *, last: bool) -> None:
        image = known.image
        try:
            if image.source:
                self._take_fetch(image, known, last=last)
            else:
                self._end(image, f"the upload was lost with {_named(known)}")
        except (Conflict, NotFound):
            # Somebody was faster, and it will be seen here who. If not, this member has its turn again.
            self._orphans.pop(image.id, None)
        except (Unavailable, NoSpace) as error:
            log.debug("transfer not taken over yet", image=image.id, reason=str(error))
        except Exception as error:  # the others are to have their turns all the same; this one has another one later
            self._orphans.pop(image.id, None)
            mistake = not isinstance(error, ImgsvcError)
            log.error("transfer not taken over", image=image.id, reason=str(error), exc_info=mistake)

    def _take_fetch(self, image: Image, known: Known, *, last: bool) -> None:
        try:
            self._transfers.admit(image.expected_size)
            self._fetcher.take(image.requeued())
        except (NoSpace, TooLarge) as error:
            if not last:
                raise NoSpace(str(error)) from error  # another member may have room for it
            self._end(image, f"the fetch was lost with {_named(known)}, and no other could take it over: {error}")
        else:
            log.info("fetch taken over", image=image.id, from_member=_named(known))

    def _end(self, image: Image, reason: str) -> None:
        self._records.update(image.progressed(0).failed(reason))
        log.info("transfer of a lost member is now in error", image=image.id, reason=reason)

    def _let_go(self) -> None:
        """Of what others have taken over, or ended, while this member was away."""
        for image_id, revision in self._transfers.revisions():
            try:
                known = self._mirror.get(image_id)
            except NotFound:
                continue  # deletions are told in another way
            # Of a revision that is not newer than what was written here, nobody else knows anything. Where there is no
            # owner, a late write of our own may have met the end of our lease.
            others = known.owner if known.carrier is None else known.owner or known.carrier.member
            if known.revision > revision and (not known.in_transfer or others not in (None, self._member)):
                reason = Conflict("the transfer was taken over or ended by another member, as this one was away")
                self._transfers.cancel(image_id, reason)


def _named(known: Known) -> str:
    carrier = known.carrier
    return "its member" if carrier is None else f"member {carrier.member} at {carrier.url}"
