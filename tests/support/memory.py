"""How much memory something takes at its peak, whatever this process has held before. By /proc, as Linux counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")


def _field(name: str) -> int:
    """A field of /proc/self/status that is given in kB, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


@contextmanager
def memory_limit(growth: int) -> Iterator[None]:
    """Fail if the block makes this process grow by more than so many bytes, be it for a moment."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held now
    before = _field("VmRSS")
    yield
    assert _field("VmHWM") - before <= growth
