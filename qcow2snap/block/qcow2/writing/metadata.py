"""All metadata of an image that is written, in memory: who owns what, and the operations on whole trees of it.

For whoever changes an image as a whole (snapshots, resizing); what a guest writes is `writer`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qcow2snap.block.node import ImageFormatError
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.writing.active_tables import ActiveTables
from qcow2snap.block.qcow2.writing.entries import COMPRESSED, COPIED, L1_OFFSET, OFFSET
from qcow2snap.block.qcow2.writing.image_file import ImageFile
from qcow2snap.block.qcow2.writing.order import Stage, WriteOrder
from qcow2snap.block.qcow2.writing.overlap import Section, Sections
from qcow2snap.block.qcow2.writing.refcounts import Refcounts
from qcow2snap.block.qcow2.writing.tree import with_copied_flags
from qcow2snap.block.qcow2.writing.users import Users

if TYPE_CHECKING:
    from qcow2snap.block.qcow2.snapshot_table import TableEntry

TABLE_CACHE_SIZE = 32 << 20  # bytes of L2 tables that are as in the file


class Metadata:
    """Header, refcounts, active tables, and the order in which they are written.

    threads    each method says so: "locked" ones with `lock` held, the others without
    errors     ImageFormatError for an image that is damaged; NoSpace, NotSupported, FileError
    owns       nothing: the files belong to the node
    """

    def __init__(
        self,
        file: ImageFile,
        header: ImageHeader,
        *,
        data_file: ImageFile | None = None,
        snapshots: Iterable[TableEntry] = (),
        table_cache_size: int = TABLE_CACHE_SIZE,
    ) -> None:
        self.file = file
        self.header = header
        self.data_file = data_file
        self.sections = Sections(header.cluster_bits)
        self.sections.add(Section.MAIN_HEADER, 0, header.cluster_size)
        self.users = Users()
        self.order = WriteOrder(file, data_file, header.cluster_bits, self.sections, self.users)
        self.lock = self.order.lock
        try:
            self.refcounts = Refcounts(file, header, self.sections, self.order)
            self.tables = ActiveTables(file, header, self.sections, self.refcounts, self.order, table_cache_size)
        except ImageFormatError as error:
            error.filename = file.filename
            raise
        for entry in snapshots:
            self.sections.add(Section.INACTIVE_L1, entry.l1_table_offset, 8 * entry.l1_size)
        self.order.set_sources(self.refcounts, [self.refcounts, self.tables])

    # -- clusters (locked) --------------------------------------------------------------------------------------------

    def allocate(self, length: int) -> int:
        """Locked. The host offset of new clusters in a row for `length` bytes; their refcount is 1."""
        bits = self.header.cluster_bits
        return self.refcounts.allocate(-(-length // self.header.cluster_size)) << bits

    def release(self, offset: int, length: int, *, punch: bool = False) -> None:
        """Locked. Clusters to which the tables in memory do not refer any more: free after the next commit.

        `punch`: the file system gets their space back then.
        """
        bits = self.header.cluster_bits
        if length:
            self.order.release(range(offset >> bits, (offset + length - 1 >> bits) + 1), punch=punch)

    def queue(self, stage: Stage, offset: int, data: bytes, section: Section | None = None) -> None:
        """Locked. Bytes that the next commit is to write; see order.py for the stages."""
        self.order.queue(stage, offset, data, section)

    # -- all tables ---------------------------------------------------------------------------------------------------

    def update_copied_flags(self) -> None:
        """Locked. The COPIED flags of the active disk's tables as the refcounts say."""
        tables, bits = self.tables, self.header.cluster_bits
        words_per_entry = self.header.l2_entry_size // 8
        for index, entry in enumerate(tables.l1):
            offset = entry & L1_OFFSET
            if not offset:
                continue
            flag = COPIED if self.refcounts.get(offset >> bits) == 1 else 0
            if entry != offset | flag:
                tables.set_l1(index, offset | flag)
            table = tables.table(index)
            if table is None or self.header.has_data_file:
                continue
            words = np.frombuffer(table.entries, dtype=np.uint64).copy()
            changed = with_copied_flags(words, self._refcounts_of(words[::words_per_entry]), self.header)
            places = np.flatnonzero(changed != words)
            if len(places):
                for place in places.tolist():
                    table.entries[place] = int(changed[place])
                tables.touch(table, int(places[0]), int(places[-1]) + 1)

    def _refcounts_of(self, entries: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Of the cluster of each standard entry; 0 where there is none."""
        standard = (entries & np.uint64(COMPRESSED) == 0) & (entries & np.uint64(OFFSET) != 0)
        clusters = (entries & np.uint64(OFFSET)) >> np.uint64(self.header.cluster_bits)
        unique, inverse = np.unique(clusters[standard], return_inverse=True)
        result = np.zeros(len(entries), dtype=np.uint64)
        result[standard] = self.refcounts.many(unique)[inverse]
        return result

    # -- to the disk --------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Not locked. All that has changed is on disk when this returns, and what was released is free."""
        self.order.commit()
