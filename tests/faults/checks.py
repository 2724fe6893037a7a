"""What must hold after every step of a run of faults.

Wrong bytes and an image that is told twice are failures at once. What is not there yet is a trouble, which must be over
within some seconds: a member may just have died, and nobody knows of it yet.
"""

from __future__ import annotations

import http.client
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from imgsvc.metadata.image import Status
from tests.client import Answer
from tests.cluster_of_three import LEASE, ClusterOfThree, Member, Stored
from tests.faults.disks import Disks
from tests.faults.model import Model, digest

# A trouble lasts no longer: three leases, a start, and what a busy machine takes.
PATIENCE = 3 * LEASE + 12.0
# How many images are downloaded from each member after a step.
_SAMPLE = 6
_START_SECONDS = 20.0
# The part of the steps after which it is waited for transfers without an owner.
_WAITS = 0.3
_CUT = (OSError, http.client.HTTPException)
_ENDED = (Status.COMPLETE, Status.ERROR)


class Checks:
    def __init__(self, cluster: ClusterOfThree, model: Model, disks: Disks) -> None:
        self._cluster = cluster
        self._model = model
        self._disks = disks
        # By name: the process that has been ready, and when the one that runs was first seen.
        self._ready: dict[str, int] = {}
        self._seen: dict[str, tuple[int, float]] = {}
        # By process: the images that it has been seen to know of.
        self._knows: dict[int, set[str]] = {}
        # Since when a transfer has had no owner.
        self._orphans: dict[str, float] = {}

    def hold(self, chance: random.Random) -> None:
        """Returns when there is no trouble; fails when there is one for too long. Now and then it waits for what a member
        that is gone was transferring, too: others must see to that."""
        waits = chance.random() < _WAITS

        def troubles() -> list[str]:
            found = self._troubles(_sampled(self._model.kept(), chance))
            return [*found, *self._given_up()] if waits else found

        self._until(troubles, PATIENCE)

    def hold_for_all(self) -> None:
        """As `hold`, when every fault is over and nobody asks for anything: all has settled everywhere."""

        def troubles() -> list[str]:
            return [*self._troubles(self._model.kept()), *self._unsettled()]

        self._until(troubles, 2 * PATIENCE)

    def _until(self, troubles: Callable[[], list[str]], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while found := troubles():
            assert time.monotonic() < deadline, f"after {seconds:.0f} s:\n" + "\n".join(found)
            time.sleep(0.1)

    def _troubles(self, wanted: Mapping[str, str]) -> list[str]:
        with ThreadPoolExecutor(3) as pool:
            of_members = pool.map(lambda member: list(self._at(member, wanted)), self._cluster.live())
            found = [trouble for each in of_members for trouble in each]
        return [*found, *self._in_etcd()]

    # At one member.

    def _at(self, member: Member, wanted: Mapping[str, str]) -> Iterator[str]:
        if not self._is_ready(member):
            if self._cluster.reaches_etcd(member) and self._age(member) > _START_SECONDS:
                yield f"{member.name} is not ready"
            return
        try:
            pid, kept = member.pid, self._model.kept()
            troubles = [*self._list(member), *self._bytes(member, wanted), *self._disk(member)]
            yield from (f"{member.name}: {trouble}" for trouble in troubles)
            if not troubles and self._cluster.reaches_etcd(member):
                self._knows[pid] = set(kept)
        except _CUT as error:
            yield f"{member.name} did not answer: {error!r}"

    def _is_ready(self, member: Member) -> bool:
        """Whether the process that runs has been ready: from then on it knows the records."""
        if self._ready.get(member.name) != member.pid and member.is_ready():
            self._ready[member.name] = member.pid
        return self._ready.get(member.name) == member.pid

    def _age(self, member: Member) -> float:
        if self._seen.get(member.name, (0, 0.0))[0] != member.pid:
            self._seen[member.name] = member.pid, time.monotonic()
        return time.monotonic() - self._seen[member.name][1]

    def _list(self, member: Member) -> Iterator[str]:
        kept, gone = self._model.kept(), self._model.gone()
        answer = member.get("/images")
        connected = self._cluster.reaches_etcd(member)
        if answer.status != 200:
            yield f"the list is {answer.status}"
            return
        stale = "X-Imgsvc-Stale" in answer.headers
        if stale and connected:
            yield "the list is stale"
        if stale or not connected:
            return
        listed = {image["id"]: image for image in answer.json()}
        yield from (f"the list has image {each}, which was deleted" for each in gone & listed.keys())
        for image_id in kept:
            if listed.get(image_id, {}).get("status") != "complete":
                yield f"the list does not have image {image_id} as complete: {listed.get(image_id)}"
        sources = Counter(image["source"] for image in listed.values() if image["source"])
        yield from (f"{source} has {count} images" for source, count in sources.items() if count > 1)

    def _bytes(self, member: Member, wanted: Mapping[str, str]) -> Iterator[str]:
        peers = {peer["id"] for peer in member.get("/members").json()} | {member.id}
        yield from (f"{each} is not among the members" for each in self._connected(member) - peers)
        for image_id, sha256 in wanted.items():
            must = self._can_be_had(member, image_id, sha256, peers)
            rotten = self._disks.is_rotten(member, image_id)
            answer = member.download(image_id)
            if image_id not in self._model.kept():
                continue
            if answer.status == 200 and digest(answer.body) != sha256:
                assert rotten or self._disks.is_rotten(member, image_id), f"{member.name}: image {image_id} is wrong"
                # Who does not hear of etcd does not know what the right bytes would be.
                if self._cluster.reaches_etcd(member):
                    yield f"image {image_id} has rotten"
            elif answer.status != 200 and (must or not self._may_be_away(member, image_id, answer)):
                yield f"image {image_id}, of {must or 'nobody who lives'}: {answer.status} {answer.body[:300]!r}"

    def _may_be_away(self, member: Member, image_id: str, answer: Answer) -> bool:
        """Whether it says who has it; from one that does not hear of etcd only of what it knew before."""
        knows = self._cluster.reaches_etcd(member) or image_id in self._knows.get(member.pid, ())
        named = any(name in answer.message for other in self._cluster.members for name in (other.url, other.id))
        return (answer.status == 503 and named) or (answer.status in (404, 503) and not knows)

    def _connected(self, member: Member) -> set[str]:
        """Those that a member which hears of etcd must know to be live: they hear of it as well."""
        if not self._cluster.reaches_etcd(member):
            return set()
        live = self._cluster.live()
        return {other.id for other in live if self._is_ready(other) and self._cluster.reaches_etcd(other)}

    def _can_be_had(self, member: Member, image_id: str, sha256: str, peers: Collection[str]) -> str:
        """The name of one of the `peers` that lives, is known to hold it and does, and can be asked by this one."""
        answer = member.get(f"/images/{image_id}")
        known = answer.json()["replicas"] if answer.status == 200 else []
        for holder in self._cluster.live():
            asked = holder is member or self._cluster.reaches(member, holder)
            has = holder.id in known and holder.id in peers and self._disks.digest(holder, image_id) == sha256
            if asked and has and self._is_ready(holder):
                return holder.name
        return ""

    def _disk(self, member: Member) -> Iterator[str]:
        """What was deleted is gone, and nothing is wrong but what we damaged."""
        stored, digests = member.stored(), self._model.kept()
        if self._cluster.reaches_etcd(member):
            yield from (f"image {each} was deleted, and is on the disk" for each in stored & self._model.gone())
        for image_id in stored & digests.keys():
            found = self._disks.digest(member, image_id)
            wrong = found not in ("", digests[image_id]) and not self._disks.is_rotten(member, image_id)
            assert not wrong, f"{member.name} has wrong bytes of image {image_id} on its disk"

    # In etcd.

    def _in_etcd(self) -> Iterator[str]:
        try:
            stored = self._cluster.stored()
        except OSError:
            self._orphans.clear()
            return
        images = {image_id: each for image_id, each in stored.items() if each.image is not None}
        sources = Counter(each.image.source for each in images.values() if each.image and each.image.source)
        twice = [source for source, count in sources.items() if count > 1]
        assert not twice, f"two images have one source: {twice}"
        back = self._model.gone() & images.keys()
        assert not back, f"deleted images are in etcd: {back}"
        for image_id in self._model.kept():
            assert image_id in images or image_id not in self._model.kept(), f"image {image_id} is lost"
        yield from self._without_owner(images)

    def _without_owner(self, images: Mapping[str, Stored]) -> Iterator[str]:
        """Images in transfer whose owner has died; those who could take them over have three leases for it."""
        orphans = {each for each, stored in images.items() if stored.image and stored.image.in_transfer}
        orphans = {each for each in orphans if not images[each].owner and images[each].waits_until < time.time()}
        now = time.monotonic()
        self._orphans = {each: self._orphans.get(each, now) for each in orphans} if self._able() else {}
        for image_id, since in self._orphans.items():
            if now > since + 3 * LEASE:
                yield f"image {image_id} has been in transfer without an owner for {now - since:.1f} s"

    def _given_up(self) -> Iterator[str]:
        """Transfers whose owner is gone, whether etcd knows yet or not, as soon as somebody can see to them."""
        able = self._able()
        try:
            stored = self._cluster.stored() if able else {}
        except OSError:
            return
        there = {member.id for member in able}
        for image_id, each in stored.items():
            waits = each.image is None or not each.image.in_transfer or each.waits_until > time.time()
            if not waits and each.owner not in there:
                yield f"image {image_id} is in transfer by {each.owner or 'nobody'}, who is gone"

    def _able(self) -> list[Member]:
        """The members that are there for etcd and for clients."""
        return [each for each in self._cluster.live() if self._is_ready(each) and self._cluster.reaches_etcd(each)]

    # In the end.

    def _unsettled(self) -> Iterator[str]:
        try:
            stored = self._cluster.stored()
        except OSError as error:
            yield f"etcd: {error}"
            return
        images = {image_id: each.image for image_id, each in stored.items() if each.image is not None}
        for image in images.values():
            if image.status not in _ENDED:
                yield f"image {image.id} is still {image.status.value}, owner {stored[image.id].owner!r}"
        yield from (f"etcd has keys of image {each}, and no record" for each in stored.keys() - images.keys())
        complete = {each for each, image in images.items() if image.status is Status.COMPLETE}
        for image_id in complete:
            image, contents = images[image_id], self._model.sent | set(self._model.offered.values())
            assert image.sha256 in contents, f"nobody sent what image {image_id} has"
            yield from self._copies(image_id, stored[image_id], image.sha256)
        yield from self._fetched(images)
        for member in self._cluster.members:
            yield from (f"{member.name} still has {each} in .incoming" for each in member.incoming())
            yield from (f"{member.name} has {each}, which is not complete" for each in member.stored() - complete)

    def _copies(self, image_id: str, stored: Stored, sha256: str) -> Iterator[str]:
        holding = {member.id for member in self._cluster.members if self._disks.digest(member, image_id) == sha256}
        if holding != set(stored.replicas):
            yield f"image {image_id} is held by {sorted(holding)}, and etcd has {stored.replicas}"
        if len(holding) < self._cluster.replicas:
            yield f"image {image_id} is held by {sorted(holding)} alone"

    def _fetched(self, images: Mapping[str, object]) -> Iterator[str]:
        """Who was told that a source is fetched has the image."""
        gone, doubtful = self._model.gone(), self._model.doubtful
        for source, image_id in self._model.fetched.items():
            if image_id not in gone | doubtful and image_id not in images:
                yield f"{source} was to be image {image_id}, which is not there"


def _sampled(images: Mapping[str, str], chance: random.Random) -> Mapping[str, str]:
    return {each: images[each] for each in chance.sample(sorted(images), min(_SAMPLE, len(images)))}
