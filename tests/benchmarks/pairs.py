"""Two commands timed in turn, A B A B ..., and the ratio of their medians. Knows nothing of what they do.

Figures of one run only are comparable: a machine is not equally fast twice.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import NamedTuple

Command = Sequence[str | Path]

PEAK_LIMIT = 256 << 20  # bytes; what any of our commands may hold at once

# Installed beside the interpreter that runs this.
QCOW2SNAP = Path(sys.executable).with_name("qcow2snap")

HEADING = f"{'what | peer':48} {'ours':>9} {'peer':>9} {'ratio':>6} {'target':>10} {'peak':>9}"


class Run(NamedTuple):
    seconds: float
    peak: int  # bytes


class Comparison(NamedTuple):
    """One row of the table. The ratio says how many times as fast as the peer we are."""

    what: str
    ours: float  # seconds, median
    peer: float
    ratio: float
    peak: int  # bytes, the most of all our runs
    target: str
    met: bool

    def __str__(self) -> str:
        return (
            f"{self.what:48} {self.ours * 1000:6.0f} ms {self.peer * 1000:6.0f} ms {self.ratio:6.2f} {self.target:>10} "
            f"{self.peak / (1 << 20):5.0f} MiB{'' if self.met else '  missed'}"
        )


class BenchmarkError(Exception):
    """A command failed, or two commands that should give the same result do not: there is nothing to compare."""


def run(command: Command, stdout: Path | None = None) -> Run:
    """Run a command to its end: its time, and the most memory that its largest process held.

    The kernel counts what this process holds into a child's peak, so this process is kept small.
    """
    with open(stdout or os.devnull, "wb") as out, TemporaryFile() as err:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
        if child.returncode != 0:
            err.seek(0)
            raise BenchmarkError(f"{shlex.join(map(str, command))}: {err.read().decode().strip()}")
    return Run(seconds, usage.ru_maxrss << 10)


def compare(
    what: str,
    ours: Command,
    peer: Command,
    *,
    pairs: int,
    before: Callable[[], None] = lambda: None,
    at_least: float | None = None,
    within: float | None = None,
) -> Comparison:
    """Time `pairs` pairs of runs, `before` ahead of each run and not counted.

    The target is a ratio (`at_least`) or a time of ours in seconds (`within`); the limit on memory is part of both.
    """
    our_runs, peer_runs = [], []
    for _ in range(pairs):
        before()
        our_runs.append(run(ours))
        before()
        peer_runs.append(run(peer))

    our_time = median(each.seconds for each in our_runs)
    peer_time = median(each.seconds for each in peer_runs)
    ratio = peer_time / our_time
    peak = max(each.peak for each in our_runs)
    met = peak <= PEAK_LIMIT
    target = ""
    if at_least is not None:
        target, met = f">= {at_least:.1f}", met and ratio >= at_least
    if within is not None:
        target, met = f"<= {within * 1000:.0f} ms", met and our_time <= within
    return Comparison(what, our_time, peer_time, ratio, peak, target, met)
