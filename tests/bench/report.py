"""From the figures of all rounds to tables, and to a file for programs."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench.row import Figures, Goal

_LOAD = "load average"


class Report:
    """Collects rounds; a figure that a round lacks was not measured in it."""

    def __init__(self, goals: Sequence[Goal]) -> None:
        self._goals = goals
        self._rounds: list[Figures] = []

    def begin_round(self) -> None:
        self._rounds.append({_LOAD: os.getloadavg()[0]})

    def add(self, figures: Figures) -> None:
        self._rounds[-1].update(figures)

    def text(self) -> str:
        """Every figure of every round, and what became of the goals."""
        count = len(self._rounds)
        rounds = [["figure", *(str(number + 1) for number in range(count)), "median"]]
        rounds += [[name, *self._row(name), _number(self._median(name))] for name in self._names()]
        goals = [["work", "imgsvc", "reference", "", "ratio", "reach", "aim", ""], *self._verdicts()]
        return f"{_table(rounds)}\n\n{_table(goals)}"

    def write(self, path: Path) -> None:
        """All of it as JSON."""
        document: dict[str, Any] = {
            "machine": {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
            "rounds": self._rounds,
            "medians": {name: self._median(name) for name in self._names()},
            "goals": [asdict(goal) | {"value": self._value(goal)} for goal in self._measured()],
        }
        path.write_text(json.dumps(document, indent=1) + "\n")

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for figures in self._rounds for name in figures))

    def _row(self, name: str) -> Iterator[str]:
        for figures in self._rounds:
            yield _number(figures[name]) if name in figures else ""

    def _median(self, name: str) -> float:
        return statistics.median(figures[name] for figures in self._rounds if name in figures)

    def _measured(self) -> Iterator[Goal]:
        names = self._names()
        return (goal for goal in self._goals if goal.ours in names)

    def _value(self, goal: Goal) -> float:
        ours = self._median(goal.ours)
        return ours / self._median(goal.reference) if goal.reference else ours

    def _verdicts(self) -> Iterator[list[str]]:
        for goal in self._measured():
            value = self._value(goal)
            reference = _number(self._median(goal.reference)) if goal.reference else ""
            ratio = _number(value) if goal.reference else ""
            yield [
                goal.work,
                _number(self._median(goal.ours)),
                reference,
                goal.unit,
                ratio,
                _number(goal.reach),
                _number(goal.aim),
                goal.verdict(value),
            ]


def _number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.1 else 4}f}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown, for it goes into notes."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    padded = [
        [
            cell.ljust(width) if not number else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
