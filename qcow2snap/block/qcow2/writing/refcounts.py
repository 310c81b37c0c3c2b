"""Refcounts in memory: the refcount table, its blocks as they are needed, and how both grow. Finds free clusters.

Here a cluster is its number in the file. What is changed goes to the disk by `order`; increments at once, decrements
only through WriteOrder.release.
"""

from __future__ import annotations

import logging
from array import array
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formats import qcow2 as layout
from formats.qcow2 import RefcountTableEntry
from qcow2snap.block.node import NoSpace, NotSupported
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.words import big_endian, words
from qcow2snap.block.qcow2.writing.image_file import ImageFile
from qcow2snap.block.qcow2.writing.order import Batch, Stage, WriteOrder
from qcow2snap.block.qcow2.writing.overlap import Section, Sections
from qcow2snap.block.qcow2.writing.refcount_block import RefcountBlock, max_refcount

logger = logging.getLogger(__name__)

CACHE_SIZE = 32 << 20  # bytes of blocks that are as in the file: 2 TiB of an image with clusters of 64 KiB
_OFFSET = RefcountTableEntry.mask("offset")
_RESERVED = RefcountTableEntry.mask("reserved")
_TABLE_POINTER = 48  # in the header: refcount_table_offset, 8 bytes, and refcount_table_clusters, 4
_SECTOR = layout.SECTOR_SIZE
_MAX_GAPS = 256  # free clusters, too few in a row, that are passed over before the end of the file is looked at


class Refcounts:
    """The refcount of every cluster of the file.

    threads  one at a time, with the order's lock held
    errors   ImageFormatError where table or blocks cannot be right; NoSpace; NotSupported where a refcount would be
             more than its width can hold; FileError
    """

    def __init__(self, file: ImageFile, header: ImageHeader, sections: Sections, order: WriteOrder) -> None:
        self._file = file
        self._sections = sections
        self._order = order
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._refcount_order = header.refcount_order
        self.max = max_refcount(header.refcount_order)
        self.per_block = header.cluster_size * 8 >> header.refcount_order
        # Clusters that there can be: no L2 entry can say where a further one is.
        last = layout.StandardL2Entry.mask("offset") >> header.cluster_bits
        self.limit = file.size >> header.cluster_bits if file.is_block_device else last + 1
        self.table_offset = header.refcount_table_offset
        self.table = self._read_table(header)  # host offsets of blocks
        self._table_moved = False
        self._table_dirty = len(self.table), 0  # entries
        self._blocks: dict[int, RefcountBlock] = {}
        self._dirty: set[int] = set()  # of _blocks
        self._on_the_way: set[int] = set()  # of _blocks, taken by the last batch: the file may not have them yet
        # Clusters from here on were never written: a hole of the file, or behind its end.
        self.untouched = self.limit if file.is_block_device else -(-file.size >> header.cluster_bits)
        self._free = 1  # no free cluster is before this one
        self._add_sections()

    def _read_table(self, header: ImageHeader) -> array[int]:
        offset, size = header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits
        if offset % header.cluster_size or not offset:
            raise rules.REFCOUNT_TABLE_OFFSET.broken(
                48, f"the refcount table is at {offset:#x}, not a cluster boundary"
            )
        if not 0 < size <= layout.MAX_REFCOUNT_TABLE_SIZE:
            raise rules.REFCOUNT_TABLE_SIZE.broken(
                56, f"a refcount table of {size} bytes is empty or larger than 8 MiB"
            )
        data = self._file.pread_available(offset, size)
        if len(data) < size:
            raise rules.REFCOUNT_TABLE_COMPLETE.broken(offset, "the refcount table reaches beyond the end of the file")
        table = words(data)
        entries = np.frombuffer(table, dtype=np.uint64)
        wrong = np.flatnonzero(entries & np.uint64(header.cluster_size - 1 | _RESERVED))
        if len(wrong):
            index = int(wrong[0])
            what = f"entry {index} of the refcount table, {table[index]:#x}, is no cluster boundary"
            raise rules.REFCOUNT_BLOCK_ALIGNED.broken(offset + 8 * index, what)
        return table

    @property
    def first_free(self) -> int:
        """No cluster before this one is free."""
        return self._free

    def reload(self, header: ImageHeader) -> None:
        """Read all anew, when another refcount table has become the image's. Nothing may wait for a commit."""
        self._sections.remove(self.table_offset, 8 * len(self.table))
        for offset in self.table:
            if offset:
                self._sections.remove(offset, self._cluster_size)
        self.table_offset = header.refcount_table_offset
        self.table = self._read_table(header)
        self._table_moved, self._table_dirty = False, (len(self.table), 0)
        self._blocks.clear()
        self._dirty.clear()
        self._on_the_way.clear()
        self._free = 1
        if not self._file.is_block_device:
            self.untouched = max(self.untouched, -(-self._file.size >> self._cluster_bits))
        self._add_sections()

    def _add_sections(self) -> None:
        self._sections.add(Section.REFCOUNT_TABLE, self.table_offset, 8 * len(self.table))
        blocks = (each >> self._cluster_bits for each in self.table if each)
        self._sections.add_clusters(Section.REFCOUNT_BLOCK, blocks)

    # -- one refcount -------------------------------------------------------------------------------------------------

    def get(self, cluster: int) -> int:
        index, place = divmod(cluster, self.per_block)
        block = self._block(index)
        return 0 if block is None else block.counts[place]

    def many(self, clusters: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The refcounts of clusters in ascending order."""
        result = np.zeros(len(clusters), dtype=np.uint64)
        for index, part in self.by_block(clusters):
            block = self._block(index)
            if block is not None:
                result[part] = block.view[self.places(clusters[part], index)]
        return result

    def of_block(self, index: int) -> NDArray[Any]:
        """All refcounts of a block, as wide as they are in memory. Not to be changed."""
        block = self._block(index)
        return np.zeros(self.per_block, dtype=np.uint8) if block is None else block.view

    def add(self, first: int, count: int, addend: int) -> None:
        """Change the refcounts of `count` clusters from `first` on."""
        while count:
            index, place = divmod(first, self.per_block)
            length = min(count, self.per_block - place)
            block = self._block(index) or self._make_block(index)
            if length == 1 and 0 <= block.counts[place] + addend <= self.max:
                block.counts[place] += addend
            else:
                self._add(block, slice(place, place + length), addend)
            block.touch(place, place + length)
            self._dirty.add(index)
            if addend < 0 and first < self._free:
                self._free = first
            first += length
            count -= length

    def add_many(self, clusters: NDArray[np.uint64], addends: NDArray[np.int64]) -> None:
        """Change the refcounts of clusters, in ascending order, each by its own addend.

        NotSupported, before anything is changed, if one would be too large.
        """
        if not len(clusters):
            return
        if (addends > 0).any():
            self._check_room(clusters, addends)
        for index, part in self.by_block(clusters):
            block = self._block(index) or self._make_block(index)
            places = self.places(clusters[part], index)
            self._add(block, places, addends[part])
            block.touch(int(places[0]), int(places[-1]) + 1)
            self._dirty.add(index)
        falling = clusters[addends < 0]
        if len(falling):
            self._free = min(self._free, int(falling[0]))

    def last_references(self, clusters: NDArray[np.uint64], addends: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Those clusters to which nothing refers any more once add_many has done this."""
        return clusters[self.many(clusters).astype(np.int64) + addends <= 0]

    def _add(self, block: RefcountBlock, places: slice | NDArray[np.int64], addend: int | NDArray[np.int64]) -> None:
        new = block.view[places].astype(np.int64) + addend
        if (new > self.max).any():
            raise self._too_many()
        if (new < 0).any():  # the image was wrong: QEMU, too, leaves such a cluster free
            logger.warning("%s: refcounts are lower than the references; run qemu-img check", self._file.filename)
            new = np.maximum(new, 0)
        block.view[places] = new.astype(block.view.dtype)

    def _check_room(self, clusters: NDArray[np.uint64], addends: NDArray[np.int64]) -> None:
        if (self.many(clusters).astype(np.int64) + addends > self.max).any():
            raise self._too_many()

    def _too_many(self) -> NotSupported:
        bits = 1 << self._refcount_order
        return NotSupported(
            f"{self._file.filename}: a cluster would be shared more often than a refcount of {bits} bits can say"
        )

    def by_block(self, clusters: NDArray[np.uint64]) -> list[tuple[int, slice]]:
        """Index of each block, and which of the clusters, in ascending order, are in it."""
        if not len(clusters):
            return []
        only = int(clusters[0]) // self.per_block
        if (
            int(clusters[-1]) // self.per_block == only
        ):  # most often: divisions of all of them take longer than the rest
            return [(only, slice(0, len(clusters)))]
        indices = (clusters // np.uint64(self.per_block)).astype(np.int64)
        breaks = [0, *(np.flatnonzero(np.diff(indices)) + 1).tolist(), len(clusters)]
        return [(int(indices[a]), slice(a, b)) for a, b in pairwise(breaks)]

    def places(self, clusters: NDArray[np.uint64], index: int) -> NDArray[np.int64]:
        """Where in a block, in which they all are, the refcounts of clusters stand."""
        return clusters.astype(np.int64) - index * self.per_block

    # -- allocation ---------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> int:
        """The first of `count` clusters that follow each other; their refcount is 1 from now on."""
        first = self._find_free(count)
        if first + count > self.limit:
            raise NoSpace(f"{self._file.filename}: no {count} free clusters are left")
        found = self._sections.overlap(first << self._cluster_bits, count << self._cluster_bits)
        if found is not None:
            offset = first << self._cluster_bits
            raise self._order.corrupt(offset, f"a cluster with refcount 0 holds a part of the {found.value}")
        self.untouched = max(self.untouched, first + count)
        self._free = first + count  # before blocks are made for them, which are looked for from there on
        self.add(first, count, 1)
        return first

    def look_from(self, cluster: int) -> None:
        """Give out no cluster before this one, until another one becomes free there."""
        self._free = max(self._free, cluster)

    def _find_free(self, count: int) -> int:
        """The first of `count` free clusters in a row. What no block describes is free."""
        per_block, index, run = self.per_block, self._free, 0
        gaps = 0
        while True:
            number, place = divmod(index, per_block)
            block = self._block(number)
            if block is None:
                length = per_block - place
            elif block.counts[place]:
                index = number * per_block + block.next_free(place)
                gaps += run > 0
                run = 0
                if gaps > _MAX_GAPS:
                    index, gaps = max(index, self.untouched), 0
                continue
            elif count == 1:
                return index
            else:
                length = block.next_used(place) - place
            run += length
            index += length
            if run >= count:
                return index - run

    # -- blocks and the table -----------------------------------------------------------------------------------------

    def _block(self, index: int) -> RefcountBlock | None:
        """The block of that number; None: its clusters are all free."""
        block = self._blocks.get(index)
        if block is not None or index >= len(self.table) or not self.table[index]:
            return block
        offset = self.table[index]
        data = self._file.pread_available(offset, self._cluster_size)
        if len(data) < self._cluster_size:
            raise rules.REFCOUNT_BLOCK_IN_FILE.broken(offset, f"the refcount block at {offset:#x} is not in the file")
        if len(self._blocks) << self._cluster_bits >= CACHE_SIZE:
            kept = self._dirty | self._on_the_way
            for other in [each for each in self._blocks if each not in kept][: len(self._blocks) // 2 or 1]:
                del self._blocks[other]
        block = self._blocks[index] = RefcountBlock(offset, self._refcount_order, self.per_block, data)
        return block

    def _make_block(self, index: int) -> RefcountBlock:
        """A block for clusters that none describes yet."""
        if index >= len(self.table):
            self._grow_table(index)
            if block := self._block(index):
                return block
        cluster = self._find_free(1)
        home = cluster // self.per_block
        if home != index and self._block(home) is None:
            # Its own refcount has no place either. A block that describes itself goes there, and this one behind it.
            self._make_block(home)
            return self._make_block(index)
        if cluster >= self.limit:
            raise NoSpace(f"{self._file.filename}: no free cluster is left")
        self.untouched = max(self.untouched, cluster + 1)
        block = RefcountBlock(cluster << self._cluster_bits, self._refcount_order, self.per_block)
        self._blocks[index] = block
        self._dirty.add(index)
        self.table[index] = block.host_offset
        self._table_dirty = min(self._table_dirty[0], index), max(self._table_dirty[1], index + 1)
        self._sections.add(Section.REFCOUNT_BLOCK, block.host_offset, self._cluster_size)
        self.add(cluster, 1, 1)
        return block

    def _grow_table(self, index: int) -> None:
        """Move the table to where it has room for an entry of that number, and half as many again as it had."""
        size = max(index + 1, len(self.table) * 3 // 2)
        while True:
            clusters = -(-8 * size // self._cluster_size)
            if clusters << self._cluster_bits > layout.MAX_REFCOUNT_TABLE_SIZE:
                raise NoSpace(f"{self._file.filename}: a refcount table of more than 8 MiB would be needed")
            size = clusters * self._cluster_size // 8
            first = self._find_free(clusters)
            needed = (first + clusters) // self.per_block + 2  # with blocks for the table itself, and their block
            if needed <= size:
                break
            size = needed
        if first + clusters > self.limit:
            raise NoSpace(f"{self._file.filename}: no room is left for a larger refcount table")
        old_offset, old_size = self.table_offset, 8 * len(self.table)
        self.untouched = max(self.untouched, first + clusters)
        self.table.extend([0] * (size - len(self.table)))
        self.table_offset = first << self._cluster_bits
        self._table_moved = True
        self._free = first + clusters
        self.add(first, clusters, 1)
        self._sections.remove(old_offset, old_size)
        self._sections.add(Section.REFCOUNT_TABLE, self.table_offset, 8 * size)
        start = old_offset >> self._cluster_bits
        self._order.release(range(start, start + (old_size >> self._cluster_bits)))

    # -- to the disk --------------------------------------------------------------------------------------------------

    @property
    def is_dirty(self) -> bool:
        return bool(self._dirty) or self._table_moved or self._table_dirty[0] < self._table_dirty[1]

    def collect(self, batch: Batch) -> None:
        for index in sorted(self._dirty):
            block = self._blocks[index]
            was_new, start, end = block.is_new, block.dirty_start, block.dirty_end
            offset, data = block.take_dirty(_SECTOR)
            stage = Stage.UNSEEN if was_new else Stage.COUNTS
            undo = partial(self._undo, index, block, was_new, start, end)
            batch.add(stage, block.host_offset + offset, data, Section.REFCOUNT_BLOCK, undo)
            block.is_new = False
        self._on_the_way, self._dirty = self._dirty, set()
        self._collect_table(batch)

    def _collect_table(self, batch: Batch) -> None:
        moved, (start, end) = self._table_moved, self._table_dirty
        if not moved and start >= end:
            return
        undo = partial(self._undo_table, moved, start, end)
        if moved:
            pointer = self.table_offset.to_bytes(8, "big")
            pointer += (8 * len(self.table) >> self._cluster_bits).to_bytes(4, "big")
            batch.add(Stage.UNSEEN, self.table_offset, big_endian(self.table), Section.REFCOUNT_TABLE, undo)
            batch.add(Stage.COUNTS, _TABLE_POINTER, pointer, Section.MAIN_HEADER)
        else:
            data = big_endian(self.table[start:end])
            batch.add(Stage.COUNTS, self.table_offset + 8 * start, data, Section.REFCOUNT_TABLE, undo)
        self._table_moved, self._table_dirty = False, (len(self.table), 0)

    def _undo(self, index: int, block: RefcountBlock, was_new: bool, start: int, end: int) -> None:
        block.is_new = was_new
        block.touch(start, end)
        self._dirty.add(index)

    def _undo_table(self, moved: bool, start: int, end: int) -> None:
        self._table_moved |= moved
        self._table_dirty = min(self._table_dirty[0], start), max(self._table_dirty[1], end)
