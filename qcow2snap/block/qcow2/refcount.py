"""What a reader wants of the refcounts: whether the metadata was preallocated. Counts with numpy, keeps nothing."""

from __future__ import annotations

import numpy as np

from formats import qcow2 as layout
from formats.qcow2 import RefcountTableEntry
from qcow2snap.block.file import FileNode
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.refcount_bits import unpacked


def has_preallocated_metadata(file: FileNode, header: ImageHeader) -> bool:
    """Whether notably more clusters are referred to than the file has allocated; then it has holes worth finding.

    QEMU qcow2_detect_metadata_preallocation: at least a ninth more, and two. Refcounts that cannot be read count as
    none, as there.
    """
    cluster_size = header.cluster_size
    real_clusters = file.allocated_size() // cluster_size
    threshold = max(real_clusters * 10 // 9, real_clusters + 2)
    end_cluster = -(-file.current_size() // cluster_size)
    if end_cluster < threshold:
        return False
    table_size = min(header.refcount_table_clusters * cluster_size, layout.MAX_REFCOUNT_TABLE_SIZE)
    table = file.pread_available(header.refcount_table_offset, table_size)
    block_offsets = np.frombuffer(table[: len(table) // 8 * 8], dtype=">u8") & np.uint64(
        RefcountTableEntry.mask("offset")
    )
    per_block = cluster_size * 8 >> header.refcount_order
    count = 0
    counted: dict[int, int] = {}  # a damaged table may name one block a million times
    for index in np.flatnonzero(block_offsets):
        first = int(index) * per_block
        if first >= end_cluster:
            break
        offset = int(block_offsets[index])
        if first + per_block > end_cluster:
            count += _nonzero(file, offset, header, end_cluster - first)
        else:
            if offset not in counted:
                counted[offset] = _nonzero(file, offset, header, per_block)
            count += counted[offset]
        if count >= threshold:
            return True
    return False


def _nonzero(file: FileNode, offset: int, header: ImageHeader, nb_refcounts: int) -> int:
    """How many of the first refcounts of a block are not zero."""
    width = 1 << header.refcount_order
    data = file.pread_available(offset, -(-nb_refcounts * width // 8))
    return int(np.count_nonzero(unpacked(data, header.refcount_order)[:nb_refcounts]))
