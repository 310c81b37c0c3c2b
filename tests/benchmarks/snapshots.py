"""Making and deleting a snapshot of a disk of 10 GiB, all of it allocated: against `qemu-img snapshot -c` and `-d`.

Each twice: as a command, most of which is the start of Python, and on an image that is open already, as under a guest.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.benchmarks import images, pairs

_NAME = "benchmark"

# Prints how many seconds an operation takes on an image that is open.
_OPEN = """
import sys, time
from qcow2snap.block.graph import open_writable
node = open_writable(sys.argv[2])
operation = node.create_snapshot if sys.argv[1] == "create" else node.delete_snapshot
argument = sys.argv[3] if sys.argv[1] == "create" else node.find_snapshot(sys.argv[3])
node.pread(0, 512)
start = time.perf_counter()
operation(argument)
print(time.perf_counter() - start)
node.close()
"""


def rows(quick: bool) -> Iterator[pairs.Row]:
    size = (1 if quick else 10) << 30
    for operation, target in (("create", 1.0), ("delete", 2.0)):
        for how in ("image open", "command"):
            what = f"snapshot {operation}, {size >> 30} GiB, {how}"
            run = _in_process if how == "image open" else _command
            yield pairs.Row(what, partial(_compare, what, size, operation, run, target, 3 if quick else 7))


def _compare(
    what: str, size: int, operation: str, run: Callable[[str, Path], pairs.Run], target: float, count: int
) -> pairs.Comparison:
    image = images.preallocated(size)
    flag = {"create": "-c", "delete": "-d"}[operation]

    def before() -> None:
        """The snapshot is there, or not, as the operation needs it."""
        listed = subprocess.run(
            ["qemu-img", "snapshot", "-l", image], check=True, capture_output=True, text=True
        ).stdout
        if (_NAME in listed) != (operation == "delete"):
            other = "-d" if operation == "create" else "-c"
            subprocess.run(["qemu-img", "snapshot", other, _NAME, image], check=True)

    peer = partial(pairs.run, ["qemu-img", "snapshot", flag, _NAME, image])
    comparison = pairs.compare(
        what, partial(run, operation, image), peer, f"qemu-img snapshot {flag}", pairs=count, before=before,
        target=target,
    )  # fmt: skip
    subprocess.run(["qemu-img", "snapshot", "-d", _NAME, image], capture_output=True)
    pairs.run(["qemu-img", "check", image])
    return comparison


def _command(operation: str, image: Path) -> pairs.Run:
    return pairs.run([pairs.QCOW2SNAP, "snapshot", operation, image, _NAME])


def _in_process(operation: str, image: Path) -> pairs.Run:
    done = subprocess.run([sys.executable, "-c", _OPEN, operation, image, _NAME], capture_output=True, text=True)
    if done.returncode:
        raise pairs.BenchmarkError(done.stderr.strip())
    return pairs.Run(float(done.stdout))
