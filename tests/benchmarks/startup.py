"""How soon a command answers: `qcow2snap list` of a small image and `--help`, against Python alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks import pairs

IMAGE = Path(__file__).parents[2] / "fixtures/images/demo.qcow2"
LIMIT = 0.150  # seconds


def comparisons(quick: bool) -> Iterator[pairs.Comparison]:
    python = [sys.executable, "-c", "pass"]
    for arguments in ["list", IMAGE], ["--help"]:
        ours = [pairs.QCOW2SNAP, *arguments]
        pairs.run(ours)  # compiles what pip has not
        yield pairs.compare(f"{arguments[0]} | python3 -c pass", ours, python, pairs=5 if quick else 21, within=LIMIT)
