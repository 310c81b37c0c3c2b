"""What the parts of a check share: the image, what is found, and which areas of the file its structures take."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qcow2snap.block.file import FileNode
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.rules import Rule
from qcow2snap.conformance.findings import Finding, Findings
from qcow2snap.conformance.references import size_in_sectors

_MAX_BITMAP_TABLES = 64 << 20  # bytes of the tables of all bitmaps that one check reads


class Region(NamedTuple):
    """An area of the file that a structure takes, in bytes."""

    offset: int
    length: int
    what: str
    states: tuple[int, ...] = ()


class Subject:
    """An image whose header could be read."""

    def __init__(self, file: FileNode, header: ImageHeader, findings: Findings) -> None:
        self.file = file
        self.file_size = size_in_sectors(file)
        self.header = header
        self.findings = findings
        self.bitmap_data: list[NDArray[np.int64]] = []  # host offsets of clusters, at their boundaries
        self.bitmap_budget = _MAX_BITMAP_TABLES
        self.regions: list[Region] = []  # what counts as a reference besides L2 tables and what these refer to

    @property
    def nb_clusters(self) -> int:
        """Host clusters, the last of which may be there in part."""
        return -(-self.file_size // self.header.cluster_size)

    def leaves_file(self, offset: int, length: int) -> bool:
        """By a cluster or more: the last cluster need not be there whole (QEMU qcow2_inc_refcounts_imrt)."""
        return offset + length - self.file_size >= self.header.cluster_size

    def takes(self, region: Region, rule: Rule) -> None:
        """Count a structure's area. If it leaves the file, that breaks `rule`, and it is no reference to anything."""
        if region.length <= 0:
            return
        if self.leaves_file(region.offset, region.length):
            what = f"{region.what}, {region.length} bytes at {region.offset:#x}, reaches beyond the end of the file"
            stops = region.offset + region.length >= 1 << 63  # as QEMU, which adds these up in signed 64 bits
            self.findings.add(Finding(rule, region.offset, what, states=region.states, stops=stops))
        else:
            self.regions.append(region)

    def bitmap_clusters(self) -> NDArray[np.int64]:
        """Host clusters of the bits of bitmaps; one that two refer to, twice."""
        return np.concatenate([np.zeros(0, np.int64), *self.bitmap_data]) >> self.header.cluster_bits
