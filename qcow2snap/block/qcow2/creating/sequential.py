"""A new image written once from its first guest byte to its last: the tables of it. Data is written by the caller.

Clusters are handed out from the start of the file on; an L2 table or refcount block is written as soon as nothing more
can come into it, so that memory does not grow with the image. The refcount table and the L1 table come at the end, the
header last of all: a file whose writer was killed is no image. An empty image is laid out as `qemu-img create` does.
"""

from __future__ import annotations

import os
from array import array

import numpy as np
from numpy.typing import NDArray

from formats import qcow2 as layout
from formats.qcow2 import L1TableEntry, StandardL2Entry, compressed_l2_entry
from qcow2snap.block.qcow2.creating.create_options import CreateOptions, InvalidOption
from qcow2snap.block.qcow2.creating.new_header import Tables, first_cluster
from qcow2snap.block.qcow2.refcount_bits import packed

_L1_COPIED = L1TableEntry.mask("copied")
_COPIED = StandardL2Entry.mask("copied")
_COMPRESSED = StandardL2Entry.mask("compressed")
_ALL_SUBCLUSTERS = layout.SubclusterBitmap.mask("allocated")
_MAX_REFCOUNT = (1 << 16) - 1  # that is counted here, also where the image has wider ones


class SequentialWriter:
    """Allocates, in the order of the guest's bytes, and writes all tables to `fd`.

    in_place  `fd` is no empty file: an image that is in it is none from here on
    threads   one
    errors    OSError; InvalidOption for what turns out not to fit
    owns      nothing: `fd` stays open
    """

    def __init__(self, fd: int, options: CreateOptions, *, in_place: bool = False) -> None:
        first_cluster(options, Tables(0, 0, 0))  # what does not fit is told before anything is written
        self._fd = fd
        self._options = options
        self.cluster_size = options.cluster_size
        self._end = 0  # of what is allocated, in clusters
        self._tail = 0  # where the last compressed cluster ends, bytes; 0: the next one begins a cluster
        self._refcounts_per_block = options.cluster_size * 8 >> options.refcount_order
        self._most = min(_MAX_REFCOUNT, (1 << options.refcount_bits) - 1)
        self._refcount_blocks: list[int] = []  # their host offsets
        self._refcounts = array("H")  # of the clusters whose block is not written yet
        self._l1 = np.zeros(options.l1_size, dtype=">u8")
        self._index = -1  # of the L2 table that is being filled
        self._l2 = np.zeros((options.l2_entries, 2 if options.extended_l2 else 1), dtype=">u8")
        entry = compressed_l2_entry(options.cluster_bits)
        self._sectors_shift = entry.ranges["additional_sectors"].first
        self._offset_limit = entry.mask("offset")
        self._take(1)  # the header's
        if in_place:
            self._write(0, bytes(self.cluster_size))
            os.fdatasync(fd)

    def allocate(self, offset: int, length: int, *, holds_data: bool = True) -> int:
        """Clusters for guest bytes from `offset` on, both multiples of the cluster size; returns their host offset.

        With an external data file that is where the guest's bytes are in it. Without `holds_data` they are zeros in the
        file; with extended L2 entries no subcluster of them is allocated then. Memory goes with the length.
        """
        first, count = offset // self.cluster_size, length // self.cluster_size
        host = offset if self._options.data_file is not None else self._take(count)
        bitmap = _ALL_SUBCLUSTERS if holds_data or self._options.data_file_raw else 0
        done = 0
        while done < count:
            index, start = divmod(first + done, self._options.l2_entries)
            stop = min(self._options.l2_entries, start + count - done)
            table = self._table(index)
            begin = host + done * self.cluster_size
            hosts = np.arange(begin, begin + (stop - start) * self.cluster_size, self.cluster_size, dtype=np.uint64)
            table[start:stop, 0] = hosts | np.uint64(_COPIED)
            table[start:stop, 1:] = bitmap
            done += stop - start
        return host

    def allocate_compressed(self, offset: int, size: int) -> int:
        """Room for the compressed data, `size` bytes, of the guest cluster at `offset`; returns its host offset."""
        cluster_size = self.cluster_size
        room = -self._tail % cluster_size
        cluster = self._tail // cluster_size
        counted = cluster - self._first_counted
        if not room or counted < 0 or self._refcounts[counted] == self._most:
            host = self._take(1)
        elif size <= room:
            host = self._tail
            self._refcounts[counted] += 1
        elif cluster == self._end - 1:  # the next cluster follows: the data may go over into it
            host = self._tail
            self._refcounts[counted] += 1
            self._take(1)
        else:
            host = self._take(1)
        self._tail = host + size
        sectors = (host + size - 1) // layout.SECTOR_SIZE - host // layout.SECTOR_SIZE
        if host > self._offset_limit:
            raise InvalidOption("the image has become too large for compressed clusters; try a smaller cluster_size")
        index, position = divmod(offset // cluster_size, self._options.l2_entries)
        self._table(index)[position, 0] = _COMPRESSED | sectors << self._sectors_shift | host
        return host

    def finish(self, *, flush: bool = False) -> None:
        """Write what is left, the header last, and with `flush` after all else is durable. The writer is used up."""
        self._finish_table()
        cluster_size, per_block = self.cluster_size, self._refcounts_per_block
        l1_clusters = -(-self._l1.nbytes // cluster_size)
        blocks, table_clusters = len(self._refcount_blocks), 0
        while True:  # until what counts the clusters counts itself as well
            new_blocks = blocks - len(self._refcount_blocks)
            enough = -(-(self._end + table_clusters + new_blocks + l1_clusters) // per_block)
            needed = -(-enough * 8 // cluster_size)
            if (enough, needed) == (blocks, table_clusters):
                break
            blocks, table_clusters = enough, needed
        if table_clusters * cluster_size > layout.MAX_REFCOUNT_TABLE_SIZE:
            raise InvalidOption("the refcount table would be larger than 8 MiB; try a larger cluster_size")
        new_blocks = blocks - len(self._refcount_blocks)
        first_counted = self._first_counted
        tables = Tables(
            refcount_table_offset=self._extend(table_clusters),
            refcount_table_clusters=table_clusters,
            l1_table_offset=(self._end + new_blocks) * cluster_size if l1_clusters else 0,
        )
        first_block = self._extend(new_blocks)
        self._extend(l1_clusters)
        refcounts = np.zeros(blocks * per_block - first_counted, dtype=np.uint16)
        refcounts[: len(self._refcounts)] = self._refcounts
        self._write(first_block, packed(refcounts, self._options.refcount_order))
        table = np.zeros(table_clusters * cluster_size // 8, dtype=">u8")
        table[: len(self._refcount_blocks)] = self._refcount_blocks
        table[len(self._refcount_blocks) : blocks] = np.arange(new_blocks) * cluster_size + first_block
        self._write(tables.refcount_table_offset, table.tobytes())
        self._write(tables.l1_table_offset, self._l1.tobytes())
        header = first_cluster(self._options, tables)
        if flush:
            os.fdatasync(self._fd)
        self._write(0, header)

    # -- clusters -----------------------------------------------------------------------------------------------------

    @property
    def _first_counted(self) -> int:
        """The first cluster whose refcount is still here."""
        return len(self._refcount_blocks) * self._refcounts_per_block

    def _take(self, count: int) -> int:
        """So many clusters at the end of the file, in a row; returns their host offset."""
        host = self._extend(count)
        while len(self._refcounts) > self._refcounts_per_block:
            block = self._refcounts[: self._refcounts_per_block]
            del self._refcounts[: self._refcounts_per_block]
            self._refcount_blocks.append(self._end * self.cluster_size)
            self._extend(1)
            self._write(
                self._refcount_blocks[-1], packed(np.frombuffer(block, np.uint16), self._options.refcount_order)
            )
        return host

    def _extend(self, count: int) -> int:
        host = self._end * self.cluster_size
        self._end += count
        self._refcounts.extend(array("H", [1]) * count)
        return host

    # -- L2 tables ----------------------------------------------------------------------------------------------------

    def _table(self, index: int) -> NDArray[np.uint64]:
        """The L2 table of an L1 index, to be filled; the one before it is complete."""
        if index != self._index:
            assert index > self._index, "guest offsets go up"
            self._finish_table()
            self._index = index
        return self._l2

    def _finish_table(self) -> None:
        if self._index >= 0:
            host = self._take(1)
            self._l1[self._index] = host | _L1_COPIED
            self._write(host, self._l2.tobytes())
            self._l2[:] = 0

    def _write(self, host: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view, host)
            view, host = view[count:], host + count
