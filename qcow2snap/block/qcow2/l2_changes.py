"""Two L2 tables side by side: which entries differ, and what one and the other say. Reads nothing, and judges nothing.

Made without numpy, whose import takes as long as comparing fifty pairs of tables: most comparisons have fewer. Entries
are compared as integers at the speed of a list comprehension, 0.5 ms for 8,192 of them, and only those that differ are
looked at one by one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

from formats.qcow2 import SUBCLUSTERS_PER_CLUSTER, StandardL2Entry, SubclusterBitmap
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.words import words

_ZERO = StandardL2Entry.mask("zero")
_OFFSET = StandardL2Entry.mask("offset")
_COMPRESSED = StandardL2Entry.mask("compressed")
_COPIED = StandardL2Entry.mask("copied")
_SUBCLUSTERS_ALLOCATED = SubclusterBitmap.mask("allocated")
_ALL_BITS = (1 << 64) - 1
_ALL_SUBCLUSTERS = (1 << SUBCLUSTERS_PER_CLUSTER) - 1


class Cell(IntEnum):
    """What one table says of a cluster or subcluster, as far as its content goes."""

    UNALLOCATED = 0  # what the backing file shows, or zeros
    ZERO = 1
    DATA = 2
    INVALID = 3  # an entry that cannot be right


_UNALLOCATED, _IS_ZERO, _DATA, _INVALID = (int(cell) for cell in Cell)  # members cost ten times as much
_CELLS = len(Cell)


class Run(NamedTuple):
    """Bytes `start` to `end`, counted from the start of what the tables describe, that differ in one way."""

    start: int
    end: int
    was: int  # a Cell
    now: int


class TableChanges:
    """Where two tables differ. Immutable, so any thread may use it."""

    __slots__ = ("_codes", "_starts", "_stops", "_unit", "nbytes")

    def __init__(self, starts: array[int], stops: array[int], codes: bytes, unit: int) -> None:
        self._starts = starts  # in units of a subcluster
        self._stops = stops
        self._codes = codes  # the cell that was, times _CELLS, plus the one that is
        self._unit = unit
        self.nbytes = 300 + 9 * len(starts)

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """Those that bytes `start` to `end` touch, the first and last cut to fit."""
        unit = self._unit
        for index in range(bisect_right(self._stops, start // unit), len(self._starts)):
            first = self._starts[index] * unit
            if first >= end:
                break
            was, now = divmod(self._codes[index], _CELLS)
            yield Run(max(first, start), min(self._stops[index] * unit, end), was, now)


def compare(since: bytes, state: bytes, header: ImageHeader) -> TableChanges:
    """The differences between two tables as they stand in the file."""
    unit = header.subcluster_size
    if since == state:
        return TableChanges(array("I"), array("I"), b"", unit)
    old, new = words(since), words(state)
    return _joined(_extended(old, new, header) if header.has_extended_l2 else _standard(old, new, header), unit)


_Differences = Iterable[tuple[int, int, int]]  # first unit, the one after the last, and both cells in one number


def _joined(differences: _Differences, unit: int) -> TableChanges:
    """Neighbours that differ in one way as one run."""
    starts, stops, codes = array("I"), array("I"), bytearray()
    for first, stop, code in differences:
        if codes and codes[-1] == code and stops[-1] == first:
            stops[-1] = stop
        else:
            starts.append(first)
            stops.append(stop)
            codes.append(code)
    return TableChanges(starts, stops, bytes(codes), unit)


def _significant(header: ImageHeader) -> int:
    """The bits that say what is read. In a data file, where offset 0 is a place, COPIED tells it from "none"."""
    return _ALL_BITS if header.has_data_file else _ALL_BITS & ~_COPIED


def _standard(since: array[int], state: array[int], header: ImageHeader) -> _Differences:
    significant, cell_of = _significant(header), _cells(header)
    # Most entries are a host offset or nothing. Where both are, and differ, no more has to be asked.
    host = _OFFSET & -header.cluster_size
    unusual = _ALL_BITS if header.has_data_file else _ALL_BITS & ~_COPIED & ~host
    known: dict[int, tuple[int, int]] = {}  # what is left are zeros and nothing, over and over, or compressed clusters
    differing = [i for i, (old, new) in enumerate(zip(since, state, strict=True)) if (old ^ new) & significant]
    for index in differing:
        old, new = since[index], state[index]
        if not (old | new) & unusual:
            yield index, index + 1, (_DATA * _CELLS if old & host else 0) + (_DATA if new & host else 0)
            continue
        was, old_place = known.get(old) or known.setdefault(old, cell_of(old))
        now, new_place = known.get(new) or known.setdefault(new, cell_of(new))
        if was != now or old_place != new_place:
            yield index, index + 1, was * _CELLS + now


def _cells(header: ImageHeader) -> Callable[[int], tuple[int, int]]:
    """What an entry says: its cell, and the place of the data, which is the same only where the bytes are."""
    has_data_file, in_cluster, may_be_zero = header.has_data_file, header.cluster_size - 1, header.version >= 3

    def cell_of(entry: int) -> tuple[int, int]:
        if entry & _COMPRESSED:
            return (_INVALID if has_data_file else _DATA), entry & ~_COPIED
        host = entry & _OFFSET
        is_allocated = host or (has_data_file and entry & _COPIED)
        if (is_allocated and host & in_cluster) or (entry & _ZERO and not may_be_zero):
            return _INVALID, entry & ~_COPIED
        if entry & _ZERO:
            return _IS_ZERO, 0
        return (_DATA, host) if is_allocated else (_UNALLOCATED, 0)

    return cell_of


def _extended(since: array[int], state: array[int], header: ImageHeader) -> _Differences:
    significant, subcells_of = _significant(header), _subcells(header)
    pairs = zip(since[::2], since[1::2], state[::2], state[1::2], strict=True)
    for index, (old, old_bitmap, new, new_bitmap) in enumerate(pairs):
        if not ((old ^ new) & significant or old_bitmap != new_bitmap):
            continue
        was, old_place = subcells_of(old, old_bitmap)
        now, new_place = subcells_of(new, new_bitmap)
        codes = bytearray(SUBCLUSTERS_PER_CLUSTER)
        for cell, old_cells in enumerate(was):
            for other, new_cells in enumerate(now):
                both = old_cells & new_cells
                if both and (cell != other or (cell >= _DATA and old_place != new_place)):
                    for subcluster in range(SUBCLUSTERS_PER_CLUSTER):
                        if both >> subcluster & 1:
                            codes[subcluster] = cell * _CELLS + other
        for subcluster, code in enumerate(codes, index * SUBCLUSTERS_PER_CLUSTER):
            if code:  # 0 is unallocated in both
                yield subcluster, subcluster + 1, code


def _subcells(header: ImageHeader) -> Callable[[int, int], tuple[tuple[int, int, int, int], int]]:
    """What an extended entry says: for each Cell the subclusters that are it, as bits, and the place of the data."""
    has_data_file, in_cluster = header.has_data_file, header.cluster_size - 1

    def subcells_of(entry: int, bitmap: int) -> tuple[tuple[int, int, int, int], int]:
        if entry & _COMPRESSED:
            is_valid = not has_data_file
            return (0, 0, is_valid * _ALL_SUBCLUSTERS, (not is_valid) * _ALL_SUBCLUSTERS), entry & ~_COPIED
        allocated, zero = bitmap & _SUBCLUSTERS_ALLOCATED, bitmap >> SUBCLUSTERS_PER_CLUSTER
        host = entry & _OFFSET
        has_host = host or (has_data_file and entry & _COPIED)
        if allocated & zero or (allocated and not has_host) or host & in_cluster:
            return (0, 0, 0, _ALL_SUBCLUSTERS), entry & ~_COPIED
        return (_ALL_SUBCLUSTERS & ~allocated & ~zero, zero, allocated, 0), host

    return subcells_of
