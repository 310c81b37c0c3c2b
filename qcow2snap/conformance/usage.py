"""Space by snapshot: what each refers to, what of it others have too, and what deleting it would give back.

By the walk of the checker, which reads each L2 table once: a host cluster belongs to one state alone if all L2 tables
that refer to it do, and an L2 table if all L1 entries that point to it are in one L1 table. So a cluster needs one
number, whoever shares it, and no list. Neither data nor refcounts are read: without faults, these say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2snap.block.file import FileNode
from qcow2snap.block.node import ImageInUse, UnsupportedFeature
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.snapshot_table import TableEntry, used_size
from qcow2snap.conformance.references import ACTIVE, L1_OFFSET, References, references

_WINDOW = 1 << 24  # host clusters that are looked at together, in at most 144 MiB: 1 TiB of clusters of 64 KiB
_MAX_WINDOWS = 64  # in which there is something. Each costs a walk over all L2 tables
_TRIES = 3  # of an image whose snapshots come and go meanwhile
_NOBODY, _SHARED = -1, -2  # instead of the number of the state that has a cluster alone
_EXTRA_DATA_SIZE = 24  # bytes that QEMU gives an entry at least when it writes a snapshot table

Clusters = NDArray[np.int64]  # numbers of host clusters
Indexes = NDArray[np.intp]


class Usage(NamedTuple):
    """Bytes of whole host clusters: L1 table, L2 tables, data and VM state. `refer` is `shared` and `used` together.

    The snapshot table counts where deleting a snapshot makes it shorter: the last one takes it along.
    """

    refer: int  # what there is of it
    shared: int  # of that, what another snapshot or the active disk refers to as well
    used: int  # of that, what it has alone: what deleting it would give back


class ImageUsage(NamedTuple):
    """Each state's usage; None where the L1 table is damaged. `by_snapshots` is what deleting all would give back."""

    active: Usage | None
    snapshots: tuple[Usage | None, ...]
    by_snapshots: int


def usage_of(node: Qcow2Node) -> ImageUsage:
    """What the states of an image use. Raises UnsupportedFeature for a file of an impossible size, FileError."""
    for _ in range(_TRIES):
        usage = measure(node.file, node.header, node.snapshot_table.entries)
        if not node.refresh():
            return usage
    raise ImageInUse(f"{node.filename}: its snapshots came and went {_TRIES} times while their usage was counted")


def measure(file: FileNode, header: ImageHeader, entries: Sequence[TableEntry]) -> ImageUsage:
    walk = references(file, header, entries)
    count = _Count(file, walk)
    cluster_size = header.cluster_size
    table = -(-_table_size([used_size(entry.raw) for entry in entries]) // cluster_size)
    tables_without = [-(-size // cluster_size) for size in _table_sizes_without_each(entries)]
    states: list[Usage | None] = []
    for number in range(len(walk.states)):
        if number in walk.left_out:
            states.append(None)
            continue
        refer, used = count.refer(number), int(count.used[number])
        if number != ACTIVE:
            shorter = max(0, table - tables_without[number - 1])
            refer, used = refer + shorter, used + shorter
        states.append(Usage(*(n * cluster_size for n in (refer, refer - used, used))))
    return ImageUsage(states[ACTIVE], tuple(states[1:]), (count.by_snapshots + table) * cluster_size)


def _table_size(sizes: Sequence[int]) -> int:
    """Bytes of a snapshot table of entries of these sizes: each but the last is padded."""
    return sum(size + -size % 8 for size in sizes) - (-sizes[-1] % 8 if sizes else 0)


def _table_sizes_without_each(entries: Sequence[TableEntry]) -> list[int]:
    """For each entry, bytes of the table of all others, as QEMU writes it: with all known extra data."""
    sizes = []
    for entry in entries:
        extra_data_size = int.from_bytes(entry.raw[36:40], "big")
        sizes.append(used_size(entry.raw) + max(0, _EXTRA_DATA_SIZE - extra_data_size))
    if not sizes:
        return []
    whole = _table_size(sizes)
    without_one = [whole - size - -size % 8 for size in sizes[:-1]]
    return [*without_one, _table_size(sizes[:-1])]


class _Count:
    """Clusters by state: `used` those that it has alone; `by_snapshots` those that the active disk has no part in."""

    def __init__(self, file: FileNode, walk: References) -> None:
        self._file = file
        self._walk = walk
        self._cluster_size = walk.header.cluster_size
        self._by_table = np.zeros(len(walk.tables), np.int64)  # distinct clusters that each L2 table refers to
        self._in_two: list[
            tuple[Indexes, Clusters]
        ] = []  # L2 tables, and clusters that they share with their neighbours
        self._l1_indexes: Indexes | None = None
        self.used = np.zeros(len(walk.states), np.int64)
        self.by_snapshots = 0
        start = 0
        for _ in range(_MAX_WINDOWS):
            following = self._count_window(start)
            if following is None:
                return
            start = following
        raise UnsupportedFeature(f"{file.filename}: its clusters lie too far apart for their usage to be counted")

    def refer(self, number: int) -> int:
        """Distinct clusters that a state refers to."""
        tables = np.unique(self._tables_of(number)[0])
        l1_clusters = -(-self._walk.states[number].l1_length // self._cluster_size)
        clusters = l1_clusters + len(tables) + int(self._by_table[tables].sum())
        if self._in_two:
            is_its = np.zeros(len(self._by_table), np.bool_)
            is_its[tables] = True
            for users, shared in self._in_two:
                its = shared[is_its[users]]
                clusters -= len(its) - len(np.unique(its))
        return clusters

    def _tables_of(self, number: int) -> tuple[Indexes, Indexes]:
        """For each L1 entry of a state that points to an L2 table in the file: which table, and the entry's index."""
        offsets = (self._walk.states[number].read_l1(self._file) & L1_OFFSET).astype(np.int64)
        known = self._walk.tables.offsets
        indexes = np.flatnonzero(offsets)
        found = np.searchsorted(known, offsets[indexes])
        is_known = found < len(known)
        is_known[is_known] = known[found[is_known]] == offsets[indexes[is_known]]
        return found[is_known], indexes[is_known]

    def _followed(self) -> Iterator[int]:
        return (number for number in range(len(self._walk.states)) if number not in self._walk.left_out)

    def _count_window(self, start: int) -> int | None:
        """Count the clusters of one window. Returns where the next one starts; None if nothing is left."""
        tables = self._walk.tables
        window = _Window(start, -(-self._walk.file_size // self._cluster_size))
        for number in self._followed():
            state = self._walk.states[number]
            end = min(state.l1_table_offset + state.l1_length, self._walk.file_size)
            l1 = np.arange(state.l1_table_offset // self._cluster_size, -(-end // self._cluster_size))
            window.claim(l1, np.full(len(l1), number, np.int32), np.full(len(l1), number == ACTIVE))
        owners = np.where(tables.first_states == tables.last_states, tables.first_states, np.int32(_SHARED))
        is_active = tables.active_counts > 0
        window.claim(tables.offsets // self._cluster_size, owners, is_active)
        for rows, clusters, has_compressed in self._references():
            window.claim(clusters, owners[rows], is_active[rows])
            is_inside = window.has(clusters)
            rows, clusters = rows[is_inside], clusters[is_inside]
            self._by_table += np.bincount(rows, minlength=len(self._by_table))
            if has_compressed:
                window.note(clusters, self._l1_index(rows))
        self.used += window.used(len(self.used))
        self.by_snapshots += window.by_snapshots()
        in_two = window.in_two()
        if len(in_two):
            for rows, clusters, _ in self._references():
                chosen = np.isin(clusters, in_two)
                self._in_two.append((rows[chosen], clusters[chosen]))
        return window.next

    def _references(self) -> Iterator[tuple[Indexes, Clusters, bool]]:
        """L2 table and host cluster of all references, those of one table to one cluster once; some at a time."""
        first = 0
        for batch in self._walk.batches():
            rows, clusters = batch.references()
            if batch.has_compressed and len(clusters):  # several may lie in one cluster, one in two
                order = np.lexsort((clusters, rows))
                rows, clusters = rows[order], clusters[order]
                is_new = np.concatenate(([True], (np.diff(rows) != 0) | (np.diff(clusters) != 0)))
                rows, clusters = rows[is_new], clusters[is_new]
            yield rows + first, clusters, batch.has_compressed
            first += len(batch.tables)

    def _l1_index(self, tables: Indexes) -> Indexes:
        """The index of an L1 entry that points to each of these tables. In a sound image all have the same."""
        if self._l1_indexes is None:
            self._l1_indexes = np.zeros(len(self._by_table), np.intp)
            for number in self._followed():
                found, indexes = self._tables_of(number)
                self._l1_indexes[found] = indexes
        return self._l1_indexes[tables]


class _Window:
    """Host clusters from `start` on, those of the file and no more than _WINDOW, each with the state that has it alone.

    next   the first cluster after the window that anything was said of; None if there is none
    """

    def __init__(self, start: int, nb_clusters: int) -> None:
        self._start = start
        self._limit = nb_clusters
        size = max(0, min(_WINDOW, nb_clusters - start))
        self._owners = np.full(size, _NOBODY, np.int32)
        self._is_active = np.zeros(size, np.bool_)
        self._l1_indexes: NDArray[np.int32] | None = None
        self._in_two: list[Clusters] = []
        self.next: int | None = None

    def has(self, clusters: Clusters) -> NDArray[np.bool_]:
        return (clusters >= self._start) & (clusters < self._start + len(self._owners))

    def claim(self, clusters: Clusters, states: NDArray[np.int32], is_active: NDArray[np.bool_]) -> None:
        """Somebody refers to these clusters: a state alone or several (_SHARED), and whether the active disk does."""
        is_inside = self.has(clusters)
        if not is_inside.all():
            later = clusters[(clusters >= self._start + len(self._owners)) & (clusters < self._limit)]
            if len(later):
                self.next = min(int(later.min()), self.next or self._limit)
            clusters, states, is_active = clusters[is_inside], states[is_inside], is_active[is_inside]
        where = clusters - self._start
        before = self._owners[where]
        now = np.where((before == _NOBODY) | (before == states), states, np.int32(_SHARED))
        self._owners[where] = now
        self._owners[where[self._owners[where] != now]] = _SHARED  # twice in this call, by different states
        self._is_active[where[is_active]] = True

    def note(self, clusters: Clusters, l1_indexes: Indexes) -> None:
        """Find clusters that L2 tables of different L1 entries refer to: one state may have both tables.

        Tables of one L1 index belong to different states, which is the rule where snapshots are. A cluster in two
        tables of one state is the exception: the compressed data at the end of one table and the start of the next.
        """
        if self._l1_indexes is None:
            self._l1_indexes = np.full(len(self._owners), _NOBODY, np.int32)
        where, now = clusters - self._start, l1_indexes.astype(np.int32)
        before = self._l1_indexes[where]
        self._l1_indexes[where] = now
        differs = (before != _NOBODY) & (before != now) | (self._l1_indexes[where] != now)
        if differs.any():
            self._in_two.append(np.unique(clusters[differs]))

    def in_two(self) -> Clusters:
        return np.unique(np.concatenate([np.zeros(0, np.int64), *self._in_two]))

    def used(self, nb_states: int) -> NDArray[np.int64]:
        """By state, how many clusters it has alone."""
        return np.bincount(self._owners[self._owners >= 0], minlength=nb_states)

    def by_snapshots(self) -> int:
        return int(np.count_nonzero((self._owners != _NOBODY) & ~self._is_active))
