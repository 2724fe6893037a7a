"""The steps of a run of faults, done to a real cluster."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from tests.cluster_of_three import ClusterOfThree, Member
from tests.faults.clients import Clients
from tests.faults.disks import Disks
from tests.faults.model import Model
from tests.faults.plan import Step


class Deeds:
    def __init__(self, cluster: ClusterOfThree, model: Model, disks: Disks, clients: Clients) -> None:
        self._cluster = cluster
        self._etcd = cluster.etcd
        self._model = model
        self._disks = disks
        self._clients = clients
        self._members = {member.name: member for member in cluster.members}
        to_members: dict[str, Callable[[Member, random.Random], object]] = {
            "kill": lambda member, _: member.kill(),
            "start": lambda member, _: self._start(member),
            "freeze": lambda member, _: self._freeze(member),
            "cont": lambda member, _: member.cont(),
            "kill and start": self._kill_and_start,
            "freeze and cont": self._freeze_and_cont,
            "cut from etcd": lambda member, _: cluster.cut_from_etcd(member),
            "cut from peers": lambda member, _: cluster.cut_from_peers(member),
            "join": lambda member, _: cluster.join(member),
            "rot": self._rot,
            "fill": lambda member, _: disks.fill(member),
            "free": lambda member, _: disks.free(member),
        }
        to_etcd: dict[str, Callable[[int], object]] = {
            "etcd kill": self._etcd.kill,
            "etcd start": self._start_etcd,
            "etcd freeze": self._freeze_etcd,
            "etcd cont": self._start_etcd,
        }
        to_all: dict[str, Callable[[], object]] = {
            "etcd kill leader": self._kill_leader,
            "etcd kill all": self._kill_etcd,
            "etcd start all": self._etcd.restore,
        }
        self._to_members, self._to_etcd, self._to_all = to_members, to_etcd, to_all

    def do(self, step: Step) -> None:
        """What cannot be done now, such as killing who is dead, is left out."""
        chance = step.random
        for work, where in step.work:
            asked = self._who_answers(where)
            if asked is not None:
                self._clients.begin(work, asked, random.Random(chance.getrandbits(64)))
        time.sleep(step.pause[0])
        self._do(step, chance)
        time.sleep(step.pause[1])

    def _do(self, step: Step, chance: random.Random) -> None:
        if step.deed in self._to_etcd:
            self._to_etcd[step.deed](int(step.where))
        elif step.deed in self._to_all:
            self._to_all[step.deed]()
        elif step.deed in self._to_members:
            self._to_members[step.deed](self._members[step.where], chance)

    def heal(self) -> None:
        """Undoes all that was done; returns when every member is ready."""
        self._cluster.heal()
        self._etcd.restore()
        for member in self._cluster.members:
            self._disks.free(member)
        self._cluster.start()

    def _who_answers(self, name: str) -> Member | None:
        """That member, else the next that answers."""
        names = sorted(self._members)
        first = names.index(name)
        ordered = [self._members[each] for each in names[first:] + names[:first]]
        return next((member for member in ordered if member.answers), None)

    def _start(self, member: Member) -> None:
        if not member.runs:
            member.start(wait=False)
            member.wait_listening()

    def _freeze(self, member: Member) -> None:
        if member.answers:
            member.freeze()

    def _kill_and_start(self, member: Member, chance: random.Random) -> None:
        member.kill()
        time.sleep(chance.choice([0, 0, chance.uniform(0, 1)]))
        self._start(member)

    def _freeze_and_cont(self, member: Member, chance: random.Random) -> None:
        self._freeze(member)
        time.sleep(chance.uniform(0, 3.5))
        member.cont()

    def _kill_leader(self) -> None:
        try:
            leader = self._etcd.leader()
        except (AssertionError, OSError):
            leader = 0  # none leads at this moment
        self._etcd.kill(leader)

    def _kill_etcd(self) -> None:
        for i in range(3):
            self._etcd.kill(i)

    def _start_etcd(self, i: int) -> None:
        if i in self._etcd.frozen:
            self._etcd.cont(i)
        elif i not in self._etcd.answering():
            self._etcd.start(i)

    def _freeze_etcd(self, i: int) -> None:
        if i in self._etcd.answering():
            self._etcd.stop(i)

    def _rot(self, member: Member, chance: random.Random) -> None:
        """Never the last good copy."""
        whole = [
            image_id
            for image_id, sha256 in self._model.kept().items()
            if self._disks.digest(member, image_id) == sha256
            and sum(self._disks.digest(other, image_id) == sha256 for other in self._cluster.members) > 1
        ]
        if whole:
            self._disks.rot(member, chance.choice(whole), chance.getrandbits(32))
