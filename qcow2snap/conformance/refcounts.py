"""The refcounts as the image has them: the rules for the refcount table, and the counts of a window of clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from formats import qcow2 as layout
from formats.qcow2 import RefcountTableEntry
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.refcount_bits import unpacked
from qcow2snap.conformance.findings import Finding
from qcow2snap.conformance.l2_batches import distinct
from qcow2snap.conformance.references import words
from qcow2snap.conformance.subject import Region, Subject

_OFFSET = np.uint64(RefcountTableEntry.mask("offset"))
_RESERVED = np.uint64(RefcountTableEntry.mask("reserved"))

Counts = NDArray[np.unsignedinteger[Any]]


class RefcountStructures:
    """The refcount table of an image, judged when built.

    blocks    host clusters of the refcount blocks that count as references, in the order of the table
    maximum   what a refcount of this width can count
    threads   any; nothing changes after construction
    errors    FileError
    """

    def __init__(self, subject: Subject) -> None:
        header = subject.header
        self._file = subject.file
        self._order = header.refcount_order
        self._cluster_size = header.cluster_size
        self._per_block = header.cluster_size * 8 >> self._order
        self.maximum = (1 << (1 << self._order)) - 1
        self._entries = self._read(subject)
        self._offsets = (self._entries & _OFFSET).astype(np.uint64)
        self._is_unaligned = self._offsets & np.uint64(header.cluster_size - 1) != 0
        # Where there can be no block at all, nobody can tell the refcounts. Past the end of the file, they are zero.
        self._is_unreadable = self._is_unaligned | (self._offsets >= np.uint64(1 << 63))
        self.blocks = self._judge(subject)

    def _read(self, subject: Subject) -> NDArray[np.uint64]:
        header, findings = subject.header, subject.findings
        offset, size = header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size
        if offset % header.cluster_size or offset + size >= 1 << 63:
            what = f"the refcount table is at {offset:#x}, not a cluster boundary"
            findings.add(Finding(rules.REFCOUNT_TABLE_OFFSET, 48, what, stops=True))
        if size > layout.MAX_REFCOUNT_TABLE_SIZE:
            what = f"the refcount table has {size} bytes, more than 8 MiB"
            findings.add(Finding(rules.REFCOUNT_TABLE_SIZE, 56, what, stops=True))
            size = layout.MAX_REFCOUNT_TABLE_SIZE
        if not size:
            what = "the refcount table has no cluster: nothing has a refcount"
            findings.add(Finding(rules.REFCOUNT_TABLE_EMPTY, 56, what))
        subject.takes(Region(offset, size, "the refcount table"), rules.REFCOUNT_TABLE_COMPLETE)
        return words(subject.file.pread_available(offset, size))

    def _judge(self, subject: Subject) -> NDArray[np.int64]:
        findings, start = subject.findings, subject.header.refcount_table_offset
        is_reserved = self._entries & _RESERVED != 0
        unaligned = self._is_unaligned & ~is_reserved
        clusters = self._offsets >> np.uint64(subject.header.cluster_bits)
        outside = (clusters >= np.uint64(subject.nb_clusters)) & ~is_reserved & ~unaligned
        for which, rule, why in (
            (is_reserved, rules.REFCOUNT_TABLE_RESERVED, "reserved bits are set in it"),
            (unaligned, rules.REFCOUNT_BLOCK_ALIGNED, "not a cluster boundary"),
            (outside, rules.REFCOUNT_BLOCK_IN_FILE, "beyond the end of the file"),
        ):
            indexes = np.flatnonzero(which).tolist()

            def make(number: int, indexes: list[int] = indexes, rule: rules.Rule = rule, why: str = why) -> Finding:
                index = indexes[number]
                what = f"entry {index} of the refcount table is {int(self._entries[index]):#x}: {why}"
                return Finding(rule, start + 8 * index, what)

            findings.add_each(rule, 1, len(indexes), make)
        counted = (self._offsets != 0) & ~is_reserved & ~unaligned & ~outside
        blocks: NDArray[np.int64] = clusters[counted].astype(np.int64)
        return blocks

    def judge_readable(self, subject: Subject) -> None:
        """Clusters whose refcount nobody can tell, as the table leads to no block: QEMU cannot check these."""
        for index in np.flatnonzero(self._is_unreadable).tolist():
            first = index * self._per_block
            number = min(self._per_block, subject.nb_clusters - first)
            if number > 0:
                what = f"the refcounts of {number} clusters from {first} on cannot be read"
                where = subject.header.refcount_table_offset + 8 * index
                finding = Finding(rules.REFCOUNT_BLOCK_ALIGNED, where, what, times=number, stops=True)
                subject.findings.add(finding)

    def window(self, start: int, stop: int) -> tuple[Counts, NDArray[np.bool_] | None]:
        """The refcounts of clusters `start` to `stop`; and which of them can be read, None for all.

        Those of 64 bits that exceed 32 are told as the largest of 32.
        """
        counts: Counts = np.zeros(stop - start, np.uint16 if self._order <= 4 else np.uint32)
        readable: NDArray[np.bool_] | None = None
        first_block = start // self._per_block
        for index in range(first_block, min(len(self._offsets), -(-stop // self._per_block))):
            offset, base = int(self._offsets[index]), index * self._per_block
            low, high = max(start, base), min(stop, base + self._per_block)
            if self._is_unreadable[index]:
                readable = np.ones(stop - start, np.bool_) if readable is None else readable
                readable[low - start : high - start] = False
            elif offset:
                block = self._decoded(offset, low - base, high - base)
                counts[low - start : low - start + len(block)] = block
        return counts, readable

    def refcounts_at(self, clusters: NDArray[np.int64]) -> NDArray[np.int64]:
        """The refcounts of any clusters, as `window` tells them; -1 where it cannot be read."""
        result = np.zeros(len(clusters), np.int64)
        blocks, within = np.divmod(clusters, self._per_block)
        for index in distinct(blocks[blocks < len(self._offsets)]).tolist():
            where = blocks == index
            if self._is_unreadable[index]:
                result[where] = -1
            elif self._offsets[index]:
                block = np.zeros(self._per_block, np.int64)
                decoded = self._decoded(int(self._offsets[index]), 0, self._per_block)
                block[: len(decoded)] = decoded
                result[where] = block[within[where]]
        return result

    def exact(self, cluster: int) -> int:
        """The refcount of one cluster, whatever its size; 0 where there is none, or it cannot be read."""
        index, within = divmod(cluster, self._per_block)
        if index >= len(self._offsets) or not self._offsets[index] or self._is_unreadable[index]:
            return 0
        block = self._decoded(int(self._offsets[index]), within, within + 1, exact=True)
        return int(block[0]) if len(block) else 0

    def _decoded(self, offset: int, first: int, stop: int, *, exact: bool = False) -> Counts:
        """Refcounts `first` to `stop` of a block; fewer where the file ends."""
        width = 1 << self._order
        start, end = first * width // 8, -(-stop * width // 8)
        data = self._file.pread_available(offset + start, end - start)
        skipped = first - start * 8 // width
        counts = unpacked(data, self._order)[skipped : skipped + stop - first]
        if self._order == 6 and not exact:
            counts = np.minimum(counts, np.uint64(0xFFFFFFFF))
        return counts
