"""L2 entries one at a time, as the machine's integers: what kind they are, and how they are made.

`l2` decodes whole tables at once with numpy; this is for the entry or two that a small write looks at. The masks are
those of the declared layouts. No I/O.
"""

from __future__ import annotations

from formats.qcow2 import L1TableEntry, StandardL2Entry, SubclusterBitmap
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.l2 import Kind

ZERO = StandardL2Entry.mask("zero")
OFFSET = StandardL2Entry.mask("offset")
COMPRESSED = StandardL2Entry.mask("compressed")
COPIED = StandardL2Entry.mask("copied")
L1_OFFSET = L1TableEntry.mask("offset")

ALLOCATED_BITS = SubclusterBitmap.mask("allocated")
ALL_ZEROES = SubclusterBitmap.mask("zero")  # the bitmap of a cluster all of which reads as zeros
_ZERO_SHIFT = SubclusterBitmap.ranges["zero"].first


class EntryFormat:
    """How the L2 entries of an image are read: with or without subclusters, with or without an external data file."""

    def __init__(self, header: ImageHeader) -> None:
        self.words = header.l2_entry_size // 8  # 64-bit words of an entry
        self.has_subclusters = header.has_extended_l2
        self.has_data_file = header.has_data_file
        self.version = header.version
        self.cluster_size = header.cluster_size

    def has_host(self, entry: int) -> bool:
        """Whether a standard entry has a host offset, which in an external data file may be 0."""
        return bool(entry & OFFSET or (self.has_data_file and entry & COPIED))

    def kind(self, entry: int) -> Kind:
        """Of a whole cluster, without subclusters (QEMU qcow2_get_cluster_type)."""
        if entry & COMPRESSED:
            return Kind.INVALID if self.has_data_file else Kind.COMPRESSED
        hosted = self.has_host(entry)
        if hosted and entry & OFFSET & self.cluster_size - 1:
            return Kind.INVALID
        if entry & ZERO and not self.has_subclusters:
            if self.version < 3:
                return Kind.INVALID
            return Kind.ZERO_ALLOC if hosted else Kind.ZERO_PLAIN
        return Kind.NORMAL if hosted else Kind.UNALLOCATED

    def is_valid(self, entry: int, bitmap: int = 0) -> bool:
        """Whether a cluster's entry is one that a reader takes; `bitmap`: its subclusters, where there are any."""
        if self.has_subclusters:
            return self.subcluster_kind(entry, bitmap, 0) is not Kind.INVALID
        return self.kind(entry) is not Kind.INVALID

    def subcluster_kind(self, entry: int, bitmap: int, index: int) -> Kind:
        """Of one subcluster (QEMU qcow2_get_subcluster_type)."""
        whole = self.kind(entry)
        if whole in (Kind.COMPRESSED, Kind.INVALID):
            return whole
        hosted = whole is Kind.NORMAL
        if is_contradictory(bitmap) or (bitmap & ALLOCATED_BITS and not hosted):
            return Kind.INVALID
        if bitmap >> index & 1:
            return Kind.NORMAL
        if bitmap >> _ZERO_SHIFT + index & 1:
            return Kind.ZERO_ALLOC if hosted else Kind.ZERO_PLAIN
        return Kind.UNALLOCATED_ALLOC if hosted else Kind.UNALLOCATED


def is_contradictory(bitmap: int) -> bool:
    """Whether it says of a subcluster that it is allocated, and that it is zero."""
    return bool(bitmap >> _ZERO_SHIFT & bitmap)


def subclusters(first: int, last: int) -> int:
    """The allocated-bits of subclusters `first` to `last`, the latter not included."""
    return (1 << last) - (1 << first)


def with_allocated(bitmap: int, bits: int) -> int:
    """These subclusters allocated, and therefore not zero."""
    return (bitmap | bits) & ~(bits << _ZERO_SHIFT)


def with_zero(bitmap: int, bits: int) -> int:
    """These subclusters zero, and therefore not allocated."""
    return (bitmap & ~bits) | bits << _ZERO_SHIFT


def zero_bits(bitmap: int) -> int:
    """Which subclusters read as zeros, as allocated-bits."""
    return bitmap >> _ZERO_SHIFT
