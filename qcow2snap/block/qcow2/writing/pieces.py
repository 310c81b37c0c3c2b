"""How a guest's write is cut into pieces that are done in one way each, and what is filled in around the data.

A piece is a run of clusters of one L2 table whose host clusters follow each other. It is written in place, which
changes no table; or it is linked when it has been written: then its clusters are new, or had their place already but
read as something else (zeros, or a backing file). Looks at entries; changes nothing, and does no I/O.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from formats.qcow2 import SUBCLUSTERS_PER_CLUSTER
from qcow2snap.block.qcow2.l2 import Kind
from qcow2snap.block.qcow2.writing.entries import (
    ALLOCATED_BITS,
    COMPRESSED,
    COPIED,
    OFFSET,
    ZERO,
    EntryFormat,
    is_contradictory,
    subclusters,
    with_allocated,
    zero_bits,
)

_MAX_PIECE = 16 << 20  # bytes: what others may have to wait for


class Piece(NamedTuple):
    """Guest bytes `offset` to `end`, which lie in `nb_clusters` clusters from entry `slot` of a table on.

    host  of the first cluster's start; 0 where clusters have to be allocated
    """

    offset: int
    end: int
    l1_index: int
    slot: int
    nb_clusters: int
    in_place: bool
    allocate: bool
    host: int
    fill_start: int  # guest bytes from here to `offset` have to be written as well, as they are read now
    fill_end: int  # and those from `end` to here
    in_hole: bool = False  # `host` was never written: it is a hole of the file, or behind its end


class Cutter:
    """Cuts writes for images of one format."""

    def __init__(self, entry_format: EntryFormat, subcluster_size: int) -> None:
        self._format = entry_format
        self._cluster_size = entry_format.cluster_size
        self._subcluster_size = subcluster_size
        self._words = entry_format.words
        # What an entry must have, and what not, to be written where it is.
        self._placed = COPIED | COMPRESSED | OFFSET & entry_format.cluster_size - 1
        if not entry_format.has_subclusters:  # where there are, the bitmap says what is zero
            self._placed |= ZERO
        self._coverage = entry_format.cluster_size // (8 * entry_format.words) * entry_format.cluster_size

    def in_place(self, entries: array[int], offset: int, end: int) -> int:
        """The host offset of a range of one table that can be overwritten where it is, or -1.

        `offset` and `end` are counted from the start of what the table describes.
        """
        cluster_size = self._cluster_size
        slot = offset // cluster_size
        if self._format.has_subclusters:
            return self._in_place_subclusters(entries, offset, end)
        entry = entries[slot]
        if entry & self._placed != COPIED:
            return -1
        for other in range(slot + 1, (end - 1) // cluster_size + 1):
            entry += cluster_size
            if entries[other] != entry:
                return -1
        return (entries[slot] & OFFSET) + offset % cluster_size

    def _in_place_subclusters(self, entries: array[int], offset: int, end: int) -> int:
        cluster_size = self._cluster_size
        first = offset // cluster_size
        expected = entries[2 * first]
        if expected & self._placed != COPIED:
            return -1
        for slot in range(first, (end - 1) // cluster_size + 1):
            entry, bitmap = entries[2 * slot : 2 * slot + 2]
            touched = self._touched(offset - slot * cluster_size, end - slot * cluster_size)
            if entry != expected or bitmap & touched != touched or is_contradictory(bitmap):
                return -1
            expected += cluster_size
        return (entries[2 * first] & OFFSET) + offset % cluster_size

    def cut(self, entries: array[int] | None, offset: int, end: int, index: int, *, is_shared: bool) -> Piece:
        """The first piece of a write. `is_shared`: the table is a snapshot's, too, so nothing in it is ours alone."""
        cluster_size = self._cluster_size
        base = index * self._coverage
        end = min(end, base + self._coverage, offset + _MAX_PIECE)
        slot = (offset - base) // cluster_size
        last = (end - 1 - base) // cluster_size
        way = self._way(entries, slot, base, offset, end, is_shared)
        count = 1
        while slot + count <= last and self._way(entries, slot + count, base, offset, end, is_shared) == (
            way[0],
            way[1],
            way[2] + count * cluster_size if way[2] else 0,
        ):
            count += 1
        end = min(end, base + (slot + count) * cluster_size)
        in_place, allocate, host = way
        fill_start, fill_end = offset, end
        if not in_place:
            fill_start = self._fill_start(entries, slot, base, offset, end, allocate)
            fill_end = self._fill_end(entries, slot + count - 1, base, offset, end, allocate)
        return Piece(offset, end, index, slot, count, in_place, allocate, host, fill_start, fill_end)

    def _way(
        self, entries: array[int] | None, slot: int, base: int, offset: int, end: int, is_shared: bool
    ) -> tuple[bool, bool, int]:
        """Of a cluster: whether it can be written in place, whether it has to be allocated, and its host offset."""
        if entries is None or is_shared:
            return False, True, 0
        entry = entries[slot * self._words]
        if entry & (COPIED | COMPRESSED) != COPIED or not self._format.has_host(entry):
            return False, True, 0
        if self._format.has_subclusters:
            start = base + slot * self._cluster_size
            touched = self._touched(offset - start, end - start)
            in_place = entries[slot * 2 + 1] & touched == touched
        else:
            in_place = not entry & ZERO
        return in_place, False, entry & OFFSET

    def _touched(self, start: int, end: int) -> int:
        """The bits of the subclusters that a range touches, counted from the cluster's start, which it may exceed."""
        first = max(0, start) // self._subcluster_size
        last = -(-min(end, self._cluster_size) // self._subcluster_size)
        return subclusters(first, last)

    def _fill_start(
        self, entries: array[int] | None, slot: int, base: int, offset: int, end: int, allocate: bool
    ) -> int:
        start = base + slot * self._cluster_size
        if not self._format.has_subclusters:
            return start
        kept, touched = self._allocated(entries, slot), self._touched(offset - start, end - start)
        first = _lowest(touched)
        if offset > start + first * self._subcluster_size and kept >> first & 1 and not allocate:
            return offset  # the rest of that subcluster is there
        if allocate:
            first = min(first, _lowest(kept))
        return min(offset, start + first * self._subcluster_size)

    def _fill_end(self, entries: array[int] | None, slot: int, base: int, offset: int, end: int, allocate: bool) -> int:
        start = base + slot * self._cluster_size
        if not self._format.has_subclusters:
            return start + self._cluster_size
        kept, touched = self._allocated(entries, slot), self._touched(offset - start, end - start)
        last = touched.bit_length()
        if end < start + last * self._subcluster_size and kept >> last - 1 & 1 and not allocate:
            return end
        if allocate:
            last = max(last, kept.bit_length())
        return max(end, start + last * self._subcluster_size)

    def _allocated(self, entries: array[int] | None, slot: int) -> int:
        """The subclusters of a cluster that have data already, which must stay."""
        if entries is None:
            return 0
        if entries[2 * slot] & COMPRESSED:
            return ALLOCATED_BITS
        return entries[2 * slot + 1] & ALLOCATED_BITS

    def linked(self, entries: array[int], piece: Piece, host: int) -> array[int]:
        """The entries of a piece's clusters when it has been written to `host`."""
        cluster_size = self._cluster_size
        first = host | COPIED
        if not self._format.has_subclusters:
            return array("Q", range(first, first + piece.nb_clusters * cluster_size, cluster_size))
        words = array("Q")
        base = piece.l1_index * self._coverage
        for number in range(piece.nb_clusters):
            slot = piece.slot + number
            start = base + slot * cluster_size
            touched = self._touched(piece.offset - start, piece.end - start)
            old = entries[2 * slot + 1]
            bitmap = ALLOCATED_BITS if entries[2 * slot] & COMPRESSED else with_allocated(old, touched)
            words.extend((first + number * cluster_size, bitmap))
        return words

    def reads_as_zeros(self, entries: array[int] | None, slot: int, start: int, end: int) -> bool | None:
        """Whether a range within a cluster reads as zeros; None: the backing file knows."""
        if entries is None:
            return None
        entry = entries[slot * self._words]
        if not self._format.has_subclusters:
            kind = self._format.kind(entry)
            return None if kind is Kind.UNALLOCATED else kind in (Kind.ZERO_ALLOC, Kind.ZERO_PLAIN)
        if entry & COMPRESSED:
            return False
        bitmap = entries[2 * slot + 1]
        bits = self._touched(start, end)
        if bitmap & bits:
            return False
        return True if zero_bits(bitmap) & bits == bits else None


def _lowest(bits: int) -> int:
    """The number of the lowest bit, or SUBCLUSTERS_PER_CLUSTER if there is none."""
    return (bits & -bits).bit_length() - 1 if bits else SUBCLUSTERS_PER_CLUSTER
