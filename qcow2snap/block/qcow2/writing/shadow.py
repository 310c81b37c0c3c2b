"""Another state of an image's metadata, made beside the one that it has, and made its own by one write to the header.

Size, L1 table, refcount table and snapshot table of an image are named in the first sector of its header. So whatever
changes them all can be had at once: L2 tables and refcount blocks that are to change are written anew into free
clusters, with L1 table, refcount table and snapshot table that lead to them; a flush; that sector; a flush. A crash
leaves the old state or the new, and either is whole: refcounts, COPIED flags, and no leak, as the old refcounts do not
know the new clusters, nor the new ones the old. (QEMU changes refcounts and flags in place, where a crash between them
is a corruption to `qemu-img check`.) In place the same bytes would be written, since all tables of the disk change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formats import qcow2 as layout
from qcow2snap.block.node import NoSpace, NotSupported, Qcow2SnapError
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.refcount_bits import packed
from qcow2snap.block.qcow2.words import big_endian
from qcow2snap.block.qcow2.writing.header_state import SIZE_OFFSET
from qcow2snap.block.qcow2.writing.metadata import Metadata

_AHEAD = 64  # free clusters that are looked up at once

Clusters = NDArray[np.uint64]
Addends = NDArray[np.int64]
Counts = NDArray[Any]  # of 32 or 64 bits


class Shadow:
    """One such state in the making. Nothing has happened until switch().

    threads  one, in the order's still(): the file has what is in memory, and nobody changes either
    errors   NoSpace, FileError, NotSupported (a refcount too large); ImageFormatError where one is too low
    memory   4 bytes for each cluster that refcount blocks describe which are looked at, 8 for wide refcounts
    """

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._file = metadata.file
        self._refcounts = metadata.refcounts
        self._header = metadata.header
        self._bits = metadata.header.cluster_bits
        self._cluster_size = metadata.header.cluster_size
        self._per_block = metadata.refcounts.per_block
        self._dtype = np.int32 if metadata.header.refcount_order < 5 else np.int64
        self._table = metadata.refcounts.table[:]  # host offsets of refcount blocks
        self._blocks: dict[int, Counts] = {}  # those that were looked at
        self._changed: set[int] = set()
        self._released: dict[int, NDArray[np.bool_]] = {}  # clusters that were in use before, by block
        self._next = metadata.refcounts.first_free  # no cluster before it is free
        self._places: list[int] = []  # free ones of the block that `_next` is in, the first last

    # -- refcounts ----------------------------------------------------------------------------------------------------

    def add(self, clusters: Clusters, addends: Addends) -> None:
        """Change the refcounts of clusters, in ascending order. One that becomes free is not used in the new state."""
        for index, chosen in self._refcounts.by_block(clusters):
            part, counts = clusters[chosen], addends[chosen]
            block = self._block(index)
            places = self._refcounts.places(part, index)
            changed = block[places] + counts
            if (changed > self._refcounts.max).any():
                raise NotSupported(
                    f"a refcount of {self._refcounts.max + 1} does not fit into {1 << self._header.refcount_order} "
                    "bits: so many snapshots cannot share a cluster; delete one"
                )
            if (changed < 0).any():
                host = int(part[np.flatnonzero(changed < 0)[0]]) << self._bits
                raise NotSupported(
                    f"{self._file.filename}: the cluster at {host:#x} has more references than its refcount says: the "
                    "image is damaged; repair it with qemu-img check -r all"
                )
            block[places] = changed
            self._changed.add(index)
            freed = places[(changed == 0) & (counts < 0)]
            if len(freed):
                self._released.setdefault(index, np.zeros(self._per_block, dtype=np.bool_))[freed] = True

    def refcounts_of(self, clusters: Clusters) -> NDArray[np.int64]:
        """Of clusters in any order."""
        result = np.zeros(len(clusters), dtype=np.int64)
        if not len(clusters):
            return result
        only = int(clusters.min()) // self._per_block
        if only == int(clusters.max()) // self._per_block:
            result[:] = self._block(only)[self._refcounts.places(clusters, only)]
            return result
        indices = (clusters // np.uint64(self._per_block)).astype(np.int64)
        places = (clusters % np.uint64(self._per_block)).astype(np.int64)
        # np.unique would import numpy.ma, which takes longer than all of a snapshot.
        ordered = np.sort(indices)
        for index in ordered[np.append(True, ordered[1:] != ordered[:-1])].tolist():
            chosen = indices == index
            result[chosen] = self._block(index)[places[chosen]]
        return result

    def _block(self, index: int) -> Counts:
        block = self._blocks.get(index)
        if block is None:
            block = self._blocks[index] = self._refcounts.of_block(index).astype(self._dtype)
        return block

    # -- what is new --------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> int:
        """Bytes into new clusters; gives their host offset. Without any, 0."""
        if not data:
            return 0
        count = -(-len(data) // self._cluster_size)
        host = self._allocate(count) << self._bits
        self._file.pwritev(host, [memoryview(data.ljust(count << self._bits, b"\0"))])
        return host

    def free(self, offset: int, length: int) -> None:
        """Clusters that hold something in one piece, to which nothing refers in the new state."""
        if length:
            first, last = offset >> self._bits, offset + length - 1 >> self._bits
            clusters = np.arange(first, last + 1, dtype=np.uint64)
            self.add(clusters, np.full(len(clusters), -1, dtype=np.int64))

    def _allocate(self, count: int) -> int:
        first = self._find(count)
        if first + count > self._refcounts.limit:
            raise NoSpace(f"{self._file.filename}: no {count} free clusters are left")
        found = self._metadata.sections.overlap(first << self._bits, count << self._bits)
        if found is not None:
            what = f"a cluster at {first << self._bits:#x} with refcount 0 holds a part of the {found.value}"
            raise rules.METADATA_OVERLAP.broken(first << self._bits, what)
        self.add(np.arange(first, first + count, dtype=np.uint64), np.ones(count, dtype=np.int64))
        return first

    def _find(self, count: int) -> int:
        """The first of so many clusters in a row that are free in both states."""
        if count == 1:
            return self._find_one()
        index, place = divmod(self._next, self._per_block)
        before = 0  # free clusters at the end of the last block
        while True:
            base = index * self._per_block + place
            edges = np.flatnonzero(np.diff(self._free(index)[place:], prepend=False, append=False))
            starts, ends = edges[::2], edges[1::2]
            if before and len(starts) and starts[0] == 0:
                starts[0] = -before
            long = np.flatnonzero(ends - starts >= count)
            if len(long):
                return base + int(starts[long[0]])
            is_open = len(ends) > 0 and int(ends[-1]) == self._per_block - place
            before = int(ends[-1] - starts[-1]) if is_open else 0
            index, place = index + 1, 0

    def _find_one(self) -> int:
        index, place = divmod(self._next, self._per_block)
        while True:
            block = self._block(index)
            while self._places:
                place = self._places.pop()
                if not block[place]:
                    self._next = index * self._per_block + place
                    return self._next
            self._places = (np.flatnonzero(self._free(index)[place:])[:_AHEAD] + place).tolist()[::-1]
            if not self._places:
                index, place = index + 1, 0
                self._next = index * self._per_block

    def _free(self, index: int) -> NDArray[np.bool_]:
        """The clusters of a block that nothing uses, nor did."""
        free: NDArray[np.bool_] = self._block(index) == 0
        released = self._released.get(index)
        return free if released is None else free & ~released

    # -- the switch ---------------------------------------------------------------------------------------------------

    def switch(self, header: ImageHeader, broken: Callable[[Qcow2SnapError], None]) -> ImageHeader:
        """Make it so: `header` says where all but the refcounts are. Gives the header that the file has now.

        `broken` is called where the sector may or may not have been written: nobody knows the image's state then.
        """
        table_offset = self._write_refcounts()
        size = 8 * len(self._table)
        header = header._replace(refcount_table_offset=table_offset, refcount_table_clusters=size >> self._bits)
        self._file.flush()
        try:
            self._file.pwritev(SIZE_OFFSET, [memoryview(_fields(header))])
            self._file.flush()
        except Qcow2SnapError as error:
            broken(error)
            raise
        return header

    def _write_refcounts(self) -> int:
        """The blocks that have changed, and a table that leads to them."""
        self.free(self._refcounts.table_offset, 8 * len(self._table))
        placed: dict[int, int] = {}
        table_at: int | None = None
        while table_at is None or self._changed - set(placed):
            for index in sorted(self._changed - set(placed)):
                if index < len(self._table) and self._table[index]:
                    self.free(self._table[index], self._cluster_size)
                placed[index] = self._allocate(1)
            needed = max(len(self._table), max(placed) + 1)
            if table_at is not None and needed > len(self._table):
                self.free(table_at << self._bits, 8 * len(self._table))
                table_at = None
            if table_at is None:
                clusters = -(-8 * needed // self._cluster_size)
                if clusters << self._bits > layout.MAX_REFCOUNT_TABLE_SIZE:
                    raise NoSpace(f"{self._file.filename}: a refcount table of more than 8 MiB would be needed")
                self._table.extend([0] * ((clusters << self._bits) // 8 - len(self._table)))
                table_at = self._allocate(clusters)
        for index, cluster in placed.items():
            self._table[index] = cluster << self._bits
            data = packed(self._blocks[index], self._header.refcount_order)
            self._file.pwritev(cluster << self._bits, [memoryview(data)])
        self._file.pwritev(table_at << self._bits, [memoryview(big_endian(self._table))])
        return table_at << self._bits

    def punch(self) -> None:
        """Give back to the file system what was in use before, and is not now. After the switch."""
        for index, released in self._released.items():
            gone = released & (self._blocks[index] == 0)
            edges = np.flatnonzero(np.diff(gone, prepend=False, append=False)) + index * self._per_block
            for first, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                offset, stop = first << self._bits, min(end << self._bits, self._file.size)
                if offset < stop:
                    self._file.pdiscard(offset, stop - offset)


def _fields(header: ImageHeader) -> bytes:
    """Bytes 24 to 71 of the header."""
    return b"".join(
        value.to_bytes(size, "big")
        for value, size in (
            (header.size, 8),
            (int(header.crypt_method), 4),
            (header.l1_size, 4),
            (header.l1_table_offset, 8),
            (header.refcount_table_offset, 8),
            (header.refcount_table_clusters, 4),
            (header.nb_snapshots, 4),
            (header.snapshots_offset, 8),
        )
    )
