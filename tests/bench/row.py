"""What a row of the table is: a name, its goals, and one round of measuring it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from tests.bench.stage import Stage

# What one round of a row gives, by name. Seconds, unless a goal that uses the figure says otherwise.
Figures = dict[str, float]


@dataclass(frozen=True)
class Goal:
    """One line of the table: the median of `ours`, divided by that of `reference` where there is one."""

    work: str
    ours: str
    reference: str
    reach: float
    aim: float
    unit: str = "s"
    more_is_better: bool = False

    def verdict(self, value: float) -> str:
        """Which goal a value reaches, to two digits: "as fast as" is not missed by a thousandth."""
        value = round(value, 2)
        for name, limit in (("aim", self.aim), ("reach", self.reach)):
            if value >= limit if self.more_is_better else value <= limit:
                return name
        return "short"


class Row(ABC):
    """Something to measure, against its reference in the same round."""

    name: ClassVar[str]
    programs: ClassVar[tuple[str, ...]] = ()
    goals: ClassVar[tuple[Goal, ...]]
    # A row that takes long, or whose figure hardly varies, is left out of the rounds after this one.
    rounds: ClassVar[int] = 1_000

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    @abstractmethod
    def measure(self) -> Figures:
        """One round."""
