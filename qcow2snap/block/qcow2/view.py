"""One state of the disk through its L1 table: the active disk, a snapshot, or a VM state. Reads and maps; owns nothing.

This is the reading half of QEMU's qcow2-cluster.c and qcow2_co_preadv/qcow2_co_block_status (block/qcow2.c), with the
L1 table, the size and the start given instead of taken from the active disk.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from formats.qcow2 import L1TableEntry, StandardL2Entry
from qcow2snap.block.buffers import Cursor
from qcow2snap.block.file import FileNode
from qcow2snap.block.node import (
    BlockNode,
    Buffer,
    Extent,
    ImageFormatError,
    Qcow2SnapError,
    Status,
    UnsupportedFeature,
    merged,
)
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.compressed import CompressedClusters
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.in_use import Watch
from qcow2snap.block.qcow2.l2 import HAS_HOST, Kind, L2Table, L2Tables, TableInFile
from qcow2snap.block.qcow2.refcount import has_preallocated_metadata

_L1_OFFSET = L1TableEntry.mask("offset")

_CONFIRMED_AT_ONCE = 256  # extents: who wants one waits for no more than these

# Operations on flags cost a microsecond each: these are made once.
_ALLOCATED_DATA = Status.DATA | Status.ALLOCATED
_ALLOCATED_HOLE = Status.DATA | Status.ALLOCATED | Status.ZERO
_ALLOCATED_ZERO = Status.ZERO | Status.ALLOCATED
_COMPRESSED = Status.DATA | Status.ALLOCATED | Status.COMPRESSED


# So are these, as plain integers: members of an enumeration are looked up and compared at ten times the cost.
_ZERO_PLAIN, _ZERO_ALLOC = int(Kind.ZERO_PLAIN), int(Kind.ZERO_ALLOC)
_NORMAL, _COMPRESSED_KIND, _INVALID = int(Kind.NORMAL), int(Kind.COMPRESSED), int(Kind.INVALID)


class L1Table:
    """An L1 table in memory: host offsets of L2 tables, 0 where there is none. Immutable."""

    def __init__(self, host_offset: int, data: bytes) -> None:
        self.host_offset = host_offset
        offsets = np.frombuffer(data, dtype=">u8").astype(np.uint64) & np.uint64(_L1_OFFSET)
        # As arrays: indexing and bisecting them gives Python's integers, numpy's cost ten times as much one by one.
        self.offsets = array("Q", offsets.tobytes())
        self.populated = array("I", np.flatnonzero(offsets).astype(np.uint32).tobytes())
        self.nbytes = 200 + 8 * len(self.offsets) + 4 * len(self.populated)

    def next_populated(self, index: int) -> int:
        """The first index from `index` on that has an L2 table, or the table's length."""
        position = bisect_left(self.populated, index)
        return self.populated[position] if position < len(self.populated) else len(self.offsets)


class Mapping(NamedTuple):
    """A run of one view, with the table that describes it.

    `host` as in l2.Run; `table` is None where the L1 table has no entry.
    """

    offset: int
    length: int
    kind: int
    host: int
    table: TableInFile | None
    in_table: int  # bytes from the start of what the table describes

    @property
    def has_host(self) -> bool:
        """`host` is an offset, which goes on with the run."""
        return bool(HAS_HOST >> self.kind & 1)

    def skip(self, count: int) -> Mapping:
        """The rest of a run that has a host offset, from its byte `count` on."""
        return self._replace(
            offset=self.offset + count,
            length=self.length - count,
            host=self.host + count,
            in_table=self.in_table + count,
        )


@dataclass(frozen=True, eq=False)
class Image:
    """What all views of one image share."""

    header: ImageHeader
    file: FileNode
    data_file: FileNode  # the same as `file`, unless the image has an external one
    tables: L2Tables
    compressed: CompressedClusters
    backing: BlockNode | None
    is_encrypted: bool

    @cached_property
    def has_preallocated_metadata(self) -> bool:
        """Then holes of the data file are worth finding: see refcount.has_preallocated_metadata."""
        return has_preallocated_metadata(self.file, self.header)


class View(BlockNode):
    """A state of the disk: the bytes that `l1` maps from `start` on.

    size     bytes; the state's own
    threads  any
    errors   OutOfRange; ImageFormatError, UnsupportedFeature (encrypted), FileError when read
             and of a snapshot with a `watch`, SnapshotGone: what was wrong otherwise may then have been a race
    owns     nothing
    """

    _keeps_last_part = True  # of a compressed cluster; what it maps does not change

    def __init__(
        self, image: Image, l1: L1Table, *, start: int, size: int, has_backing: bool, watch: Watch | None = None
    ) -> None:
        self._image = image
        # Kept here, as each read asks for them, and the header takes a microsecond to tell.
        self._cluster_size = image.header.cluster_size
        self._coverage = image.header.l2_coverage
        self._has_data_file = image.header.has_data_file
        self._l1 = l1
        self._start = start
        self.size = size
        self._backing = image.backing if has_backing else None
        self._watch = watch  # of a snapshot in an image that others may write
        self.must_confirm = watch is not None
        # The compressed cluster that was last read in part: where it starts and ends, and what it holds. It can be the
        # next one too: for a read of 4 KiB in sequence, to find that out took longer than all else (6 µs in all, 2 so).
        self._last_part: tuple[int, int, memoryview] = 0, 0, memoryview(b"")

    # -- mapping ------------------------------------------------------------------------------------------------------

    def mappings(self, offset: int, length: int) -> Iterator[Mapping]:
        """What the L1 and L2 tables say of a range, run by run. Absent L2 tables are skipped by the whole."""
        coverage = self._coverage
        offsets = self._l1.offsets
        end = offset + length
        while offset < end:
            index, in_table = divmod(self._start + offset, coverage)
            if index >= len(offsets):
                error = rules.SNAPSHOT_L1_SIZE.broken(
                    self._l1.host_offset,
                    f"the L1 table at {self._l1.host_offset:#x} has {len(offsets)} entries, too few for guest offset "
                    f"{offset:#x}",
                )
                raise self._located(error, offset, self.size - offset)
            if not offsets[index]:
                stop = min(end, self._l1.next_populated(index) * coverage - self._start)
                yield Mapping(offset, stop - offset, Kind.UNALLOCATED, 0, None, in_table)
                offset = stop
                continue
            base = index * coverage - self._start
            try:
                table = self._table(index)
            except ImageFormatError as error:
                raise self._located(error, offset, min(base + coverage, self.size) - offset) from None
            for start, stop, kind, host in table.runs(in_table, min(coverage, end - base)):
                yield Mapping(base + start, stop - start, kind, host, table, start)
            offset = base + coverage

    def _table(self, index: int) -> L2Table:
        host_offset = self._l1.offsets[index]
        if host_offset % self._cluster_size:
            raise rules.L1_ENTRY_ALIGNED.broken(
                self._l1.host_offset + 8 * index, f"an L1 entry points to {host_offset:#x}, not a cluster boundary"
            )
        return self._image.tables.at(host_offset)

    # -- BlockNode ----------------------------------------------------------------------------------------------------

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        self.check_range(offset, length)
        extents = merged(self._extents(offset, length, want_zero))
        return extents if self._watch is None else self._confirmed(extents)

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.preadv_unconfirmed(offset, buffers)
        self.confirm()

    def preadv_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        """Out of the compressed cluster that was last read in part. What lies in files is found by its extents."""
        start, end, cluster = self._last_part
        cursor = Cursor(buffers)
        stop = offset + cursor.remaining
        if not start <= offset <= stop <= min(end, self.size):
            return False
        cursor.copy(cluster[offset - start : stop - start])
        return True

    def preadv_unconfirmed(self, offset: int, buffers: Sequence[Buffer]) -> None:
        try:
            self._preadv(offset, buffers)
        except Qcow2SnapError:
            self.confirm()
            raise

    def confirm(self) -> None:
        if self._watch is not None:
            self._watch.confirm()

    def _confirmed(self, extents: Iterator[Extent]) -> Iterator[Extent]:
        """These extents, none given out before the snapshot was found again."""
        batch: list[Extent] = []
        try:
            for extent in extents:
                batch.append(extent)
                if len(batch) == _CONFIRMED_AT_ONCE:
                    self.confirm()
                    yield from batch
                    batch = []
        except Qcow2SnapError:
            self.confirm()
            yield from batch
            raise
        self.confirm()
        yield from batch

    def _preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.preadv_nowait(offset, buffers):
            return
        cursor = Cursor(buffers)
        self.check_range(offset, cursor.remaining)
        if self._image.is_encrypted:
            raise UnsupportedFeature(f"{self._image.file.filename}: is encrypted; its data cannot be read yet")
        compressed: list[Mapping] = []  # whole clusters, one behind the other
        cluster_size = self._cluster_size
        for mapping in self.mappings(offset, cursor.remaining):
            kind = mapping.kind
            if kind == _COMPRESSED_KIND and mapping.length == cluster_size:
                compressed.append(mapping)
                continue
            if compressed:
                self._read_compressed(compressed, cursor)
                compressed = []
            if kind == _NORMAL:
                host = self._checked_host(mapping)
                self._image.data_file.preadv_available(host, cursor.take(mapping.length))
            elif kind in (_ZERO_PLAIN, _ZERO_ALLOC):
                cursor.zero(mapping.length)
            elif kind == _COMPRESSED_KIND:
                self._read_part_of_compressed(mapping, cursor)
            elif kind == _INVALID:
                raise self._invalid(mapping)
            else:
                self._read_below(mapping.offset, cursor, mapping.length)
        if compressed:
            self._read_compressed(compressed, cursor)

    def prefetch(self, offset: int, length: int) -> None:
        image = self._image
        try:
            for mapping in self.mappings(offset, length):
                kind = mapping.kind
                if kind == _COMPRESSED_KIND:
                    image.file.prefetch(*image.compressed.host_range(mapping.host))
                elif kind == _NORMAL:
                    image.data_file.prefetch(mapping.host, mapping.length)
                elif kind not in (_ZERO_PLAIN, _ZERO_ALLOC, _INVALID) and self._backing is not None:
                    below = self._length_in_backing(mapping.offset, mapping.length)
                    if below:
                        self._backing.prefetch(mapping.offset, below)
        except Qcow2SnapError:
            pass  # whoever reads it will hear of it

    def _read_compressed(self, mappings: Sequence[Mapping], cursor: Cursor) -> None:
        """Whole clusters, decompressed straight into the buffers. Only one that lies across two takes a copy."""
        places = [cursor.take(mapping.length) for mapping in mappings]
        buffers = [views[0] if len(views) == 1 else memoryview(bytearray(self._cluster_size)) for views in places]
        reading = self._image.compressed.read([mapping.host for mapping in mappings], buffers)
        for mapping, views, buffer in zip(mappings, places, buffers, strict=True):
            try:
                next(reading)
            except ImageFormatError as error:
                raise self._located(error, mapping.offset, mapping.length) from None
            if len(views) > 1:
                Cursor(views).copy(buffer)

    def _read_part_of_compressed(self, mapping: Mapping, cursor: Cursor) -> None:
        in_cluster = mapping.in_table % self._cluster_size
        try:
            cluster = self._image.compressed.cluster(mapping.host)
        except ImageFormatError as error:
            raise self._located(error, mapping.offset, mapping.length) from None
        cursor.copy(cluster[in_cluster : in_cluster + mapping.length])
        if self._watch is None and self._keeps_last_part:
            start = mapping.offset - in_cluster
            self._last_part = start, start + len(cluster), cluster

    # -- one run ------------------------------------------------------------------------------------------------------

    def _extents(self, offset: int, length: int, want_zero: bool) -> Iterator[Extent]:
        is_hidden = self._image.is_encrypted or self._image.data_file.drops_cache
        data_file = None if is_hidden else self._image.data_file
        find_holes = want_zero and self._image.has_preallocated_metadata
        for mapping in self.mappings(offset, length):
            kind = mapping.kind
            if kind == _NORMAL:
                host = self._checked_host(mapping)
                if find_holes and data_file is not None:
                    yield from self._with_holes(mapping.offset, mapping.length, host)
                else:
                    yield Extent(mapping.offset, mapping.length, _ALLOCATED_DATA, 0, data_file, host)
            elif kind == _ZERO_ALLOC:
                yield Extent(mapping.offset, mapping.length, _ALLOCATED_ZERO, 0, data_file, mapping.host)
            elif kind == _ZERO_PLAIN:
                yield Extent(mapping.offset, mapping.length, _ALLOCATED_ZERO)
            elif kind == _COMPRESSED_KIND:
                yield Extent(mapping.offset, mapping.length, _COMPRESSED)
            elif kind == _INVALID:
                raise self._invalid(mapping)
            else:
                yield from self._extents_below(mapping, want_zero, data_file)

    def _with_holes(self, offset: int, length: int, host: int) -> Iterator[Extent]:
        """Allocated clusters, those parts zero as well that are holes of the file (QEMU: BDRV_BLOCK_RECURSE)."""
        file, end = self._image.data_file, offset + length
        while offset < end:
            is_hole, stop = file.hole_or_data(host)
            count = min(end - offset, stop - host)
            yield Extent(offset, count, _ALLOCATED_HOLE if is_hole else _ALLOCATED_DATA, 0, file, host)
            offset += count
            host += count

    def _extents_below(self, mapping: Mapping, want_zero: bool, data_file: FileNode | None) -> Iterator[Extent]:
        """What an unallocated run reads as: the backing file as far as it reaches, then zeros."""
        from_backing = self._length_in_backing(mapping.offset, mapping.length)
        if from_backing and self._backing is not None:
            for extent in self._backing.block_status(mapping.offset, from_backing, want_zero=want_zero):
                yield extent._replace(depth=extent.depth + 1)
        if from_backing < mapping.length:
            offset, length = mapping.offset + from_backing, mapping.length - from_backing
            if mapping.kind == Kind.UNALLOCATED_ALLOC:
                yield Extent(offset, length, Status.ZERO, 0, data_file, mapping.host + from_backing)
            else:
                yield Extent(offset, length, Status.ZERO)

    def _read_below(self, offset: int, cursor: Cursor, length: int) -> None:
        from_backing = self._length_in_backing(offset, length)
        if from_backing and self._backing is not None:
            self._backing.preadv(offset, cursor.take(from_backing))
        cursor.zero(length - from_backing)

    def _length_in_backing(self, offset: int, length: int) -> int:
        return 0 if self._backing is None else max(0, min(length, self._backing.size - offset))

    def _checked_host(self, mapping: Mapping) -> int:
        """The host offset of a NORMAL run, every cluster of which must be in the file, if only its first byte.

        A file may end within its last cluster, and QEMU reads zeros from there on. Whole clusters are missing only
        from a file that was cut: QEMU reads zeros there too, we do not guess.
        """
        image, host = self._image, mapping.host
        if self._has_data_file and host != mapping.offset + self._start:
            raise self._broken(mapping, rules.DATA_FILE_OFFSET, f"host offset {host:#x} of the external data file")
        end = host + mapping.length
        if end > image.data_file.size:
            size = image.data_file.current_size()
            missing = max(host, -(-size // self._cluster_size) * self._cluster_size)
            if missing < end:
                cut = mapping.skip(missing - host)
                what = f"host offset {missing:#x}, beyond the end of the file at {size:#x}: it has been cut"
                raise self._broken(cut, rules.L2_ENTRY_IN_FILE, what)
        return host

    def _invalid(self, mapping: Mapping) -> ImageFormatError:
        """Why an L2 entry is INVALID: the rule it breaks."""
        header, entry = self._image.header, mapping.host
        offset = entry & _L1_OFFSET
        if StandardL2Entry.mask("compressed") & entry:
            return self._broken(mapping, rules.DATA_FILE_COMPRESSED, "a compressed cluster, with an external data file")
        if offset % header.cluster_size:
            return self._broken(mapping, rules.L2_ENTRY_ALIGNED, f"{offset:#x}, not a cluster boundary")
        if header.has_extended_l2:
            return self._broken(mapping, rules.L2_SUBCLUSTERS, "subclusters in contradictory states")
        return self._broken(mapping, rules.L2_ZERO_V3, "a zero cluster, in a version 2 image")

    def _broken(self, mapping: Mapping, rule: rules.Rule, what: str) -> ImageFormatError:
        """The error of the L2 entry that describes the start of a run."""
        assert mapping.table is not None  # only runs of a table have an entry
        where = self._image.tables.entry_offset(mapping.table, mapping.in_table)
        message = f"L2 entry at byte {where:#x} maps guest offset {mapping.offset:#x} to {what}"
        return self._located(rule.broken(where, message), mapping.offset, mapping.length)

    def _located(self, error: ImageFormatError, offset: int, length: int) -> ImageFormatError:
        """The error, saying which file it is in and which guest bytes it makes unreadable."""
        error.filename = self._image.file.filename
        error.guest_range = (offset, length)
        return error
