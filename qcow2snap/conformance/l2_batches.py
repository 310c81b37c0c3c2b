"""L2 tables as they stand in the file, many at a time, and the host clusters that they refer to. Judges nothing.

An image with small clusters has many small tables, one with large clusters few large ones: a batch has about as many
entries in any case, so that numpy's calls cost little against what they do. All masks are those of the layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from formats.qcow2 import SECTOR_SIZE, StandardL2Entry, compressed_l2_entry
from qcow2snap.block.file import FileNode
from qcow2snap.block.qcow2.header import ImageHeader

if TYPE_CHECKING:
    from qcow2snap.conformance.references import L2Tables

ZERO = np.uint64(StandardL2Entry.mask("zero"))
OFFSET = np.uint64(StandardL2Entry.mask("offset"))
COMPRESSED = np.uint64(StandardL2Entry.mask("compressed"))
COPIED = np.uint64(StandardL2Entry.mask("copied"))

_BATCH_BYTES = 512 << 10  # of tables; what fits a processor's cache is decoded three times as fast
_GAP = 4 << 10  # bytes between tables that are read in vain: cheaper than another call

Rows = NDArray[np.intp]

_NO_ROWS: Rows = np.zeros(0, np.intp)
_NO_NUMBERS: NDArray[np.int64] = np.zeros(0, np.int64)


@cache
def _steps(nb_entries: int, cluster_size: int) -> NDArray[np.uint64]:
    """How far the clusters of a run lie from its first."""
    return np.arange(nb_entries, dtype=np.uint64) * np.uint64(cluster_size)


def distinct(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """In order, each once. As np.unique, which loads a part of numpy that nothing else here needs, for 7 ms."""
    return counted(numbers)[0]


def counted(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """In order, each once, and how often it is there."""
    ordered = np.sort(numbers)
    is_new = np.ones(len(ordered), np.bool_)
    is_new[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_new)
    return ordered[starts], np.diff(starts, append=len(ordered))


class L2Batch:
    """Some L2 tables. Two-dimensional arrays have a row for each table, in the order of `tables`.

    rows      of `others`: where its tables are in the batch that it was taken from
    entries   the L2 entries; of extended ones, the first 64 bits
    bitmaps   the second 64 bits of extended L2 entries, else None
    threads   any; nothing changes after construction
    """

    def __init__(
        self,
        header: ImageHeader,
        tables: L2Tables,
        words: NDArray[np.uint64],
        file_size: int,
        rows: Rows = _NO_ROWS,
    ) -> None:
        self.header = header
        self.tables = tables
        self.file_size = file_size
        self.rows = rows
        self._words = words
        self.entries = words[:, ::2] if header.has_extended_l2 else words
        self.bitmaps = words[:, 1::2] if header.has_extended_l2 else None

    @cached_property
    def all_bits(self) -> int:
        """The bits that any entry has set. Most of what can be wrong with entries shows in them."""
        return int(np.bitwise_or.reduce(self.entries, axis=None))

    @cached_property
    def has_compressed(self) -> bool:
        return bool(self.all_bits & int(COMPRESSED))

    @cached_property
    def is_compressed(self) -> NDArray[np.bool_]:
        compressed: NDArray[np.bool_] = (self.entries & COMPRESSED) != 0
        return compressed

    @cached_property
    def is_standard(self) -> NDArray[np.bool_]:
        """Whether an entry is a standard one with a host cluster: QEMU's types NORMAL and ZERO_ALLOC."""
        standard: NDArray[np.bool_] = (self.entries & OFFSET) != 0
        if self.header.has_data_file:  # host offset 0 is a place there, told from "none" by the COPIED bit
            is_zero = False if self.header.has_extended_l2 else (self.entries & ZERO) != 0
            standard |= (self.entries & COPIED != 0) & ~np.asarray(is_zero)
        if self.has_compressed:
            standard &= ~self.is_compressed
        return standard

    @cached_property
    def standard(self) -> tuple[Rows, Rows, NDArray[np.int64]]:
        """Row, column and host offset of every standard entry with a host cluster."""
        rows, columns = np.nonzero(self.is_standard)
        return rows, columns, (self.entries[rows, columns] & OFFSET).view(np.int64)

    @cached_property
    def compressed(self) -> tuple[Rows, Rows, NDArray[np.int64], NDArray[np.int64]]:
        """Row, column, host offset and length of the data of every compressed cluster."""
        if not self.has_compressed:
            return _NO_ROWS, _NO_ROWS, _NO_NUMBERS, _NO_NUMBERS
        descriptor = compressed_l2_entry(self.header.cluster_bits)
        sectors = descriptor.ranges["additional_sectors"]
        rows, columns = np.nonzero(self.is_compressed)
        entries = self.entries[rows, columns]
        offsets = (entries & np.uint64(descriptor.mask("offset"))).view(np.int64)
        additional = ((entries & np.uint64(sectors.mask)) >> np.uint64(sectors.first)).view(np.int64)
        return rows, columns, offsets, (additional + 1) * SECTOR_SIZE - offsets % SECTOR_SIZE

    @cached_property
    def runs(self) -> tuple[Rows, NDArray[np.int64]]:
        """The tables that are one run: standard entries of one COPIED bit, each cluster behind the last. Row, cluster.

        Fast path: preallocated metadata is nothing else, and a table counts as one slice instead of 8,192 clusters.
        """
        header = self.header
        if self.has_compressed or header.has_data_file:
            return _NO_ROWS, _NO_NUMBERS
        nb_entries = self.entries.shape[1]
        firsts, lasts = self.entries[:, 0] & OFFSET, self.entries[:, -1] & OFFSET
        may_be = (firsts != 0) & (lasts - firsts == np.uint64((nb_entries - 1) * header.cluster_size))
        may_be &= (firsts & np.uint64(header.cluster_size - 1) == 0) & (lasts < np.uint64(self.file_size))
        rows = np.flatnonzero(may_be)
        if len(rows):
            entries = self.entries if len(rows) == len(self.entries) else self.entries[rows]
            steps = _steps(nb_entries, header.cluster_size)
            rows = rows[(entries - steps == entries[:, :1]).all(axis=1)]
        return rows, (firsts[rows] >> np.uint64(header.cluster_bits)).view(np.int64)

    @cached_property
    def run_is_copied(self) -> NDArray[np.bool_]:
        """The COPIED bit that all entries of each of `runs` have."""
        copied: NDArray[np.bool_] = self.entries[self.runs[0], 0] & COPIED != 0
        return copied

    @cached_property
    def others(self) -> L2Batch:
        """The tables that are not in `runs`."""
        rows, _ = self.runs
        is_other = np.ones(len(self.entries), np.bool_)
        is_other[rows] = False
        words = self._words[is_other] if len(rows) else self._words
        return L2Batch(self.header, self.tables.chosen(is_other), words, self.file_size, np.flatnonzero(is_other))

    @cached_property
    def is_active(self) -> NDArray[np.bool_]:
        """Which tables the active L1 table points to. As in QEMU, an offset of 0 is none, whatever its bits."""
        active: NDArray[np.bool_] = (self.tables.active_counts > 0) & (self.tables.offsets != 0)
        return active

    def references(self) -> tuple[Rows, NDArray[np.int64]]:
        """Row and host cluster of every reference to a data cluster: one for each cluster that an entry touches.

        What leaves the file by a cluster or more is none, as in QEMU; nor is what lies in an external data file. A
        cluster that a table refers to several times is there several times.
        """
        return touched_clusters(*self.regions(), self.header.cluster_bits)

    def regions(self) -> tuple[Rows, NDArray[np.int64], NDArray[np.int64] | None]:
        """Row, host offset and length of what is referred to, in bytes. Length None: a cluster at a boundary each."""
        cluster_size = self.header.cluster_size
        if self.header.has_data_file:  # nor may it have compressed clusters: they are not counted
            return _NO_ROWS, _NO_NUMBERS, None
        rows, _, offsets = self.standard
        is_aligned = not self.all_bits & int(OFFSET) & (cluster_size - 1) or not (offsets & (cluster_size - 1)).any()
        if is_aligned and not self.has_compressed:
            inside = offsets < self.file_size
            return (rows, offsets, None) if inside.all() else (rows[inside], offsets[inside], None)
        lengths = np.full(len(offsets), cluster_size, np.int64)
        if self.has_compressed:
            their_rows, their_columns, their_offsets, their_lengths = self.compressed
            if self.bitmaps is not None:  # a subcluster bitmap makes it no reference in QEMU
                sound = self.bitmaps[their_rows, their_columns] == 0
                their_rows, their_offsets, their_lengths = their_rows[sound], their_offsets[sound], their_lengths[sound]
            rows = np.concatenate((rows, their_rows))
            offsets = np.concatenate((offsets, their_offsets))
            lengths = np.concatenate((lengths, their_lengths))
        inside = offsets + lengths < self.file_size + cluster_size
        return rows[inside], offsets[inside], lengths[inside]


def touched_clusters(
    rows: Rows, offsets: NDArray[np.int64], lengths: NDArray[np.int64] | None, cluster_bits: int
) -> tuple[Rows, NDArray[np.int64]]:
    """Row and index of every cluster that regions touch."""
    first = offsets >> cluster_bits
    if lengths is None:
        return rows, first
    more = ((offsets + lengths - 1) >> cluster_bits) - first
    if not more.any():
        return rows, first
    nb_clusters = more + 1
    starts = np.cumsum(nb_clusters) - nb_clusters
    within = np.arange(int(nb_clusters.sum())) - np.repeat(starts, nb_clusters)
    return np.repeat(rows, nb_clusters), np.repeat(first, nb_clusters) + within


def read_batches(file: FileNode, header: ImageHeader, tables: L2Tables, file_size: int) -> Iterator[L2Batch]:
    """The tables at these host offsets, which are in ascending order, some at a time."""
    size = header.cluster_size
    per_batch = max(1, _BATCH_BYTES // size)
    buffer = np.empty((per_batch, size), np.uint8)
    for start in range(0, len(tables), per_batch):
        part = tables.part(start, start + per_batch)
        data = buffer[: len(part)]
        _read(file, part.offsets, data, size)
        yield L2Batch(header, part, data.view(">u8").astype(np.uint64), file_size)


def _read(file: FileNode, offsets: NDArray[np.int64], into: NDArray[np.uint8], size: int) -> None:
    """Read a table into each row; neighbours, and those of small clusters with little between them, in one call."""
    if size > _GAP:
        breaks = np.flatnonzero(np.diff(offsets) != size) + 1
    else:
        breaks = np.flatnonzero((np.diff(offsets) - size > _GAP) | (offsets[1:] % size != 0)) + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(offsets)], strict=True):
        start, span = int(offsets[first]), int(offsets[last - 1] - offsets[first]) + size
        if span == (last - first) * size:
            file.preadv_available(start, [into[first:last].reshape(-1).data])
        else:
            data = np.zeros(span, np.uint8)
            file.preadv_available(start, [data.data])
            within = (offsets[first:last] - start)[:, None] + np.arange(size)
            into[first:last] = data[within]
