"""What a checker says of an image, reduced to what two checkers have to agree on: `qemu-img check`, and ours."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.differential.judge import cli
from tests.support import require

SECONDS = 30  # that a check of any image of a few hundred KiB may take


class Verdict(NamedTuple):
    """Exit code and totals, which are None for an image that could not be opened."""

    returncode: int
    totals: tuple[int, int] | None  # corruptions, leaks

    @property
    def state(self) -> str:
        if self.totals is None:
            return "refused"
        words = {0: "clean", 1: "could not check", 2: "corruptions", 3: "leaks", 63: "not supported"}
        return words[self.returncode]

    def __str__(self) -> str:
        if self.totals is None or not any(self.totals):
            return self.state
        corruptions, leaks = self.totals
        return f"{self.state} ({corruptions} corruptions, {leaks} leaks)"


def by_qemu(path: Path, *, program: Sequence[str] = ()) -> Verdict:
    """`qemu-img check`, or the one that `program` runs."""
    # It looks for data files where it runs. Given no format, it would take what is no qcow2 image for a raw one.
    command = [*(program or [require("qemu-img")]), "check", "-f", "qcow2", "--output=json", path.name]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, timeout=SECONDS)
    assert done.returncode in (0, 1, 2, 3, 63), f"{path.name}: qemu-img ended with {done.returncode}"
    return _verdict(done.returncode, done.stdout)


def by_us(path: Path) -> Verdict:
    """`qcow2snap check`, in this process."""
    done = cli("check", "--json", path)
    assert done.returncode in (0, 1, 2, 3, 63), f"{path.name}: qcow2snap ended with {done.returncode}: {done.stderr}"
    return _verdict(done.returncode, done.stdout.encode())


def _verdict(returncode: int, output: bytes) -> Verdict:
    if not output.strip().startswith(b"{"):
        return Verdict(returncode, None)
    fields: dict[str, Any] = json.loads(output)
    return Verdict(returncode, (fields.get("corruptions", 0), fields.get("leaks", 0)))
