"""Which guest bytes differ between two states of an image, by its L1 and L2 tables. No data is read.

What two states share is one table or one cluster of the file: internal snapshots are copy-on-write. So equal pointers
mean equal bytes, whatever they point to, and only L2 tables at different places are read. The work follows what was
changed, not the size of the disk. The reverse does not hold: a cluster that was written again may hold what it held.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple

from formats.qcow2 import L1TableEntry
from qcow2snap.block.file import FileNode
from qcow2snap.block.lru import BoundedCache
from qcow2snap.block.node import BlockNode, Change, ChangedExtent, FileError, OutOfRange, coalesced
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.l2_changes import Cell, Run, TableChanges, compare
from qcow2snap.block.qcow2.words import words

_L1_OFFSET = L1TableEntry.mask("offset")
_BLOCK = 512  # L1 entries that are first compared as bytes

Tables = BoundedCache[tuple[int, int], TableChanges]  # by the host offsets of the two tables


class State(NamedTuple):
    """One state of the disk, as far as it is compared."""

    size: int
    l1: bytes
    node: Callable[[], BlockNode]  # for its words on what is damaged

    @property
    def nb_tables(self) -> int:
        return len(self.l1) // 8


class Shared(NamedTuple):
    """What both states have in common."""

    file: FileNode
    header: ImageHeader
    backing: BlockNode | None
    tables: Tables | None  # None: the file may change, so nothing is kept
    confirm: Callable[[], None]  # raises if what was read of the tables may be another's


class Comparison:
    """Two states side by side.

    threads  any
    errors   ImageFormatError, when damage is met in a table that has to be read; SnapshotGone
    owns     nothing
    """

    def __init__(self, shared: Shared, since: State, state: State) -> None:
        self._shared = shared
        self._since, self._state = since._replace(l1=b""), state._replace(l1=b"")  # of these, what follows is kept
        self._coverage = shared.header.l2_coverage
        self._end = min(since.size, state.size)  # of what both have
        self.size = max(since.size, state.size)
        needed = -(-self._end // self._coverage)
        nb_tables = min(needed, since.nb_tables, state.nb_tables)
        self._l1_end = self._end if nb_tables == needed else nb_tables * self._coverage
        self._indices, self._pairs = array("I"), array("Q")
        for index, old, new in _differing(since.l1[: 8 * nb_tables], state.l1[: 8 * nb_tables]):
            self._indices.append(index)
            self._pairs.extend((old, new))
        shared.confirm()
        self.nbytes = 500 + 20 * len(self._indices)

    def changes(self, offset: int, length: int) -> Iterator[ChangedExtent]:
        """The extents of a range that differ, in order, neighbours of one kind merged."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRange(f"{length} bytes at {offset} reach beyond the end, which is at {self.size}")
        return self._changes(offset, offset + length)

    def _changes(self, offset: int, end: int) -> Iterator[ChangedExtent]:
        yield from coalesced(self._within_both(offset, min(end, self._end)), _changed_alike)
        if end > max(offset, self._end):
            start = max(offset, self._end)
            yield ChangedExtent(start, end - start, Change.SIZE)

    def _within_both(self, offset: int, end: int) -> Iterator[ChangedExtent]:
        coverage = self._coverage
        for position in range(bisect_left(self._indices, offset // coverage), len(self._indices)):
            base = self._indices[position] * coverage
            if base >= end:
                return
            table = self._table(position, max(base, offset))
            for run in table.runs(max(offset - base, 0), min(end - base, coverage)):
                yield from self._changed(base, run)
        if max(offset, self._l1_end) < end:  # an L1 table ends before its disk does
            self._complain(max(offset, self._l1_end), end)

    def _table(self, position: int, offset: int) -> TableChanges:
        shared, (old, new) = self._shared, self._pairs[2 * position : 2 * position + 2]
        table = shared.tables.get((old, new)) if shared.tables is not None else None
        if table is None:
            # A table that cannot be read is damage from the first byte that was asked for to the last it describes.
            end = min(self._end, (self._indices[position] + 1) * self._coverage)
            since, state = self._read(old, offset, end), self._read(new, offset, end)
            shared.confirm()
            table = compare(since, state, shared.header)
            if shared.tables is not None:
                shared.tables.put((old, new), table, table.nbytes)
        return table

    def _read(self, host_offset: int, offset: int, end: int) -> bytes:
        cluster_size = self._shared.header.cluster_size
        if host_offset == 0:
            return bytes(cluster_size)  # no table: all of it is unallocated
        data = b"" if host_offset % cluster_size else self._shared.file.pread_available(host_offset, cluster_size)
        if len(data) < cluster_size:
            self._complain(offset, end)
        return data

    def _changed(self, base: int, run: Run) -> Iterator[ChangedExtent]:
        """What two cells mean for who reads them; where only one defers to the backing file, by what that shows."""
        start, end, was, now = base + run.start, base + run.end, run.was, run.now
        if Cell.INVALID in (was, now):
            self._complain(start, end)
        if Cell.UNALLOCATED in (was, now) and self._shared.backing is not None and start < self._shared.backing.size:
            stop = min(end, self._shared.backing.size)
            for extent in self._shared.backing.block_status(start, stop - start):
                below = Cell.DATA if extent.must_read else Cell.ZERO
                yield from _extent(extent.offset, extent.end, was or below, now or below)
            start = stop
        yield from _extent(start, end, was or Cell.ZERO, now or Cell.ZERO)

    def _complain(self, offset: int, end: int) -> None:
        """Raise what reading these bytes would raise, which has the words for it."""
        self._shared.confirm()
        for state in (self._since, self._state):
            for _ in state.node().block_status(offset, end - offset, want_zero=False):
                pass
        raise FileError(f"{self._shared.file.filename}: its tables changed while they were read")


def _differing(since: bytes, state: bytes) -> Iterator[tuple[int, int, int]]:
    """Index and both host offsets of L1 entries that point to different L2 tables."""
    for start in range(0, len(since), 8 * _BLOCK):
        old, new = since[start : start + 8 * _BLOCK], state[start : start + 8 * _BLOCK]
        if old == new:
            continue
        for index, (one, other) in enumerate(zip(words(old), words(new), strict=True), start // 8):
            if (one ^ other) & _L1_OFFSET:
                yield index, one & _L1_OFFSET, other & _L1_OFFSET


def _extent(start: int, end: int, was: int, now: int) -> Iterator[ChangedExtent]:
    """Of cells that are data or zeros. Data twice is here because it lies in different places."""
    if start < end and not was == now == Cell.ZERO:
        yield ChangedExtent(start, end - start, _CHANGES[was, now])


_CHANGES: dict[tuple[int, int], Change] = {
    (Cell.DATA, Cell.DATA): Change.DATA,
    (Cell.DATA, Cell.ZERO): Change.BECAME_ZERO,
    (Cell.ZERO, Cell.DATA): Change.WAS_ZERO,
}


def _changed_alike(last: ChangedExtent, following: ChangedExtent) -> bool:
    return last.end == following.offset and last.change is following.change
