"""References counted against refcounts, in windows of host clusters, and what the two have to say of each other.

The arrays of a window take 6 bytes a cluster (8 with refcounts of 32 bits and more). One window is enough for 1.5 TiB
in clusters of 64 KiB; a larger image is walked once for each of its windows, so that memory stays within a byte for
each cluster and a fixed amount.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2snap.conformance.l2_batches import COPIED, L2Batch, counted, distinct, touched_clusters
from qcow2snap.conformance.refcounts import RefcountStructures
from qcow2snap.conformance.references import References
from qcow2snap.conformance.subject import Subject
from qcow2snap.conformance.table_rules import add_copied

MAX_CLUSTERS = (1 << 31) - 1  # QEMU's INT_MAX, beyond which it does not count
_FIXED = 144 << 20  # bytes of a window besides one for each cluster of the file
_PIECE = 1 << 18  # clusters that are compared at a time

Indexes = NDArray[np.int64]


class Mismatches(NamedTuple):
    """Clusters whose refcount is not the number of their references, as columns; counts are bounded by 32 bits."""

    clusters: Indexes
    refcounts: Indexes
    references: Indexes


class Window:
    """References to the host clusters from `start` to before `stop`."""

    def __init__(self, subject: Subject, structures: RefcountStructures, start: int, stop: int) -> None:
        self._subject = subject
        self._structures = structures
        self._maximum = structures.maximum
        self._bits = subject.header.cluster_bits
        self.start, self.stop = start, stop
        self.counts = np.zeros(stop - start, np.uint32)
        self.refcounts, self.readable = structures.window(start, stop)
        self._blocks = self._within(structures.blocks)
        # The cluster behind the last is of the image only if something refers to it, as in QEMU.
        self._spare = subject.nb_clusters - start if start <= subject.nb_clusters < stop else None
        self._metadata: Indexes = np.zeros(0, np.int64)
        self._metadata_counts: NDArray[np.uint32] = np.zeros(0, np.uint32)

    def add_metadata(self, walk: References) -> None:
        """Everything but data clusters. To be called first."""
        for (offset, length), number in Counter((r.offset, r.length) for r in self._subject.regions).items():
            first, last = offset >> self._bits, (offset + length - 1) >> self._bits
            self.counts[max(0, first - self.start) : max(0, last + 1 - self.start)] += np.uint32(number)
        tables = walk.tables
        rows = np.arange(len(tables))
        lengths = None
        if (tables.offsets & (self._subject.header.cluster_size - 1)).any():
            lengths = np.full(len(tables), self._subject.header.cluster_size, np.int64)
        rows, clusters = touched_clusters(rows, tables.offsets, lengths, self._bits)
        self._add(clusters, tables.counts[rows])
        self._add(self._blocks, np.ones(len(self._blocks), np.int64))
        bits = self._subject.bitmap_clusters()
        self._add(bits, np.ones(len(bits), np.int64))
        self._metadata = self._places_of_metadata(np.concatenate((clusters, bits)))
        self._metadata_counts = self.counts[self._metadata]

    def _places_of_metadata(self, others: Indexes) -> Indexes:
        """Where `counts` is not zero, by what was counted, as long as that is little."""
        regions = {(r.offset, r.length) for r in self._subject.regions}
        ranges = [(offset >> self._bits, (offset + length - 1) >> self._bits) for offset, length in regions]
        if sum(last - first for first, last in ranges) > _PIECE:
            return np.flatnonzero(self.counts)
        parts = [np.arange(first, last + 1) for first, last in ranges]
        return distinct(self._within(np.concatenate([*parts, others, self._blocks]))) - self.start

    def add_batch(self, batch: L2Batch) -> None:
        """The data clusters of some L2 tables."""
        nb_entries = batch.entries.shape[1]
        for row, first in zip(*(column.tolist() for column in batch.runs), strict=True):
            low, high = max(0, first - self.start), max(0, first + nb_entries - self.start)
            self.counts[low:high] += np.uint32(batch.tables.counts[row])
        rest = batch.others
        if len(rest.entries):
            rows, clusters = rest.references()
            self._add(clusters, rest.tables.counts[rows])

    def settle(self) -> None:
        """All references are in: a spare cluster that has none is no cluster of the image."""
        if self._spare is not None and not self.counts[self._spare]:
            self.refcounts[self._spare] = 0

    def judge_copied(self, batch: L2Batch) -> None:
        """COPIED bits of the active disk against the refcounts of this window."""
        is_active = batch.is_active
        if not is_active.any():
            return
        wrong = np.zeros(batch.entries.shape, np.bool_)
        nb_entries = batch.entries.shape[1]
        rows, firsts = batch.runs
        for row, first, copied in zip(rows.tolist(), firsts.tolist(), batch.run_is_copied.tolist(), strict=True):
            if is_active[row]:
                low, high = max(first, self.start), min(first + nb_entries, self.stop)
                if low < high:
                    within = slice(low - self.start, high - self.start)
                    bad = self._is_one(within) != copied
                    self._forgive(bad, within)
                    if bad.any():
                        wrong[row, low - first : high - first] = bad
        rest = batch.others
        if len(rest.entries):
            self._judge_scattered(rest, wrong)
        if wrong.any():
            add_copied(self._subject, batch, wrong)

    def _judge_scattered(self, batch: L2Batch, wrong: NDArray[np.bool_]) -> None:
        """`wrong` is for the tables that `batch` was taken from."""
        rows, columns, offsets = batch.standard
        is_active = batch.is_active
        if not is_active.all():
            chosen = is_active[rows]
            rows, columns, offsets = rows[chosen], columns[chosen], offsets[chosen]
        if not len(rows):
            return
        is_copied = batch.entries[rows, columns] & COPIED != 0
        if self._subject.header.has_data_file:
            bad = ~is_copied & (self.start == 0)
        else:
            clusters = offsets >> self._bits
            if int(clusters.min()) >= self.start and int(clusters.max()) < self.stop:
                within = clusters - self.start if self.start else clusters
                bad = self._is_one(within) != is_copied
            else:
                in_window = (clusters >= self.start) & (clusters < self.stop)
                within = np.where(in_window, clusters - self.start, 0)
                bad = (is_copied != self._is_one(within)) & in_window
            self._forgive(bad, within)
            beyond = clusters > self._subject.nb_clusters
            if self.start == 0 and beyond.any():  # a cluster that was cut off may have its refcount still
                refcounts = self._structures.refcounts_at(clusters[beyond])
                bad[beyond] = (is_copied[beyond] != (refcounts == 1)) & (refcounts >= 0)
        if bad.any():
            wrong[batch.rows[rows[bad]], columns[bad]] = True

    def _is_one(self, where: slice | Indexes) -> NDArray[np.bool_]:
        one: NDArray[np.bool_] = self.refcounts[where] == 1
        return one

    def _forgive(self, bad: NDArray[np.bool_], where: slice | Indexes) -> None:
        """A refcount that cannot be read proves nothing."""
        if self.readable is not None:
            bad &= self.readable[where]

    def mismatches(self) -> Iterator[Mismatches]:
        """In the order of the file, a piece at a time. References that a refcount cannot count are not counted."""
        for low in range(0, self.stop - self.start, _PIECE):
            piece = slice(low, low + _PIECE)
            counts = self.counts[piece]
            if int(counts.max()) > self._maximum:
                counts = np.minimum(counts, np.uint32(self._maximum))
            differ = counts != self.refcounts[piece]
            self._forgive(differ, piece)
            found = np.flatnonzero(differ)
            if len(found):
                refcounts = self.refcounts[piece][found].astype(np.int64)
                yield Mismatches(found + low + self.start, refcounts, counts[found].astype(np.int64))

    def overflows(self) -> tuple[Indexes, Indexes]:
        """Clusters with more references than a refcount can count, and their number."""
        if not len(self.counts) or int(self.counts.max()) <= self._maximum:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        found = np.flatnonzero(self.counts > np.uint32(self._maximum))
        return found + self.start, self.counts[found].astype(np.int64)

    def overlapping_data(self) -> Indexes:
        """Clusters of metadata that L2 entries refer to as well."""
        more = self.counts[self._metadata] != self._metadata_counts
        overlapping: Indexes = self._metadata[more] + self.start
        return overlapping

    def shared_blocks(self) -> tuple[Indexes, Indexes]:
        """Refcount blocks whose cluster has another reference, and how many of its references QEMU minds.

        QEMU adds blocks last, and wants the number of references after each to be one.
        """
        blocks, numbers = counted(self._blocks)
        totals = np.minimum(self.counts[blocks - self.start].astype(np.int64), min(self._maximum, 1 << 32))
        before = self.counts[blocks - self.start].astype(np.int64) - numbers
        minded = np.where(before > 0, numbers, numbers - 1)
        shared = (totals > 1) & (minded > 0)
        return blocks[shared], minded[shared]

    def highest(self) -> int:
        """The highest cluster that has a refcount or a reference; -1 if there is none."""
        for low in reversed(range(0, self.stop - self.start, _PIECE)):
            piece = slice(low, low + _PIECE)
            used = np.flatnonzero((self.counts[piece] != 0) | (self.refcounts[piece] != 0))
            if len(used):
                return int(used[-1]) + low + self.start
        return -1

    def _within(self, clusters: Indexes) -> Indexes:
        return clusters[(clusters >= self.start) & (clusters < self.stop)]

    def _add(self, clusters: Indexes, weights: Indexes) -> None:
        if not len(clusters):
            return
        within = clusters - self.start
        if int(within.min()) < 0 or int(within.max()) >= len(self.counts):
            inside = (within >= 0) & (within < len(self.counts))
            within, weights = within[inside], weights[inside]
        np.add.at(self.counts, within, weights.astype(np.uint32))


def windows(subject: Subject, structures: RefcountStructures) -> list[tuple[int, int]]:
    """The windows of a file, in order. One cluster more than it has: a structure may end in it."""
    nb_clusters = subject.nb_clusters + 1
    size = max(1 << 20, (nb_clusters + _FIXED) // (6 if structures.maximum < 1 << 16 else 8))
    return [(start, min(start + size, nb_clusters)) for start in range(0, nb_clusters, size)]
