"""What a run of faults does, in which order: all of it follows from the seed, and nothing from what then happens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

_MEMBERS = "abc"
_ETCD = "012"

# What clients do, and how often beside the others.
_WORK = {"upload": 6, "post": 5, "delete": 3, "read": 2}
# Each fault, and what ends it.
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
    "kill": 6,
    "freeze": 4,
    "kill and start": 4,
    "freeze and cont": 3,
    "etcd kill": 2,
    "etcd kill leader": 2,
    "etcd freeze": 2,
    "etcd kill all": 1,
    "cut from etcd": 3,
    "cut from peers": 3,
    "rot": 2,
    "fill": 1,
}
PARTITIONS = frozenset({"cut from etcd", "cut from peers"})
FULL_DISKS = frozenset({"fill"})


@dataclass(frozen=True)
class Step:
    """`deed` is done to, or at, `where`: a member, a member of etcd, or nothing. `chance` is for what the deed leaves
    open, and `pause` the seconds after it."""

    number: int
    deed: str
    where: str
    chance: int
    pause: float

    @property
    def random(self) -> random.Random:
        return random.Random(self.chance)

    def __str__(self) -> str:
        return f"{self.number:3} {self.deed} {self.where}, then {self.pause:.2f} s"


def plan(seed: int, count: int, without: frozenset[str] = frozenset()) -> Iterator[Step]:
    """`without` are faults that cannot be had here. Not more than two members are away at once, for then there is
    nothing to see."""
    chance = random.Random(seed)
    active: list[tuple[str, str]] = []
    for number in range(count):
        deed, where = _next(chance, active, without)
        pause = chance.choice([0, 0, 0.1, chance.random(), chance.random()])
        yield Step(number, deed, where, chance.getrandbits(64), pause)


def _next(chance: random.Random, active: list[tuple[str, str]], without: frozenset[str]) -> tuple[str, str]:
    draw = chance.random()
    if active and draw < 0.12 * len(active):
        fault, where = active.pop(chance.randrange(len(active)))
        return _HEALING[fault], where
    if draw > 0.45:
        possible = {fault: weight for fault, weight in _FAULTS.items() if fault not in without}
        fault = _weighted(chance, possible)
        place = _place_for(chance, fault, active)
        if place is not None:
            if fault in _HEALING:
                active.append((fault, place))
            return fault, place
    return _weighted(chance, _WORK), chance.choice(_MEMBERS)


def _weighted(chance: random.Random, weights: dict[str, int]) -> str:
    return chance.choices(list(weights), list(weights.values()))[0]


def _place_for(chance: random.Random, fault: str, active: list[tuple[str, str]]) -> str | None:
    """None when there is no place for it now."""
    if fault.startswith("etcd"):
        harmed = [where for each, where in active if each.startswith("etcd")]
        if "" in harmed or (harmed and fault in ("etcd kill all", "etcd kill leader")):
            return None
        if fault in ("etcd kill all", "etcd kill leader"):
            return ""
        return chance.choice(sorted(set(_ETCD) - set(harmed)) or [None])
    away = {where for each, where in active if each in ("kill", "freeze")}
    if fault in ("kill", "freeze") and len(away) > 1:
        return None
    return chance.choice(sorted(set(_MEMBERS) - {where for _, where in active}) or [None])
