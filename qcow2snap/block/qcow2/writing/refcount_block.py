"""One refcount block in memory, of any width, and its bytes in the file. No I/O.

Refcounts of 16, 32 and 64 bits are the machine's integers, narrower ones a byte each: so one is looked up and changed
at the cost of an array's element, and a run of them is found by numpy in the same memory.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcow2snap.block.qcow2.refcount_bits import packed, unpacked

_TYPES = {4: "H", 5: "I", 6: "Q"}  # of the array, by refcount_order; narrower ones: "B"
_SCAN = 1 << 10  # refcounts looked at together at first


def max_refcount(refcount_order: int) -> int:
    """The largest refcount that fits. QEMU takes no more than 63 bits."""
    return (1 << min(1 << refcount_order, 63)) - 1


class RefcountBlock:
    """The refcounts of `count` clusters, and which of them the file does not have yet.

    host_offset  where the block is, or will be, in the file
    counts       to read; change() changes them
    """

    __slots__ = ("_order", "counts", "dirty_end", "dirty_start", "host_offset", "is_new", "view")

    def __init__(self, host_offset: int, refcount_order: int, count: int, data: bytes | None = None) -> None:
        """Without `data`, a new block of zeros, all of which has to be written."""
        self.host_offset = host_offset
        self._order = refcount_order
        kind = _TYPES.get(refcount_order, "B")
        values = np.zeros(count, dtype=kind) if data is None else unpacked(data, refcount_order).astype(kind)
        self.counts: array[int] = array(kind, values.tobytes())
        self.view: NDArray[Any] = np.frombuffer(self.counts, dtype=kind)
        self.is_new = data is None  # the refcount table in the file does not refer to it
        self.dirty_start, self.dirty_end = (count, 0) if data is not None else (0, count)

    @property
    def is_dirty(self) -> bool:
        return self.dirty_start < self.dirty_end

    def touch(self, start: int, end: int) -> None:
        """Refcounts `start` to `end` differ from the file."""
        self.dirty_start = min(self.dirty_start, start)
        self.dirty_end = max(self.dirty_end, end)

    def take_dirty(self, sector: int) -> tuple[int, bytes]:
        """Where in the block the changed part starts, in bytes, and its bytes; then nothing is dirty. Whole sectors."""
        bits = 1 << self._order
        first = self.dirty_start * bits // 8 // sector * sector
        last = -(-self.dirty_end * bits // 8 // sector) * sector
        self.dirty_start, self.dirty_end = len(self.counts), 0
        return first, packed(self.view[first * 8 // bits : last * 8 // bits], self._order)

    def next_used(self, start: int) -> int:
        """The first index from `start` on with a refcount, or the block's length."""
        return self._scan(start, used=True)

    def next_free(self, start: int) -> int:
        """The first index from `start` on without, or the block's length."""
        return self._scan(start, used=False)

    def _scan(self, start: int, *, used: bool) -> int:
        count, view, step = len(self.counts), self.view, _SCAN
        while start < count:
            part = view[start : start + step]
            found = part != 0 if used else part == 0
            index = int(found.argmax())
            if found[index]:
                return start + index
            start += step
            step *= 4
        return count
