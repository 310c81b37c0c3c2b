"""How much memory something takes at its peak, whatever its process has held before. By /proc, as Linux counts it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import process_tree


def _field(pid: int, name: str) -> int:
    """A field of /proc/PID/status that is given in kB, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


@contextmanager
def memory_limit(growth: int, server: int | None = None) -> Iterator[None]:
    """Fail if the block makes this process grow by more than so many bytes, be it for a moment.

    With `server` it is that process and its children; each counts with its own peak.
    """

    def processes() -> list[int]:
        return [os.getpid()] if server is None else process_tree(server)

    before = 0
    for each in processes():
        Path(f"/proc/{each}/clear_refs").write_text("5")  # the peak is now what is held now
        before += _field(each, "VmRSS")
    yield
    grown = sum(_field(each, "VmHWM") for each in processes()) - before
    assert grown <= growth, f"{grown >> 20} MiB more"
