"""The walk: which host clusters the active disk and each snapshot refer to, and how often. Judges nothing.

Snapshots share most L2 tables: an image with a hundred of them has few more tables than one with none. So the L1 tables
of all states are read first, and come to one list of L2 tables, each with the number of L1 entries that point to it;
then each table is read once (`l2_batches`), and what it refers to counts that many times.

    walk = references(file, header, table.entries)
    for batch in walk.batches():                # every L2 table once
        rows, clusters = batch.references()     # row: which table of the batch; cluster: index into the file
        tables = batch.tables                   # by row: how often referred to, by which state alone

As in QEMU, what lies past the end of the file reads as zeros, and what leaves the file is no reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from formats import qcow2 as layout
from formats.qcow2 import L1TableEntry
from qcow2snap.block.file import FileNode
from qcow2snap.block.node import SnapshotInfo
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.snapshot_table import TableEntry
from qcow2snap.conformance.l2_batches import L2Batch, counted, read_batches

ACTIVE = 0  # the first of the states

L1_OFFSET = np.uint64(L1TableEntry.mask("offset"))
# Bytes of L1 tables that one walk reads. A hostile image may have 65,536 of 32 MiB each.
MAX_L1_BYTES = 1 << 30
MAX_L1_ENTRIES = 16 << 20  # of them that are not zero: 100 snapshots of a full disk of 80 TiB
# Bytes of L2 tables that do not start at a cluster boundary: those may overlap, and come to any number.
MAX_UNALIGNED_BYTES = 32 << 20
_NOTHING: NDArray[np.uint64] = np.zeros(0, np.uint64)
_PENDING = 1 << 20  # L1 entries that are gathered before they are put in order


def size_in_sectors(file: FileNode) -> int:
    """Bytes of a file as QEMU counts them: the last sector is there whole."""
    return -(-file.current_size() // layout.SECTOR_SIZE) * layout.SECTOR_SIZE


def words(data: bytes) -> NDArray[np.uint64]:
    """64-bit entries of a table; the last one may be cut by the end of the file, and goes on with zeros there."""
    return np.frombuffer(data + bytes(-len(data) % 8), dtype=">u8").astype(np.uint64)


class State(NamedTuple):
    """What has an L1 table: the active disk, whose snapshot is None, or a snapshot."""

    snapshot: SnapshotInfo | None
    l1_table_offset: int
    l1_size: int  # entries

    @property
    def l1_length(self) -> int:
        """Bytes of the L1 table."""
        return 8 * self.l1_size

    def can_follow(self, header: ImageHeader) -> bool:
        """Whether the L1 table is where one can be. QEMU goes no further where it is not."""
        return (
            self.l1_table_offset % header.cluster_size == 0
            and self.l1_length <= layout.MAX_L1_TABLE_SIZE
            and self.l1_table_offset + self.l1_length < 1 << 63
        )

    def read_l1(self, file: FileNode) -> NDArray[np.uint64]:
        """The entries that are in the file, if only in part; those past its end would be zeros."""
        return words(file.pread_available(self.l1_table_offset, self.l1_length))


Column = NDArray[np.int64]


class L2Tables(NamedTuple):
    """Distinct L2 tables, as columns, in the order of their host offsets."""

    offsets: Column
    counts: Column  # L1 entries of all states that point there
    active_counts: Column  # those of the active L1 table
    first_states: Column  # lowest and highest number of a state that refers to it:
    last_states: Column  # where they are the same, the table is that state's alone

    def __len__(self) -> int:
        return len(self.offsets)

    def part(self, start: int, stop: int) -> L2Tables:
        return L2Tables(*(column[start:stop] for column in self))

    def chosen(self, which: NDArray[np.bool_]) -> L2Tables:
        return L2Tables(*(column[which] for column in self))


class References:
    """What the states of an image refer to.

    states      the active disk, then the snapshots in the order of their table
    tables      the L2 tables that lie in the file and are read
    outside     the L2 tables that do not
    nb_unread   L2 tables off the cluster grid that would be more than the walk reads
    left_out    states whose L1 table is not followed, or would be more than the walk reads
    threads     any; nothing changes after construction
    errors      FileError
    """

    def __init__(
        self,
        file: FileNode,
        header: ImageHeader,
        states: Sequence[State],
        see: Callable[[int, NDArray[np.uint64]], None] | None = None,
    ) -> None:
        """`see` is shown each L1 table that is read: the number of its state, and the entries."""
        self._file = file
        self.header = header
        self.states = tuple(states)
        self.file_size = size_in_sectors(file)
        tally, left_out, budget, entry_budget = _Tally(), [], MAX_L1_BYTES, MAX_L1_ENTRIES
        last: tuple[int, int] | None = None
        entries = offsets = _NOTHING
        for number, state in enumerate(self.states):
            if not state.can_follow(header) or budget <= 0 or entry_budget <= 0:
                left_out.append(number)
                continue
            if (state.l1_table_offset, state.l1_size) != last:
                entries = offsets = _NOTHING  # 32 MiB each, that are not held while the next are made
                entries = state.read_l1(file)
                offsets = entries[entries != 0]
                offsets &= L1_OFFSET
                last = state.l1_table_offset, state.l1_size
                budget -= entries.nbytes
            if see is not None:
                see(number, entries)
            tally.add(number, offsets.view(np.int64))
            entry_budget -= len(offsets)
        self.left_out = frozenset(left_out)
        tables = tally.tables()
        is_inside = tables.offsets < self.file_size
        self.outside = tables.chosen(~is_inside)
        self.tables = tables.chosen(is_inside)
        self.nb_unread = 0
        unaligned = self.tables.offsets % header.cluster_size != 0
        if unaligned.any():
            unaligned &= np.cumsum(unaligned) * header.cluster_size > MAX_UNALIGNED_BYTES
            self.nb_unread = int(unaligned.sum())
            self.tables = self.tables.chosen(~unaligned)

    def batches(self) -> Iterator[L2Batch]:
        """Every L2 table once, in the order of their host offsets, some at a time. Each call reads them anew."""
        return read_batches(self._file, self.header, self.tables, self.file_size)


def references(file: FileNode, header: ImageHeader, entries: Sequence[TableEntry]) -> References:
    """What the active disk and the snapshots of these table entries refer to."""
    return References(file, header, all_states(header, entries))


def all_states(header: ImageHeader, entries: Sequence[TableEntry]) -> list[State]:
    """The active disk and the snapshots of these table entries."""
    active = State(None, header.l1_table_offset, header.l1_size)
    return [active, *(State(entry.info, entry.l1_table_offset, entry.l1_size) for entry in entries)]


class _Tally:
    """Offsets of L2 tables by state, gathered into L2Tables."""

    def __init__(self) -> None:
        self._tables = L2Tables(*(np.zeros(0, np.int64) for _ in L2Tables._fields))
        self._pending: list[tuple[int, Column, Column]] = []
        self._nb_pending = 0

    def add(self, state: int, offsets: Column) -> None:
        different, counts = counted(offsets)
        self._pending.append((state, different, counts))
        self._nb_pending += len(different)
        if self._nb_pending > max(_PENDING, len(self._tables)):
            self._merge()

    def tables(self) -> L2Tables:
        self._merge()
        return self._tables

    def _merge(self) -> None:
        lengths = [len(offsets) for _, offsets, _ in self._pending]
        states = np.repeat(np.array([state for state, _, _ in self._pending], np.int64), lengths)
        counts = np.concatenate([np.zeros(0, np.int64), *(each for _, _, each in self._pending)])
        new = (
            np.concatenate([np.zeros(0, np.int64), *(offsets for _, offsets, _ in self._pending)]),
            counts,
            counts * (states == ACTIVE),
            states,
            states,
        )
        self._pending, self._nb_pending = [], 0
        columns: list[Column] = [np.concatenate((old, more)) for old, more in zip(self._tables, new, strict=True)]
        if not len(columns[0]):
            return
        order = np.argsort(columns[0], kind="stable")
        offsets, counts, active_counts, firsts, lasts = (column[order] for column in columns)
        starts = np.flatnonzero(np.concatenate(([True], offsets[1:] != offsets[:-1])))
        self._tables = L2Tables(
            offsets[starts],
            np.add.reduceat(counts, starts),
            np.add.reduceat(active_counts, starts),
            np.minimum.reduceat(firsts, starts),
            np.maximum.reduceat(lasts, starts),
        )
