"""How soon a command answers: `qcow2snap list` of a small image and `--help`, against Python alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.benchmarks import pairs

IMAGE = Path(__file__).parents[2] / "fixtures/images/demo.qcow2"
LIMIT = 0.150  # seconds


def rows(quick: bool) -> Iterator[pairs.Row]:
    commands: dict[str, pairs.Command] = {"list, cold": ["list", IMAGE], "--help": ["--help"]}
    for what, arguments in commands.items():
        yield pairs.Row(what, partial(_compare, what, [pairs.QCOW2SNAP, *arguments], 5 if quick else 21))


def _compare(what: str, command: pairs.Command, count: int) -> pairs.Comparison:
    pairs.run(command)  # brings the files into memory
    python = partial(pairs.run, [sys.executable, "-c", "pass"])
    ours = partial(pairs.run, command)
    return pairs.compare(what, ours, python, "python3 -c pass", pairs=count, target=pairs.Target(figure=LIMIT))
