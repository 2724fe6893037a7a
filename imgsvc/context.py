"""Opens the stores, puts the services together, and closes all in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from imgsvc.checks import Checks
from imgsvc.cluster.cache import Cache
from imgsvc.cluster.choice import Choice
from imgsvc.cluster.copies import Copies
from imgsvc.cluster.history import History
from imgsvc.cluster.orders import Orders
from imgsvc.cluster.peers import Peers, Signatures
from imgsvc.cluster.presence import has_room
from imgsvc.cluster.pulls import Pulls
from imgsvc.cluster.replicator import Replicator
from imgsvc.cluster.supply import Supply
from imgsvc.cluster.takeover import Takeover
from imgsvc.cluster.this_member import ThisMember
from imgsvc.digests import Digests
from imgsvc.errors import NotFound
from imgsvc.fetcher import Fetcher
from imgsvc.images.store import is_stored
from imgsvc.maintenance import Maintenance
from imgsvc.metadata.mirror import LiveMember, Mirror
from imgsvc.pools import Pool
from imgsvc.room import Room
from imgsvc.scrubber import Scrubber
from imgsvc.service import ImageService
from imgsvc.settings import Settings
from imgsvc.settlements import Settlements
from imgsvc.stores import closed_by, open_images, open_records, this_member
from imgsvc.transfers import Transfers
from imgsvc.uploads import Uploads

# Within which a request gets its answer although a store hangs: soon enough for one that promises it within ten.
_ANSWER_SECONDS = 8.0

log = structlog.get_logger()


class Context:
    """Everything that a running service consists of, below HTTP.

    `not_ready` says why images cannot be served or taken, None when they can.
    """

    def __init__(self, settings: Settings, port: int) -> None:
        """Opens the stores; `port` is the one that the service listens on. Raises ConfigError."""
        self.settings = settings
        # Seconds that an upload whose bytes are whole waits for the records: as long as a cluster may need.
        self.grace = settings.cluster.etcd_grace if settings.metadata_store.type == "etcd" else 0.0
        self.not_ready: str | None = "the service is starting"
        self._background: set[asyncio.Task[None]] = set()
        self._following = False
        self._settled = threading.Event()
        self._closing = False
        with contextlib.ExitStack() as opened:
            # One for each processor of a small machine: hashing is all that they do.
            self._hashers = ThreadPoolExecutor(2, thread_name_prefix="hash")
            opened.callback(self._hashers.shutdown)
            self.records_pool = closed_by(opened, Pool("records", 16, patience=1.5, limit=_ANSWER_SECONDS))
            # For who only reads, and may be answered from memory while the others wait for etcd. Hundreds of clients may
            # come at once, to a machine that is busy with others.
            self.looks_pool = closed_by(opened, Pool("looks", 8, patience=4.0, limit=_ANSWER_SECONDS))
            self.ends_pool = closed_by(opened, Pool("ends", 16, limit=min(_ANSWER_SECONDS, self.grace or math.inf)))
            self.reads_pool = closed_by(opened, Pool("reads", 8))
            self.bytes_pool = closed_by(opened, Pool("bytes", 8))
            # One waits in each for other members to copy an image.
            self.copies_pool = closed_by(opened, Pool("copies", 64))
            self.health_pool = closed_by(opened, Pool("health", 2, patience=1.5))
            self.members_pool = closed_by(opened, Pool("members", 1, patience=1.5))
            self.images = closed_by(opened, open_images(settings))
            member = this_member(settings, self.images, port)
            self.member_id = member.id
            self._this = ThisMember(member, self.images)
            self.signatures = Signatures(settings.cluster.secret, member.id)
            self.peers = Peers(self.signatures, settings.cluster.peer_timeout)
            self.mirror = Mirror() if settings.metadata_store.type == "etcd" else None
            self.records, self._membership = open_records(
                settings, member, opened, self._this, self.mirror, position=self.images.remembered("records")
            )
            self._wire()
            self._opened = opened.pop_all()

    def _wire(self) -> None:
        settlements = Settlements(self.images, self.records)
        cluster, known = self.settings.cluster, self.mirror or Mirror()
        fits = functools.partial(has_room, self.settings.disk_reserve.of)
        self._orders = Orders(self.mirror, self.peers, self._this.id, fits)
        self._cache = Cache(
            known,
            self.images,
            self.records,
            me=self._this.id,
            wanted=cluster.replicas,
            high_water=cluster.cache_high_water,
            may_work=self._is_trusted,
        )
        room = Room(self.images, self.settings.max_image_size, self.settings.disk_reserve.of, self._cache.make_room)
        self.transfers = Transfers(self.images, self.records, room, settlements, hashers=self._hashers)
        self.fetcher = Fetcher(self.settings.fetch, self.images, self.records, self.transfers, settlements)
        self._digests = Digests(self.images, self.records)
        self.pulls = self._make_pulls(settlements, room)
        self.copies = Copies(self.pulls, self.records.get, self._has)
        self.checks = Checks(self.images, self.records, held=self._is_held, damaged=self.copies.mend)
        self.service = ImageService(
            self.images,
            self.records,
            self.transfers,
            self.fetcher,
            settlements=settlements,
            digests=self._digests,
            pulls=self.pulls,
            orders=self._orders,
            served=self._cache.served,
            damaged=self.checks.submit,
            me=self._this.id,
        )
        self.uploads = Uploads(
            self.images, self.records, self.transfers, settlements, expire=self.settings.uploads.expire
        )
        self._takeover = None if self.mirror is None else self._new_takeover(self.mirror)
        self._history = History(self.images, self.records)
        self._maintenance = Maintenance(self.images, self.records, self.fetcher, self.uploads, self._digests)
        self._replicator = Replicator(
            known, self.pulls, cluster, me=self._this.id, fits=fits, may_work=self._is_trusted
        )
        self._scrubber = Scrubber(self.settings.scrub, self.images, self.records, self._damaged)

    def _make_pulls(self, settlements: Settlements, room: Room) -> Pulls:
        supply = Supply(
            Choice(self.mirror or Mirror(), self._this.id),
            self.signatures,
            self.settings.cluster.peer_timeout,
            self.peers.check,
        )
        return Pulls(
            self.images,
            self.records,
            self.transfers,
            room,
            settlements,
            supply=supply,
            hashers=self._hashers,
            doubt=functools.partial(self._digests.submit, doubted=True),
        )

    def _new_takeover(self, mirror: Mirror) -> Takeover:
        return Takeover(
            self._this.id,
            mirror,
            self.records,
            self.fetcher,
            self.transfers,
            uploads=self.uploads,
            may_work=lambda: self.not_ready is None and self._is_trusted(),
            lease_ttl=self.settings.cluster.lease_ttl,
        )

    def settle(self) -> None:
        """Settles what the last run left, and lets work begin. Raises Unavailable or NoSpace when a store cannot, and
        may then be called again; ConfigError when the stores do not belong together."""
        if self._membership is not None and self.mirror is not None:
            self._membership.take_place(self.images, self.mirror)
        if not self._following:
            # Before the sweep, so that what is deleted during it is not missed.
            self.records.follow_deletions(self._deleted_elsewhere, self._deletions_missed)
            self._following = True
        self._maintenance.start_sweep()
        self.transfers.start()
        self.fetcher.start()
        self.uploads.start()
        self._digests.start()
        self._scrubber.start()
        if self._membership is not None and self.mirror is not None:
            self._membership.stay_in(self.mirror)
            self._history.start()
            self.checks.start()
            self.mirror.listen(self.pulls.changed)
            self._replicator.start()
            self._cache.start()
        if self._takeover is not None:
            self._takeover.start()
        self._settled.set()
        self.not_ready = None

    def members(self) -> Sequence[LiveMember]:
        """The live ones, in the order of their ids: this one, where records are not shared. That may block."""
        if self.mirror is None:
            return [self._this.measured()]
        return sorted(self.mirror.members().values(), key=lambda member: member.id)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Has `work` done although no request waits for it; `finish_background` does."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def finish_background(self) -> None:
        while self._background:
            await asyncio.wait(self._background)

    def stop_work(self) -> None:
        """Ends what nobody waits for, and leaves it to the next start, or to another member."""
        self._replicator.stop()
        self.pulls.stop_copies()
        self.fetcher.close()

    def close(self) -> None:
        """Ends all work, settles what can be, and closes the stores."""
        self._closing = True
        self._settled.set()
        if self._takeover is not None:
            self._takeover.close()
        self._orders.close()
        self._replicator.stop()
        self._cache.close()
        self._scrubber.close()
        self.checks.close()
        self.pulls.close()
        self._replicator.close()
        self.copies.close()
        self._digests.close()
        self.fetcher.close()
        self.uploads.close()
        self.transfers.close()
        self._history.close()
        self._opened.close()

    def _is_trusted(self) -> bool:
        """Whether this member is one of the cluster for certain at this moment, by a lease that cannot have run out."""
        return self._membership is not None and self._membership.lease_id is not None

    def _is_held(self, image_id: str) -> bool:
        """Whether this member is on record as holding the image. Never blocks."""
        try:
            return self.mirror is not None and self._this.id in self.mirror.get(image_id).replicas
        except NotFound:
            return False

    def _has(self, image_id: str) -> bool:
        """Whether it is held, and its file there, too."""
        return self._is_held(image_id) and is_stored(self.images, image_id)

    def _damaged(self, image_id: str) -> None:
        """Of an image that the scrub has set aside: another member may have it."""
        if self.mirror is not None:
            self.copies.mend(image_id)

    def _deleted_elsewhere(self, image_id: str) -> None:
        self._settled.wait()
        if not self._closing:
            self.service.drop(image_id)

    def _deletions_missed(self) -> None:
        self._settled.wait()
        if not self._closing:
            self._maintenance.reconcile()
            self.transfers.reconcile()
            self.pulls.reconcile()
