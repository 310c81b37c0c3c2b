"""Refcounts counted anew, for an image that was not closed cleanly while they were postponed (the dirty bit).

Its L1 and L2 tables are right, and say all: every cluster's refcount is the number of references to it. QEMU does the
same when it opens such an image (qcow2_co_check with BDRV_FIX_ERRORS). What damage goes deeper is refused here, and
qemu-img's to repair.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from formats import qcow2 as layout
from formats.qcow2 import BitmapTableEntry, HeaderExtensionType
from qcow2snap.block.node import ImageFormatError
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.bitmaps import read_bitmap_directory, read_bitmap_table
from qcow2snap.block.qcow2.l1 import read_l1
from qcow2snap.block.qcow2.snapshot_table import SnapshotTable
from qcow2snap.block.qcow2.words import words
from qcow2snap.block.qcow2.writing.image_file import ImageFile
from qcow2snap.block.qcow2.writing.metadata import Metadata
from qcow2snap.block.qcow2.writing.tree import tree_references

_BITS_OFFSET = BitmapTableEntry.mask("offset")


def repair_refcounts(metadata: Metadata, snapshots: SnapshotTable) -> int:
    """Make every refcount what it has to be, and the COPIED flags with them; gives how many were wrong.

    All is on disk when this returns. ImageFormatError if the tables cannot be followed.
    """
    counts = _Counter()
    for clusters, numbers in _references(metadata, snapshots):
        counts.add(clusters, numbers)
    with metadata.lock:
        wrong = _raise(metadata, counts) + _lower(metadata, counts)
        metadata.update_copied_flags()
    metadata.commit()
    return wrong


def _raise(metadata: Metadata, counts: _Counter) -> int:
    """Locked. Refcounts that are too low; those who refer to what is made for that are counted from then on."""
    refcounts, bits = metadata.refcounts, metadata.header.cluster_bits
    # What has the refcount 0 may be in use, until this is done: blocks are made behind all that is.
    refcounts.look_from(max(counts.nb_clusters, -(-metadata.file.size >> bits)))
    table, known = refcounts.table_offset, {offset for offset in refcounts.table if offset}
    wrong = 0
    for clusters, differences in _differences(metadata, counts):
        rising = differences > 0
        refcounts.add_many(clusters[rising], differences[rising])
        wrong += int(np.count_nonzero(rising))
    new = [offset >> bits for offset in refcounts.table if offset and offset not in known]
    if refcounts.table_offset != table:
        first = refcounts.table_offset >> bits
        new += range(first, first + (8 * len(refcounts.table) >> bits))
    counts.add(np.array(sorted(new), dtype=np.uint64), np.ones(len(new), dtype=np.int64))
    return wrong


def _lower(metadata: Metadata, counts: _Counter) -> int:
    """Locked. Refcounts that are too high."""
    wrong = 0
    for clusters, differences in _differences(metadata, counts):
        falling = differences < 0
        metadata.refcounts.add_many(clusters[falling], differences[falling])
        wrong += int(np.count_nonzero(falling))
    return wrong


def _differences(metadata: Metadata, counts: _Counter) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """Clusters, and what their refcounts lack; as many at a time as a block has."""
    refcounts, per_block = metadata.refcounts, metadata.refcounts.per_block
    for first in range(0, max(counts.nb_clusters, len(refcounts.table) * per_block), per_block):
        index = first // per_block
        wanted = counts.part(first, per_block)
        if wanted.any() or (index < len(refcounts.table) and refcounts.table[index]):
            clusters = np.arange(first, first + per_block, dtype=np.uint64)
            yield clusters, wanted - refcounts.many(clusters).astype(np.int64)


class _Counter:
    """References by cluster. Memory: 8 bytes for each cluster up to the last that is referred to."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << 12, dtype=np.int64)
        self.nb_clusters = 0

    def add(self, clusters: NDArray[np.uint64], counts: NDArray[np.int64]) -> None:
        if not len(clusters):
            return
        last = int(clusters[-1])
        if last >= len(self._counts):
            self._counts = np.concatenate((self._counts, np.zeros(max(last + 1, len(self._counts)), dtype=np.int64)))
        self._counts[clusters.astype(np.int64)] += counts
        self.nb_clusters = max(self.nb_clusters, last + 1)

    def part(self, first: int, count: int) -> NDArray[np.int64]:
        part = self._counts[first : first + count]
        return part if len(part) == count else np.concatenate((part, np.zeros(count - len(part), dtype=np.int64)))


def _references(metadata: Metadata, snapshots: SnapshotTable) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """All references in the file, but for those to refcount structures that are yet to be made."""
    file, header, refcounts = metadata.file, metadata.header, metadata.refcounts
    bits = header.cluster_bits
    end = -(-file.current_size() >> bits)
    for offset, length in _stretches(metadata, snapshots):
        if length:
            clusters = np.arange(offset >> bits, (offset + length - 1 >> bits) + 1, dtype=np.uint64)
            yield _checked(clusters, np.ones(len(clusters), dtype=np.int64), end, file)
    blocks = sorted(offset >> bits for offset in refcounts.table if offset)
    unique, numbers = np.unique(np.array(blocks, dtype=np.uint64), return_counts=True)
    yield _checked(unique, numbers.astype(np.int64), end, file)
    l1_tables = [_l1_of(file, entry.l1_table_offset, entry.l1_size) for entry in snapshots.entries]
    for l1 in (list(metadata.tables.l1), *l1_tables):
        for clusters, counts in tree_references(file, header, l1):
            yield _checked(clusters, counts, end, file)


def _l1_of(file: ImageFile, offset: int, size: int) -> list[int]:
    try:
        return list(words(read_l1(file, offset, size).data))
    except ImageFormatError as error:
        error.filename = file.filename
        raise


def _stretches(metadata: Metadata, snapshots: SnapshotTable) -> Iterator[tuple[int, int]]:
    """Offset and length of everything that is in one piece, and referred to once."""
    file, header = metadata.file, metadata.header
    yield 0, header.cluster_size
    yield metadata.tables.l1_offset, 8 * len(metadata.tables.l1)
    yield metadata.refcounts.table_offset, 8 * len(metadata.refcounts.table)
    if snapshots.entries:
        last = snapshots.entries[-1]
        yield header.snapshots_offset, last.info.host_offset + len(last.raw) - header.snapshots_offset
    for entry in snapshots.entries:
        yield entry.l1_table_offset, 8 * entry.l1_size
    encryption = header.extension(HeaderExtensionType.FULL_DISK_ENCRYPTION)
    if encryption is not None:
        pointer = layout.FullDiskEncryptionExtension.parse(encryption.data)
        yield pointer.offset, pointer.length
    bitmaps = header.extension(HeaderExtensionType.BITMAPS)
    if bitmaps is not None and header.autoclear_features & layout.AutoclearFeature.BITMAPS:
        directory, known = layout.BitmapsExtension.parse(bitmaps.data), read_bitmap_directory(file, header)
        yield directory.bitmap_directory_offset, directory.bitmap_directory_size
        for info in known:
            table = read_bitmap_table(file, header, info)
            yield info.table_offset, 8 * info.table_size
            for word in table:
                if word & _BITS_OFFSET:
                    yield word & _BITS_OFFSET, header.cluster_size


def _checked(
    clusters: NDArray[np.uint64], counts: NDArray[np.int64], end: int, file: ImageFile
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """These, if all of them begin in the file, which has `end` clusters; the last need not be written to its end."""
    if len(clusters) and int(clusters[-1]) >= end:
        cluster = int(clusters[-1])
        what = f"cluster {cluster} is referred to, beyond the end of the file; try qemu-img check -r all"
        error = rules.L2_ENTRY_IN_FILE.broken(0, what)
        error.filename = file.filename
        raise error
    return clusters, counts
