"""What `qemu-img check` tells besides errors: how much of the active disk is allocated, compressed and fragmented."""

from __future__ import annotations

from typing import NamedTuple

from formats.qcow2 import SECTOR_SIZE
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.conformance.l2_batches import L2Batch


class Figures(NamedTuple):
    """Clusters of the active disk, and the end of what the image file uses, in bytes. Names and meanings are QEMU's."""

    image_end_offset: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    compressed_clusters: int


class FragmentCounter:
    """Adds up over all L2 tables of the active disk, each as often as its L1 table points there."""

    def __init__(self, header: ImageHeader) -> None:
        self._header = header
        self._allocated = self._fragmented = self._compressed = 0

    def add(self, batch: L2Batch) -> None:
        weights = batch.tables.active_counts
        rows, _ = batch.runs
        self._allocated += int(weights[rows].sum()) * batch.entries.shape[1]
        rest = batch.others
        if not len(rest.entries) or not rest.tables.active_counts.any():
            return
        weights = rest.tables.active_counts
        rows, _, offsets = rest.standard
        # A cluster that is not where the last one of its table ends, entries without one between them or not.
        is_break = (offsets[1:] != offsets[:-1] + self._header.cluster_size) & (rows[1:] == rows[:-1])
        self._allocated += int(weights[rows].sum())
        self._fragmented += int(weights[rows[1:]][is_break].sum())
        if rest.has_compressed and not self._header.has_data_file:
            rows, columns, _, _ = rest.compressed
            if rest.bitmaps is not None:
                rows = rows[rest.bitmaps[rows, columns] == 0]
            number = int(weights[rows].sum())
            self._allocated += number
            self._compressed += number
            self._fragmented += number  # QEMU: compressed clusters are fragmented by nature

    def figures(self, highest_cluster: int) -> Figures:
        header = self._header
        size = header.size // SECTOR_SIZE * SECTOR_SIZE
        return Figures(
            image_end_offset=(highest_cluster + 1) * header.cluster_size,
            total_clusters=-(-size // header.cluster_size),
            allocated_clusters=self._allocated,
            fragmented_clusters=self._fragmented,
            compressed_clusters=self._compressed,
        )
