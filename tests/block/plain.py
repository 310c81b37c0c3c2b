"""The plain twins of the fast paths: an L2 table decoded entry by entry with the declared layouts, no numpy."""

from __future__ import annotations

from collections.abc import Iterator

from formats.qcow2 import ExtendedL2Entry, StandardL2Entry
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.l2 import Kind

Unit = tuple[int, int]  # kind, host offset or entry; for kinds without either, 0


def plain_units(data: bytes, header: ImageHeader) -> Iterator[Unit]:
    """For each cluster, or each subcluster of an extended table, what its entry says."""
    for start in range(0, len(data), header.l2_entry_size):
        raw = data[start : start + header.l2_entry_size]
        yield from _extended(raw, header) if header.has_extended_l2 else [_standard(raw, header)]


def _standard(raw: bytes, header: ImageHeader) -> Unit:
    entry, word = StandardL2Entry.parse(raw), int.from_bytes(raw, "big")
    if entry.compressed:
        return (Kind.INVALID if header.has_data_file else Kind.COMPRESSED), word
    allocated = entry.offset != 0 or (header.has_data_file and entry.copied)
    if (allocated and entry.offset % header.cluster_size) or (entry.zero and header.version < 3):
        return Kind.INVALID, word
    if entry.zero:
        return (Kind.ZERO_ALLOC, entry.offset) if allocated else (Kind.ZERO_PLAIN, 0)
    return (Kind.NORMAL, entry.offset) if allocated else (Kind.UNALLOCATED, 0)


def _extended(raw: bytes, header: ImageHeader) -> Iterator[Unit]:
    entry, word = ExtendedL2Entry.parse(raw), int.from_bytes(raw[:8], "big")
    cluster, subclusters = entry.cluster, entry.subclusters
    if cluster.compressed:
        yield from [((Kind.INVALID if header.has_data_file else Kind.COMPRESSED), word)] * 32
        return
    hosted = cluster.offset != 0 or (header.has_data_file and cluster.copied)
    if (
        subclusters.allocated & subclusters.zero
        or (subclusters.allocated and not hosted)
        or (hosted and cluster.offset % header.cluster_size)
    ):
        yield from [(Kind.INVALID, word)] * 32
        return
    for index in range(32):
        host = cluster.offset + index * header.subcluster_size
        if subclusters.allocated >> index & 1:
            yield Kind.NORMAL, host
        elif subclusters.zero >> index & 1:
            yield (Kind.ZERO_ALLOC, host) if hosted else (Kind.ZERO_PLAIN, 0)
        else:
            yield (Kind.UNALLOCATED_ALLOC, host) if hosted else (Kind.UNALLOCATED, 0)
