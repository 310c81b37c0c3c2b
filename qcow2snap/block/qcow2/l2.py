"""Decoded L2 tables, kept by host offset within a budget of bytes, shared by all snapshots.

A table of 8,192 entries is decoded once, with numpy, into runs: neighbours of one kind whose host clusters follow each
other. Looking a guest offset up is then one bisection. Most tables are one run, so that is tested before anything
finer (1 TiB of preallocated metadata is 2,048 tables of one run each). Nothing is read here but tables, and nothing is
judged: an entry that cannot be right becomes a run of kind INVALID, which whoever reads it turns into an error.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from formats.qcow2 import SUBCLUSTERS_PER_CLUSTER, StandardL2Entry, SubclusterBitmap
from qcow2snap.block.file import FileNode
from qcow2snap.block.lru import BoundedCache
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader

_ZERO = np.uint64(StandardL2Entry.mask("zero"))
_OFFSET = np.uint64(StandardL2Entry.mask("offset"))
_COMPRESSED = np.uint64(StandardL2Entry.mask("compressed"))
_COPIED = np.uint64(StandardL2Entry.mask("copied"))
_SUBCLUSTERS_ALLOCATED = np.uint64(SubclusterBitmap.mask("allocated"))
_SUBCLUSTER_BITS = np.arange(SUBCLUSTERS_PER_CLUSTER, dtype=np.uint64)

# Clusters of an extended table that are cut into subclusters at a time: bounds the memory of decoding to some MiB.
_SLICE = 2048


class Kind(IntEnum):
    """What an L2 entry, or its part for one subcluster, says. QEMU's enum QCow2SubclusterType (block/qcow2.h)."""

    UNALLOCATED = 0
    UNALLOCATED_ALLOC = 1  # an unallocated subcluster of a cluster that has a host offset
    ZERO_PLAIN = 2
    ZERO_ALLOC = 3  # reads as zeros, and has a host offset
    NORMAL = 4
    COMPRESSED = 5
    INVALID = 6


# Kinds whose host offset counts: a run of them goes on only where the host offset does.
HAS_HOST = (1 << Kind.UNALLOCATED_ALLOC) | (1 << Kind.ZERO_ALLOC) | (1 << Kind.NORMAL)
# Kinds of which each entry is a run of its own.
_SINGLE = (1 << Kind.COMPRESSED) | (1 << Kind.INVALID)


class Run(NamedTuple):
    """Guest bytes `start` to `end`, counted from the start of what the table describes.

    host  host offset of the first byte, for kinds that have one; for COMPRESSED and INVALID the whole L2 entry
    """

    start: int
    end: int
    kind: int
    host: int


class TableInFile(Protocol):
    """An L2 table, decoded or not, that has its place in the file."""

    host_offset: int


class L2Table:
    """One decoded table. Immutable, so any thread may use it."""

    __slots__ = ("_hosts", "_kinds", "_starts", "_unit", "coverage", "host_offset", "nbytes")

    def __init__(
        self, host_offset: int, starts: array[int], kinds: bytes, hosts: array[int], unit: int, coverage: int
    ) -> None:
        self.host_offset = host_offset
        self._starts = starts  # in units of a subcluster
        self._kinds = kinds
        self._hosts = hosts
        self._unit = unit
        self.coverage = coverage
        self.nbytes = 200 + 13 * len(starts)

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """The runs that bytes `start` to `end` touch, the first and last cut to fit."""
        unit, starts, kinds, hosts = self._unit, self._starts, self._kinds, self._hosts
        count = len(starts)
        index = bisect_right(starts, start // unit) - 1
        while start < end:
            first = starts[index] * unit
            stop = starts[index + 1] * unit if index + 1 < count else self.coverage
            kind, host = kinds[index], hosts[index]
            if HAS_HOST >> kind & 1:
                host += start - first
            yield Run(start, min(stop, end), kind, host)
            start = stop
            index += 1


class L2Tables:
    """The L2 tables of one image file, decoded when first asked for.

    threads  any: two may decode one table at once, which costs time only
    errors   ImageFormatError for a table that the file does not hold
    """

    def __init__(self, file: FileNode, header: ImageHeader, cache_size: int) -> None:
        self._file = file
        self._header = header
        self._cache: BoundedCache[int, L2Table] = BoundedCache(cache_size)

    def at(self, host_offset: int) -> L2Table:
        table = self._cache.get(host_offset)
        if table is None:
            data = self._file.pread_available(host_offset, self._header.cluster_size)
            if len(data) < self._header.cluster_size:
                raise rules.L2_COMPLETE.broken(
                    host_offset, f"the L2 table at {host_offset:#x} reaches beyond the end of the file"
                )
            table = decode(data, host_offset, self._header)
            self._cache.put(host_offset, table, table.nbytes)
        return table

    def entry_offset(self, table: TableInFile, start: int) -> int:
        """Where in the file the entry is that describes byte `start` of what the table describes."""
        return table.host_offset + start // self._header.cluster_size * self._header.l2_entry_size


def decode(data: bytes, host_offset: int, header: ImageHeader) -> L2Table:
    """The runs of a table as it stands in the file."""
    words = np.frombuffer(data, dtype=">u8").astype(np.uint64)
    coverage = header.l2_coverage
    if not header.has_extended_l2:
        starts, kinds, hosts = _runs(*_standard_kinds(words, header), header.cluster_size)
        return L2Table(host_offset, starts, kinds, hosts, header.cluster_size, coverage)
    entries, bitmaps = words[::2], words[1::2]
    unit = header.subcluster_size
    parts = []
    for first in range(0, len(entries), _SLICE):
        kind, host = _subcluster_kinds(entries[first : first + _SLICE], bitmaps[first : first + _SLICE], unit, header)
        parts.append((first * SUBCLUSTERS_PER_CLUSTER, *_runs(kind, host, unit, SUBCLUSTERS_PER_CLUSTER)))
    starts, kinds, hosts = _join(parts, unit)
    return L2Table(host_offset, starts, kinds, hosts, unit, coverage)


def _standard_kinds(entries: NDArray[np.uint64], header: ImageHeader) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Kind and host value of every entry (QEMU qcow2_get_cluster_type and the checks of qcow2_get_host_offset)."""
    host = entries & _OFFSET
    allocated = host != 0
    if header.has_data_file:  # host offset 0 is a place there, told from "none" by the COPIED bit
        allocated |= (entries & _COPIED) != 0
    is_zero = (entries & _ZERO) != 0
    kind = np.where(allocated, np.uint8(Kind.NORMAL), np.uint8(Kind.UNALLOCATED))
    kind[is_zero & allocated] = Kind.ZERO_ALLOC
    kind[is_zero & ~allocated] = Kind.ZERO_PLAIN
    invalid = allocated & ((host & np.uint64(header.cluster_size - 1)) != 0)
    if header.version < 3:
        invalid |= is_zero
    _mark_whole_entries(kind, host, entries, invalid, header)
    return kind, host


def _mark_whole_entries(
    kind: NDArray[np.uint8],
    host: NDArray[np.uint64],
    entries: NDArray[np.uint64],
    invalid: NDArray[np.bool_],
    header: ImageHeader,
) -> None:
    """COMPRESSED and INVALID, which keep the entry as it is in place of a host offset."""
    compressed = (entries & _COMPRESSED) != 0
    kind[invalid] = Kind.INVALID
    kind[compressed] = Kind.INVALID if header.has_data_file else Kind.COMPRESSED
    whole = invalid | compressed
    host[whole] = entries[whole]


def _subcluster_kinds(
    entries: NDArray[np.uint64], bitmaps: NDArray[np.uint64], unit: int, header: ImageHeader
) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """As _standard_kinds, for every subcluster of these entries (QEMU qcow2_get_subcluster_type)."""
    host = entries & _OFFSET
    has_host = host != 0
    if header.has_data_file:
        has_host |= (entries & _COPIED) != 0
    allocated = (bitmaps & _SUBCLUSTERS_ALLOCATED) != 0
    contradiction = (bitmaps >> np.uint64(32)) & bitmaps & _SUBCLUSTERS_ALLOCATED
    invalid = (contradiction != 0) | (allocated & ~has_host)
    invalid |= has_host & ((host & np.uint64(header.cluster_size - 1)) != 0)
    whole_kind = np.zeros(len(entries), dtype=np.uint8)
    whole_host = np.zeros(len(entries), dtype=np.uint64)
    _mark_whole_entries(whole_kind, whole_host, entries, invalid, header)
    # From here on two-dimensional: a row for each cluster, a column for each subcluster.
    is_allocated = (bitmaps[:, None] >> _SUBCLUSTER_BITS) & np.uint64(1) != 0
    is_zero = (bitmaps[:, None] >> (_SUBCLUSTER_BITS + np.uint64(32))) & np.uint64(1) != 0
    hosted = np.broadcast_to(has_host[:, None], is_allocated.shape)
    kind = np.where(hosted, np.uint8(Kind.UNALLOCATED_ALLOC), np.uint8(Kind.UNALLOCATED))
    kind[is_allocated] = Kind.NORMAL
    kind[is_zero & hosted] = Kind.ZERO_ALLOC
    kind[is_zero & ~hosted] = Kind.ZERO_PLAIN
    place = host[:, None] + _SUBCLUSTER_BITS * np.uint64(unit)
    whole = whole_kind != 0
    kind[whole] = whole_kind[whole, None]
    place[whole] = whole_host[whole, None]
    return kind.reshape(-1), place.reshape(-1)


def _runs(
    kind: NDArray[np.uint8], host: NDArray[np.uint64], unit: int, units_per_entry: int = 1
) -> tuple[array[int], bytes, array[int]]:
    """Where runs start, their kinds, and the host value of each run's first unit."""
    first = int(kind[0])
    follows = host[1:] - host[:-1] == np.uint64(unit)
    if not _SINGLE >> first & 1 and (kind == first).all() and (not HAS_HOST >> first & 1 or follows.all()):
        return array("I", [0]), bytes([first]), array("Q", [int(host[0])])
    has_host = (HAS_HOST >> kind.astype(np.uint32)) & 1 != 0
    single = (_SINGLE >> kind.astype(np.uint32)) & 1 != 0
    breaks = kind[1:] != kind[:-1]
    breaks |= has_host[1:] & ~follows
    breaks |= single[1:] & (np.arange(1, len(kind)) % units_per_entry == 0)
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1)).astype(np.uint32)
    return (
        array("I", starts.tobytes()),
        kind[starts].tobytes(),
        array("Q", host[starts].tobytes()),
    )


def _join(parts: list[tuple[int, array[int], bytes, array[int]]], unit: int) -> tuple[array[int], bytes, array[int]]:
    """Runs of slices as runs of the whole; a run that goes on in the next slice is one."""
    starts, kinds, hosts = array("I"), bytearray(), array("Q")
    for first, part_starts, part_kinds, part_hosts in parts:
        skip = 0
        if starts:
            same = kinds[-1] == part_kinds[0] and not _SINGLE >> kinds[-1] & 1
            follows = hosts[-1] + (first - starts[-1]) * unit == part_hosts[0]
            skip = int(same and (follows or not HAS_HOST >> kinds[-1] & 1))
        starts.extend(start + first for start in part_starts[skip:])
        kinds += part_kinds[skip:]
        hosts.extend(part_hosts[skip:])
    return starts, bytes(kinds), hosts
