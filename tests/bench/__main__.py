"""`make bench`: measures every row of the table, and says what became of the goals. README.md says how."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.fan_out import FanOut
from tests.bench.many_records import Records
from tests.bench.programs import complain_of_missing
from tests.bench.records import Get, Known, List
from tests.bench.report import Report
from tests.bench.row import Row
from tests.bench.stage import MIB, Sizes, Stage
from tests.bench.transfers import Download, Fetch, Limited, Upload
from tests.bench.under_load import Busy, Memory

ROWS: tuple[type[Row], ...] = (Upload, Fetch, Download, Limited, Get, List, Known, Memory, Busy, Records, FanOut)


def main() -> None:
    options = _parser().parse_args()
    wanted = [row for row in ROWS if row.name in options.only]
    complain_of_missing([program for row in wanted for program in row.programs])
    # So that an end by SIGTERM takes the children along, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: terminated"))
    report = Report([goal for row in wanted for goal in row.goals])
    try:
        with Stage(Sizes(options.size * MIB, options.limited_size * MIB, options.records), options.dir) as stage:
            _measure(stage, wanted, options.rounds, report)
    except KeyboardInterrupt:
        sys.exit("bench: interrupted")
    sys.stdout.write(report.text() + "\n")
    if options.json is not None:
        report.write(options.json)


def _measure(stage: Stage, wanted: Sequence[type[Row]], rounds: int, report: Report) -> None:
    rows = [row(stage) for row in wanted]
    for number in range(rounds):
        stage.round = number
        report.begin_round()
        for row in rows:
            if number < row.rounds:
                _say(f"round {number + 1} of {rounds}: {row.name} (load {os.getloadavg()[0]:.1f})")
                report.add(row.measure())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    names = [row.name for row in ROWS]
    parser.add_argument("--rounds", type=int, default=7, help="of which the medians count; default 7")
    parser.add_argument("--only", type=_names, default=names, metavar="ROW,ROW", help=f"of {', '.join(names)}")
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the image; default 1024")
    parser.add_argument(
        "--limited-size", type=int, default=256, metavar="MIB", help="of the image of the limited source; default 256"
    )
    parser.add_argument(
        "--records", type=int, default=100_000, metavar="IMAGES", help="in the etcd of a cluster; default 100000"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("/var/tmp"), help="on a disk with room for six images; default /var/tmp"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go, for programs")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - {row.name for row in ROWS}
    if unknown:
        raise argparse.ArgumentTypeError(f"no such row: {', '.join(sorted(unknown))}")
    return names


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    main()
