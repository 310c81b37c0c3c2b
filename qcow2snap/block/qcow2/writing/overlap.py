"""Which clusters of the file hold metadata, so that nothing else is written over them (QEMU's overlap checks).

An image whose tables or refcounts are wrong may tell us to put data where a table is. QEMU checks each write
against header, active L1 and L2 tables, refcount table and blocks, snapshot table, the snapshots' L1 tables and the
bitmap directory by default ("overlap-check=cached"); so does this. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from qcow2snap.block.node import UnsupportedFeature

MAX_CLUSTERS = 1 << 21  # of metadata: 4 TiB of an image with clusters of 4 KiB


class Section(Enum):
    """QEMU's QCow2MetadataOverlap (block/qcow2.h)."""

    MAIN_HEADER = "header"
    ACTIVE_L1 = "active L1 table"
    ACTIVE_L2 = "active L2 table"
    REFCOUNT_TABLE = "refcount table"
    REFCOUNT_BLOCK = "refcount block"
    SNAPSHOT_TABLE = "snapshot table"
    INACTIVE_L1 = "L1 table of a snapshot"
    BITMAP_DIRECTORY = "bitmap directory"


class Sections:
    """Clusters by what they hold. For one thread at a time; offsets and lengths are bytes of the file.

    memory  some 100 bytes for each cluster of metadata, of which there is one to some hundred clusters of data
    errors  UnsupportedFeature for more than MAX_CLUSTERS
    """

    def __init__(self, cluster_bits: int) -> None:
        self._bits = cluster_bits
        self._sections: dict[int, Section] = {}
        self._added = 0
        self._contested: set[int] = set()  # clusters that two tables claim

    def add(self, section: Section, offset: int, length: int) -> None:
        self.add_clusters(section, self._clusters(offset, length))

    def add_clusters(self, section: Section, clusters: Iterable[int]) -> None:
        for cluster in clusters:
            self._added += 1
            if self._added > MAX_CLUSTERS:
                raise UnsupportedFeature("the image has too much metadata to be written; it can be read")
            if self._sections.setdefault(cluster, section) is not section:
                self._contested.add(cluster)

    def remove(self, offset: int, length: int) -> None:
        for cluster in self._clusters(offset, length):
            self._added -= self._sections.pop(cluster, None) is not None
            self._contested.discard(cluster)

    def overlap(self, offset: int, length: int, ignore: Section | None = None) -> Section | None:
        """What a write of this range would overwrite, besides the section that it belongs to."""
        sections = self._sections
        for cluster in self._clusters(offset, length):
            found = sections.get(cluster)
            if found is not None and (found is not ignore or cluster in self._contested):
                return found
        return None

    def _clusters(self, offset: int, length: int) -> range:
        return range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1) if length else range(0)
