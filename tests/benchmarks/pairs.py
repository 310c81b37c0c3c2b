"""Ours and the peer measured in turn, A B B A ..., and the ratio of their medians. Knows nothing of what is measured.

Figures of one run only are comparable: a machine is not equally fast twice.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import NamedTuple

Command = Sequence[str | Path]

PEAK_LIMIT = 256 << 20  # bytes; what any of our commands, or servers with all their workers, may hold at once

# Installed beside the interpreter that runs this.
QCOW2SNAP = Path(sys.executable).with_name("qcow2snap")


class Unit(Enum):
    """What is measured. Of a rate more is better, of the others less."""

    SECONDS = "time"
    RATE = "operations a second"
    BYTES = "memory"

    def show(self, value: float) -> str:
        if self is Unit.SECONDS:
            return f"{value * 1000:.0f} ms"
        return f"{value:.0f} /s" if self is Unit.RATE else f"{value / (1 << 20):.0f} MiB"

    def ratio(self, ours: float, other: float) -> float:
        """How many times as good as the other we are."""
        return ours / other if self is Unit.RATE else other / ours


class Run(NamedTuple):
    figure: float  # in the unit of the comparison
    peak: int = 0  # bytes


Measure = Callable[[], Run]


class Target(NamedTuple):
    """What we want to reach: a ratio, or a figure of ours that is no worse than this. Neither: the row informs."""

    ratio: float | None = None
    figure: float | None = None

    def show(self, unit: Unit) -> str:
        if self.figure is not None:
            return f"{'>=' if unit is Unit.RATE else '<='} {unit.show(self.figure)}"
        return "" if self.ratio is None else f">= {self.ratio:.1f}"

    def is_met(self, unit: Unit, ours: float, peer: float) -> bool:
        if self.figure is not None:
            return unit.ratio(ours, self.figure) >= 1
        return self.ratio is None or unit.ratio(ours, peer) >= self.ratio


HEADING = f"{'what':38} {'ours':>10} {'peer':>10} {'ratio':>7} {'target':>10}        {'of limit':>8} {'peak':>8}  peer"


class Comparison(NamedTuple):
    """One row of the table."""

    what: str
    peer: str  # which, and at which setting
    unit: Unit
    our_figure: float  # median
    peer_figure: float
    target: Target
    peak: int  # bytes, the most of all our runs
    limit: float | None = None  # what can be reached at all

    @property
    def met(self) -> bool:
        return self.peak <= PEAK_LIMIT and self.target.is_met(self.unit, self.our_figure, self.peer_figure)

    def __str__(self) -> str:
        ours, peer = self.unit.show(self.our_figure), self.unit.show(self.peer_figure)
        ratio = self.unit.ratio(self.our_figure, self.peer_figure)
        target = self.target.show(self.unit)
        verdict = ("met" if self.met else "MISSED") if target else ""
        of_limit = f"{self.unit.ratio(self.our_figure, self.limit):.0%}" if self.limit is not None else ""
        peak = f"{self.peak / (1 << 20):.0f} MiB" if self.peak else ""
        return (
            f"{self.what:38} {ours:>10} {peer:>10} {ratio:7.2f} {target:>10} {verdict:6} {of_limit:>8} {peak:>8}  "
            f"{self.peer}"
        )


class Row(NamedTuple):
    """A comparison that can be made."""

    what: str
    compare: Callable[[], Comparison]


class BenchmarkError(Exception):
    """A command failed, or two commands that should give the same result do not: there is nothing to compare."""


def run(command: Command, stdout: Path | None = None, status: int = 0) -> Run:
    """Run a command to its end, which has to be with this exit status: its time, and the most memory that it held.

    The kernel counts what this process holds into a child's peak, so this process is kept small.
    """
    with open(stdout or os.devnull, "wb") as out, TemporaryFile() as err:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        _, wait_status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(wait_status)  # so that Popen does not wait for it again
        if child.returncode != status:
            err.seek(0)
            raise BenchmarkError(f"{shlex.join(map(str, command))}: {err.read().decode().strip()}")
    return Run(seconds, usage.ru_maxrss << 10)


def offers(command: str, option: str) -> bool:
    """Whether our command of this name exists and has this option."""
    done = subprocess.run([QCOW2SNAP, command, "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode == 0 and option in done.stdout


def compare(
    what: str,
    ours: Measure,
    peer: Measure,
    peer_name: str,
    *,
    pairs: int,
    before: Callable[[], None] = lambda: None,
    unit: Unit = Unit.SECONDS,
    target: Target | float | None = None,
    limit: Measure | None = None,
) -> Comparison:
    """Measure `pairs` pairs, `before` ahead of each run and not counted. A plain number is a target for the ratio.

    `limit` measures what cannot be beaten, in turn with the two.
    """
    runs: list[list[Run]] = [[], [], []]
    turns = list(zip((ours, peer, limit), runs, strict=True))
    for number in range(pairs):
        for measure, measured in turns if number % 2 else turns[::-1]:  # so that nothing is always the second
            if measure is not None:
                before()
                measured.append(measure())
    figures = [median(run.figure for run in measured) for measured in runs if measured]
    return Comparison(
        what,
        peer_name,
        unit,
        figures[0],
        figures[1],
        target if isinstance(target, Target) else Target(target),
        max(run.peak for run in runs[0]),
        figures[2] if limit is not None else None,
    )
