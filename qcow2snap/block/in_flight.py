"""Ranges that something is being done to, for others to wait for. No I/O, and nothing of what is being done.

QEMU has block/reqlist.c for this. There are as many ranges as there are threads at work, so they are a plain list.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple


class Range(NamedTuple):
    """From `first` up to, not including, `last`."""

    first: int
    last: int


class InFlight:
    """Ranges from `first` up to, not including, `last`; of whatever unit, and overlapping or not.

    threads  any, but each call with the lock held that it was made with; wait() gives it away meanwhile
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._ranges: list[Range] = []
        self._changed = threading.Condition(lock)
        self._waiting = 0

    def add(self, first: int, last: int) -> Range:
        """Put a range under way; what it gives ends it."""
        added = Range(first, last)
        self._ranges.append(added)
        return added

    def end(self, ended: Range) -> None:
        self._ranges.remove(ended)  # of equal ones, whichever
        if self._waiting:
            self._changed.notify_all()

    def overlap(self, first: int, last: int) -> bool:
        """Whether a range under way has something in common with this one."""
        return any(each.first < last and first < each.last for each in self._ranges)

    def wait(self, first: int, last: int, deadline: float | None = None) -> bool:
        """Wait until none overlaps; False if that is not so by the deadline (time.monotonic)."""
        if not self._ranges:
            return True
        self._waiting += 1
        try:
            while self.overlap(first, last):
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return False
                self._changed.wait(remaining)
            return True
        finally:
            self._waiting -= 1
