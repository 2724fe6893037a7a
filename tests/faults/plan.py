"""What a run of faults does, in which order: all of it follows from the seed, and nothing from what then happens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

_MEMBERS = "abc"
_ETCD = "012"

# What clients do, and how often beside the others.
_WORK = {"upload": 5, "post": 5, "piece": 3, "delete": 3, "read": 2}
# How much of it before the first fault.
_AT_FIRST = 8
# Each fault that lasts, and what ends it.
_HEALING = {
    "kill": "start",
    "freeze": "cont",
    "etcd kill": "etcd start",
    "etcd freeze": "etcd cont",
    "etcd kill leader": "etcd start all",
    "etcd kill all": "etcd start all",
    "cut from etcd": "join",
    "cut from peers": "join",
    "fill": "free",
}
_FAULTS = {
    "kill": 5,
    "freeze": 4,
    "kill and start": 4,
    "freeze and cont": 3,
    "etcd kill": 2,
    "etcd kill leader": 2,
    "etcd freeze": 2,
    "etcd kill all": 1,
    "cut from etcd": 4,
    "cut from peers": 4,
    "rot": 3,
    "fill": 2,
}
# The part of the steps in which each of them ends. Without etcd there is little to see.
_HEALED = 0.18
_ETCD_HEALED = 0.5
PARTITIONS = frozenset({"cut from etcd", "cut from peers"})
FULL_DISKS = frozenset({"fill"})

Active = list[tuple[str, str]]


@dataclass(frozen=True)
class Step:
    """First clients begin their `work`, each at a member; then the `deed` is done to `where`: a member, a member of etcd,
    or nothing. `chance` is for what is left open, and `pause` the seconds before and after the deed."""

    number: int
    work: tuple[tuple[str, str], ...]
    deed: str
    where: str
    chance: int
    pause: tuple[float, float]

    @property
    def random(self) -> random.Random:
        return random.Random(self.chance)

    def __str__(self) -> str:
        work = ", ".join(f"{each} {member}" for each, member in self.work)
        before, after = self.pause
        return (
            f"{self.number:3} {work or 'no work'}; after {before:.2f} s: {self.deed} {self.where}; then {after:.2f} s"
        )


def plan(seed: int, count: int, without: frozenset[str] = frozenset()) -> Iterator[Step]:
    """`without` are faults that cannot be had here. Not more than two members are away at once, for then there is
    nothing to see."""
    chance = random.Random(seed)
    yield Step(0, tuple(_work(chance) for _ in range(_AT_FIRST)), "nothing", "", chance.getrandbits(64), (0, 1))
    active: Active = []
    for number in range(1, count + 1):
        work = tuple(_work(chance) for _ in range(chance.choice([0, 1, 1, 1, 2])))
        deed, where = _healing(chance, active) or _fault(chance, active, without)
        pause = chance.choice([0, chance.random()]), chance.choice([0, 0, chance.random()])
        yield Step(number, work, deed, where, chance.getrandbits(64), pause)


def _work(chance: random.Random) -> tuple[str, str]:
    return _weighted(chance, _WORK), chance.choice(_MEMBERS)


def _healing(chance: random.Random, active: Active) -> tuple[str, str] | None:
    for fault, where in list(active):
        if chance.random() < (_ETCD_HEALED if fault.startswith("etcd") else _HEALED):
            active.remove((fault, where))
            return _HEALING[fault], where
    return None


def _fault(chance: random.Random, active: Active, without: frozenset[str]) -> tuple[str, str]:
    possible = {fault: weight for fault, weight in _FAULTS.items() if fault not in without}
    while True:
        fault = _weighted(chance, possible)
        places = _places(fault, active)
        if places:
            where = chance.choice(places)
            if fault in _HEALING:
                active.append((fault, where))
            return fault, where


def _weighted(chance: random.Random, weights: dict[str, int]) -> str:
    return chance.choices(list(weights), list(weights.values()))[0]


def _places(fault: str, active: Active) -> list[str]:
    """Those for which it is the right moment."""
    if fault.startswith("etcd"):
        harmed = [where for each, where in active if each.startswith("etcd")]
        if fault in ("etcd kill leader", "etcd kill all"):
            return [] if harmed else [""]
        return [] if "" in harmed else sorted(set(_ETCD) - set(harmed))
    if fault in ("rot", "kill and start", "freeze and cont"):
        return list(_MEMBERS)
    away = {where for each, where in active if each in ("kill", "freeze")}
    if fault in ("kill", "freeze"):
        return sorted(set(_MEMBERS) - away) if len(away) < 2 else []
    return sorted(set(_MEMBERS) - {where for each, where in active if each not in ("kill", "freeze")})
