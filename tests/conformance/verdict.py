"""What a checker says of an image, reduced to what two checkers have to agree on: `qemu-img check`, and ours."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from qcow2snap.block.qcow2.rules import RULES
from tests.cli.support import here
from tests.support import require

SECONDS = 30  # that a check of any image of a few hundred KiB may take
PASSPHRASE = "correct horse battery staple"  # of the encrypted fixtures
SEVERITIES = {rule.id: rule.severity.value for rule in RULES}
STATES = {0: "clean", 1: "stops", 2: "corruptions", 3: "leaks", 63: "stops"}


class Verdict(NamedTuple):
    """What was found: corruptions, leaks, and errors that kept the image from being opened or checked to its end.

    said   lines for people, of qemu-img
    found  of ours: by rule and whether that stops QEMU, how many findings there are, and how often QEMU counts them
    """

    state: str
    corruptions: int = 0
    leaks: int = 0
    said: str = ""
    found: dict[tuple[str, bool], tuple[int, int]] = {}

    def __str__(self) -> str:
        numbers = {"corruptions": self.corruptions, "leaks": self.leaks}
        counted = ", ".join(
            f"{number} {name[:-1] if number == 1 else name}" for name, number in numbers.items() if number
        )
        return counted if counted and self.state != "stops" else self.state

    def is_same(self, other: Verdict, *, counted: bool) -> bool:
        """Whether both say the same; `counted`: the numbers too. They mean nothing where a check did not end."""
        numbers = (self.corruptions, self.leaks) == (other.corruptions, other.leaks)
        return self.state == other.state and (numbers or not counted or self.state == "stops")

    def without(self, rules: frozenset[str]) -> Verdict:
        """Ours, if these rules were unknown to us. Corruptions that QEMU does not see count where it sees none."""
        left = {key: numbers for key, numbers in self.found.items() if key[0] not in rules}
        counted, unseen = Counter[str](), 0
        for (rule, is_stop), (number, times) in left.items():
            if not is_stop:
                counted[SEVERITIES[rule]] += times
                unseen += number if SEVERITIES[rule] == "corruption" and not times else 0
        corruptions, leaks = counted["corruption"] or unseen, counted["leak"]
        stops = any(is_stop for _, is_stop in left)
        state = "stops" if stops else "corruptions" if corruptions else "leaks" if leaks else "clean"
        return self._replace(state=state, corruptions=corruptions, leaks=leaks, found=left)


def by_qemu(path: Path, program: str | None = None) -> Verdict:
    """`qemu-img check`, or the program's. It gets the passphrase if it asks for one."""
    # It looks for data files where it runs. Given no format, it would take what is no qcow2 image for a raw one.
    command = [program or require("qemu-img"), "check", "--output=json"]
    done = _run([*command, "-f", "qcow2", path.name], path.parent)
    if b"encrypt.key-secret" in done.stderr:
        secret = ("--object", f"secret,id=key,data={PASSPHRASE}")
        options = f"driver=qcow2,encrypt.key-secret=key,file.filename={path.name}"
        done = _run([*command, *secret, "--image-opts", options], path.parent)
    assert done.returncode in STATES, f"{path.name}: qemu-img ended with {done.returncode}"
    fields = json.loads(done.stdout) if done.stdout.startswith(b"{") else {}
    return Verdict(
        STATES[done.returncode],
        fields.get("corruptions", 0),
        fields.get("leaks", 0),
        done.stderr.decode(errors="replace"),
    )


def _run(command: list[str], directory: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, cwd=directory, capture_output=True, timeout=SECONDS)


def by_us(path: Path) -> Verdict:
    """`qcow2snap check`, in this process."""
    done = here("check", "--json", path)
    assert done.returncode in STATES, f"{path.name}: qcow2snap ended with {done.returncode}: {done.stderr}"
    fields: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
    found: dict[tuple[str, bool], tuple[int, int]] = {}
    for finding in fields.get("findings", ()):
        number, times = found.get(key := (finding["rule"], finding["stops-qemu"]), (0, 0))
        found[key] = number + 1, times + finding["count"]
    return Verdict(STATES[done.returncode], fields.get("corruptions", 0), fields.get("leaks", 0), done.stderr, found)
