"""Areas of the file that two structures take: what no refcount can make right."""

from __future__ import annotations

import numpy as np

from qcow2snap.conformance.l2_batches import distinct
from qcow2snap.conformance.refcounts import RefcountStructures
from qcow2snap.conformance.references import References
from qcow2snap.conformance.subject import Region, Subject

_MOST = 10_000  # clusters that are told; with more, the image is not one any more


class Structures:
    """Header, tables and blocks of an image, by the clusters they take.

    threads  any; nothing changes after construction

    Two states may have one L2 table, or even one L1 table: that is sharing, and what refcounts are for.
    """

    def __init__(self, subject: Subject, walk: References, refcounts: RefcountStructures) -> None:
        self._bits = subject.header.cluster_bits
        self._regions = list(dict.fromkeys(region._replace(what="", states=()) for region in subject.regions))
        self._names = {(region.offset, region.length): region for region in reversed(subject.regions)}
        size = subject.header.cluster_size
        self._tables = walk.tables.offsets
        self._blocks = distinct(refcounts.blocks)
        self._bits_of_bitmaps = subject.bitmap_clusters()
        starts = [region.offset >> self._bits for region in self._regions]
        ends = [((region.offset + region.length - 1) >> self._bits) + 1 for region in self._regions]
        table_starts, table_ends = self._tables >> self._bits, (self._tables + size - 1 >> self._bits) + 1
        self._starts = np.concatenate((np.array(starts, np.int64), table_starts, self._blocks, self._bits_of_bitmaps))
        self._ends = np.concatenate((np.array(ends, np.int64), table_ends, self._blocks + 1, self._bits_of_bitmaps + 1))
        self.overlaps = self._overlaps()  # clusters that two structures take, in order

    def _overlaps(self) -> list[int]:
        order = np.argsort(self._starts, kind="stable")
        starts, ends = self._starts[order], self._ends[order]
        reached = np.maximum.accumulate(ends)[:-1]
        found: set[int] = set()
        for index in np.flatnonzero(starts[1:] < reached).tolist():
            low, high = int(starts[index + 1]), min(int(ends[index + 1]), int(reached[index]))
            found.update(range(low, min(high, low + _MOST)))
            if len(found) >= _MOST:
                break
        return sorted(found)[:_MOST]

    def at(self, cluster: int) -> list[Region]:
        """What takes a cluster."""
        indexes = np.flatnonzero((self._starts <= cluster) & (cluster < self._ends))
        return [self._region(index) for index in indexes.tolist()]

    def _region(self, index: int) -> Region:
        nb_regions, size = len(self._regions), 1 << self._bits
        if index < nb_regions:
            region = self._regions[index]
            return self._names[region.offset, region.length]
        index -= nb_regions
        if index < len(self._tables):
            return Region(int(self._tables[index]), size, "an L2 table")
        index -= len(self._tables)
        if index < len(self._blocks):
            return Region(int(self._blocks[index]) << self._bits, size, "a refcount block")
        index -= len(self._blocks)
        return Region(int(self._bits_of_bitmaps[index]) << self._bits, size, "a cluster of a bitmap")
