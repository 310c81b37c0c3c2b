"""A dirty bitmap at one moment, wherever it came from. Says which bytes are dirty; keeps no file open."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from qcow2snap.block.node import OutOfRange


class FrozenBitmap:
    """Runs of dirty bytes of a disk of `size` bytes.

    threads  any; nothing changes after construction
    memory   16 bytes for each run
    """

    def __init__(self, extents: Iterable[tuple[int, int]], size: int) -> None:
        """Offset and length of what is dirty, in the order of their offsets. Beyond the disk's end: OutOfRange."""
        self.size = size
        self.count = 0  # bytes that are dirty
        self._starts = array("Q")
        self._ends = array("Q")
        last = -1  # where the last run ends
        for offset, length in extents:
            end = offset + length
            if end > size:
                raise OutOfRange(f"{length} dirty bytes at {offset} reach beyond the end, which is at {size}")
            if offset > last and length:
                self._starts.append(offset)
                self._ends.append(end)
                self.count += length
                last = end
            elif end > last >= 0 and length:
                self._ends[-1] = end
                self.count += end - last
                last = end

    def dirty(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Offset and length of each dirty run in a range, in order, none touching the next."""
        stop = offset + length
        for index in range(bisect_right(self._ends, offset), len(self._starts)):
            start, end = max(self._starts[index], offset), min(self._ends[index], stop)
            if start >= stop:
                return
            yield start, end - start
