"""What an L1 table leads to, counted: its L2 tables and the clusters that those refer to. Changes nothing.

For whoever gives all of a disk another reference or takes one away: making, deleting and applying snapshots (QEMU
qcow2_update_snapshot_refcount), and counting anew. L2 tables are read one at a time, with numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from formats.qcow2 import SECTOR_SIZE, compressed_l2_entry
from qcow2snap.block.file import FileNode
from qcow2snap.block.node import ImageFormatError
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.writing.entries import COMPRESSED, COPIED, L1_OFFSET, OFFSET


class References(NamedTuple):
    """Clusters in ascending order, each once, and how many references each has."""

    clusters: NDArray[np.uint64]
    counts: NDArray[np.int64]


def tree_references(file: FileNode, header: ImageHeader, l1: Iterable[int]) -> Iterator[References]:
    """All references of an L1 table's tree, as the file has it; one L2 table with all that it refers to at a time."""
    for entry in l1:
        offset = entry & L1_OFFSET
        if offset:
            own = np.array([offset >> header.cluster_bits], dtype=np.uint64)
            yield _counted(np.concatenate((own, l2_references(read_l2(file, header, offset), header))))


def read_l2(file: FileNode, header: ImageHeader, offset: int) -> NDArray[np.uint64]:
    """The words of an L2 table, as the machine's integers. Not where a table can be, or not whole: ImageFormatError."""
    if offset % header.cluster_size:
        what = f"an L1 entry points to {offset:#x}, not a cluster boundary"
        raise _in(file, rules.L1_ENTRY_ALIGNED.broken(offset, what))
    data = file.pread_available(offset, header.cluster_size)
    if len(data) < header.cluster_size:
        what = f"the L2 table at {offset:#x} reaches beyond the end of the file"
        raise _in(file, rules.L2_COMPLETE.broken(offset, what))
    return np.frombuffer(data, dtype=">u8").astype(np.uint64)


def l2_references(words: NDArray[np.uint64], header: ImageHeader) -> NDArray[np.uint64]:
    """The clusters of the image file that an L2 table refers to, one for each reference, in no order."""
    entries = words[:: header.l2_entry_size // 8]
    compressed = entries & np.uint64(COMPRESSED) != 0
    if header.has_data_file:
        return np.empty(0, dtype=np.uint64)  # its clusters are not counted, and none is compressed
    offsets = entries[~compressed] & np.uint64(OFFSET)
    clusters: NDArray[np.uint64] = offsets[offsets != 0] >> np.uint64(header.cluster_bits)
    if not compressed.any():
        return clusters
    first, last = compressed_clusters(entries[compressed], header)
    several = [np.arange(a, b + 1, dtype=np.uint64) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
    return np.concatenate((clusters, *several))


def compressed_clusters(
    entries: NDArray[np.uint64], header: ImageHeader
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The first and the last cluster that each compressed cluster's data lies in."""
    layout = compressed_l2_entry(header.cluster_bits)
    sectors = layout.ranges["additional_sectors"]
    offset = entries & np.uint64(layout.mask("offset"))
    additional = (entries & np.uint64(sectors.mask)) >> np.uint64(sectors.first)
    end = offset // np.uint64(SECTOR_SIZE) * np.uint64(SECTOR_SIZE) + (additional + np.uint64(1)) * np.uint64(
        SECTOR_SIZE
    )
    bits = np.uint64(header.cluster_bits)
    return offset >> bits, (end - np.uint64(1)) >> bits


def compressed_range(entry: int, header: ImageHeader) -> tuple[int, int]:
    """The first and the last cluster that the data of one compressed cluster lies in."""
    first, last = compressed_clusters(np.array([entry], dtype=np.uint64), header)
    return int(first[0]), int(last[0])


def with_copied_flags(
    words: NDArray[np.uint64], refcounts: NDArray[np.uint64], header: ImageHeader
) -> NDArray[np.uint64]:
    """An L2 table with COPIED where a cluster's refcount is 1, and only there. `refcounts`: of each entry's cluster.

    The flag of an external data file's clusters says that they are allocated; those stay.
    """
    result = words.copy()
    entries = result[:: header.l2_entry_size // 8]
    standard = (entries & np.uint64(COMPRESSED) == 0) & (entries & np.uint64(OFFSET) != 0)
    flag = np.uint64(COPIED)
    entries &= ~(flag * standard)
    entries |= flag * (standard & (refcounts == 1))
    return result


def _counted(clusters: NDArray[np.uint64]) -> References:
    # As np.unique does; but that imports numpy.ma, which takes longer than all of a snapshot.
    ordered = np.sort(clusters)
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
    return References(ordered[starts], np.diff(np.append(starts, len(ordered))).astype(np.int64))


def _in(file: FileNode, error: ImageFormatError) -> ImageFormatError:
    error.filename = file.filename
    return error
