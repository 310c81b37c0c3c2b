"""The active L1 table and its L2 tables in memory: looked up, changed, given to a commit.

Entries are the machine's integers in arrays; a table that a snapshot shares is copied before its first change.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from functools import partial

from formats.qcow2 import SECTOR_SIZE
from qcow2snap.block.node import ImageFormatError
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader, judge_active_l1
from qcow2snap.block.qcow2.l1 import read_l1
from qcow2snap.block.qcow2.l2 import L2Table, decode
from qcow2snap.block.qcow2.words import big_endian, words
from qcow2snap.block.qcow2.writing.entries import COPIED, L1_OFFSET
from qcow2snap.block.qcow2.writing.image_file import ImageFile
from qcow2snap.block.qcow2.writing.order import Batch, Stage, WriteOrder
from qcow2snap.block.qcow2.writing.overlap import Section, Sections
from qcow2snap.block.qcow2.writing.refcounts import Refcounts

_PER_SECTOR = SECTOR_SIZE // 8


class ActiveL2:
    """One L2 table of the active disk.

    entries      to look at without a lock, each whole; changed with the lock held, followed by touch()
    host_offset  where it is, or will be, in the file
    """

    __slots__ = ("dirty_end", "dirty_start", "entries", "host_offset", "index", "is_new", "runs", "version")

    def __init__(self, index: int, host_offset: int, entries: array[int], *, is_new: bool) -> None:
        self.index = index  # in the L1 table
        self.host_offset = host_offset
        self.entries = entries  # of subclusters: an entry and its bitmap in turn
        self.is_new = is_new  # no L1 entry in the file refers to it
        self.dirty_start, self.dirty_end = (0, len(entries)) if is_new else (len(entries), 0)
        self.version = 0  # one more with each change
        self.runs: tuple[int, L2Table] | None = None  # decoded, for those who look at much of it; and in which version

    def touch(self, start: int, end: int) -> None:
        """Words `start` to `end` were changed."""
        self.version += 1
        if start < self.dirty_start:
            self.dirty_start = start
        if end > self.dirty_end:
            self.dirty_end = end


class ActiveTables:
    """The tables of the active disk.

    threads  one at a time, with the order's lock held; but table() of a table that is at hand, any
    errors   ImageFormatError for a table that cannot be right; NoSpace, FileError
    memory   `cache_size` bytes for tables that are as in the file; tables that are not stay until the next commit
    """

    def __init__(
        self,
        file: ImageFile,
        header: ImageHeader,
        sections: Sections,
        refcounts: Refcounts,
        order: WriteOrder,
        cache_size: int,
    ) -> None:
        judge_active_l1(header)
        self._file = file
        self._header = header
        self._sections = sections
        self._refcounts = refcounts
        self._order = order
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._max_tables = max(2, cache_size >> header.cluster_bits)
        self.l1_offset = header.l1_table_offset
        self.l1 = words(read_l1(file, header.l1_table_offset, header.l1_size).data)
        self._dirty_l1: set[int] = set()  # sectors
        self._tables: OrderedDict[int, ActiveL2] = OrderedDict()
        self._dirty: dict[int, ActiveL2] = {}
        self._on_the_way: set[int] = set()  # taken by the last batch: the file may not have them yet
        self._add_sections()

    def _add_sections(self) -> None:
        self._sections.add(Section.ACTIVE_L1, self.l1_offset, 8 * len(self.l1))
        tables = {entry & L1_OFFSET for entry in self.l1}
        self._sections.add_clusters(Section.ACTIVE_L2, (each >> self._cluster_bits for each in tables if each))

    @property
    def dirty_bytes(self) -> int:
        """Bytes of tables that wait for a commit."""
        return len(self._dirty) << self._cluster_bits

    def at_hand(self, index: int) -> ActiveL2 | None:
        """A table that is in memory. For any thread."""
        return self._tables.get(index)

    def table(self, index: int) -> ActiveL2 | None:
        """The table of an L1 entry, to look at; None where there is none."""
        table = self._tables.get(index)
        if table is None and index < len(self.l1):
            offset = self.l1[index] & L1_OFFSET
            if not offset:
                return None
            table = ActiveL2(index, offset, self._read(index, offset), is_new=False)
            self._keep(table)
        return table

    def writable(self, index: int) -> ActiveL2:
        """The table of an L1 entry, to change: made if there was none, copied if a snapshot has it as well."""
        table = self.table(index)
        if table is not None and self.l1[index] & COPIED:
            return table
        offset = self._refcounts.allocate(1) << self._cluster_bits
        entries = array("Q", bytes(self._cluster_size)) if table is None else table.entries[:]
        new = ActiveL2(index, offset, entries, is_new=True)
        if table is not None:
            self._sections.remove(table.host_offset, self._cluster_size)
            cluster = table.host_offset >> self._cluster_bits
            self._order.release(range(cluster, cluster + 1))
        self._sections.add(Section.ACTIVE_L2, offset, self._cluster_size)
        self._tables.pop(index, None)
        self._keep(new)
        self._dirty[index] = new
        self.set_l1(index, offset | COPIED)
        return new

    def touch(self, table: ActiveL2, start: int, end: int) -> None:
        """Words `start` to `end` of a writable table were changed."""
        table.touch(start, end)
        self._dirty[table.index] = table

    def set_l1(self, index: int, entry: int) -> None:
        self.l1[index] = entry
        self._dirty_l1.add(index // _PER_SECTOR)

    def reload(self, header: ImageHeader) -> None:
        """Read all anew, when another L1 table has become the active one. Nothing may wait for a commit."""
        judge_active_l1(header)
        for entry in {entry & L1_OFFSET for entry in self.l1}:
            if entry:
                self._sections.remove(entry, self._cluster_size)
        self._sections.remove(self.l1_offset, 8 * len(self.l1))
        self._header = header
        self.l1_offset = header.l1_table_offset
        self.l1 = words(read_l1(self._file, header.l1_table_offset, header.l1_size).data)
        self._tables.clear()
        self._dirty.clear()
        self._dirty_l1.clear()
        self._add_sections()

    def decoded(self, table: ActiveL2) -> L2Table:
        """The runs of a table as it is now. For any thread."""
        version, known = table.version, table.runs
        if known is not None and known[0] == version:
            return known[1]
        decoded = decode(big_endian(table.entries), table.host_offset, self._header)
        table.runs = version, decoded
        return decoded

    def _read(self, index: int, offset: int) -> array[int]:
        if offset % self._cluster_size:
            raise self._located(
                rules.L1_ENTRY_ALIGNED.broken(
                    self.l1_offset + 8 * index, f"an L1 entry points to {offset:#x}, not a cluster boundary"
                )
            )
        data = self._file.pread_available(offset, self._cluster_size)
        if len(data) < self._cluster_size:
            what = f"the L2 table at {offset:#x} reaches beyond the end of the file"
            raise self._located(rules.L2_COMPLETE.broken(offset, what))
        return words(data)

    def _located(self, error: ImageFormatError) -> ImageFormatError:
        error.filename = self._file.filename
        return error

    def _keep(self, table: ActiveL2) -> None:
        self._tables[table.index] = table
        if len(self._tables) <= self._max_tables + len(self._dirty) + len(self._on_the_way):
            return
        for index in list(self._tables)[: len(self._tables) // 4 or 1]:  # those that came first
            if index not in self._dirty and index not in self._on_the_way and index != table.index:
                del self._tables[index]

    # -- to the disk --------------------------------------------------------------------------------------------------

    @property
    def is_dirty(self) -> bool:
        return bool(self._dirty or self._dirty_l1)

    def collect(self, batch: Batch) -> None:
        for table in self._dirty.values():
            start, end = table.dirty_start, table.dirty_end
            if start >= end:
                continue
            undo = partial(self._undo, table, start, end)
            if table.is_new:
                data = big_endian(table.entries)
                batch.add(Stage.COUNTS, table.host_offset, data, Section.ACTIVE_L2, undo)
                # From then on the L1 entry may be in the file, whether or not all goes well.
                batch.before(Stage.REFERENCES, partial(setattr, table, "is_new", False))
            else:
                first = start // _PER_SECTOR * _PER_SECTOR
                data = big_endian(table.entries[first : -(-end // _PER_SECTOR) * _PER_SECTOR])
                batch.add(Stage.REFERENCES, table.host_offset + 8 * first, data, Section.ACTIVE_L2, undo)
            table.dirty_start, table.dirty_end = len(table.entries), 0
        self._on_the_way, self._dirty = set(self._dirty), {}
        for sector in sorted(self._dirty_l1):
            first = sector * _PER_SECTOR
            data = big_endian(self.l1[first : first + _PER_SECTOR])
            undo = partial(self._undo_l1, sector)
            batch.add(Stage.REFERENCES, self.l1_offset + 8 * first, data, Section.ACTIVE_L1, undo)
        self._dirty_l1 = set()

    def _undo_l1(self, sector: int) -> None:
        self._dirty_l1.add(sector)

    def _undo(self, table: ActiveL2, start: int, end: int) -> None:
        table.dirty_start = min(table.dirty_start, start)
        table.dirty_end = max(table.dirty_end, end)
        if self._tables.get(table.index) is table:
            self._dirty[table.index] = table
