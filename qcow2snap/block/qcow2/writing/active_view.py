"""The active disk as its tables in memory map it: reads and maps like any view, while writers change them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcow2snap.block.node import Buffer
from qcow2snap.block.qcow2.l2 import HAS_HOST, Kind
from qcow2snap.block.qcow2.view import Image, L1Table, Mapping, View
from qcow2snap.block.qcow2.writing.active_tables import ActiveL2
from qcow2snap.block.qcow2.writing.entries import OFFSET, EntryFormat
from qcow2snap.block.qcow2.writing.metadata import Metadata

_FEW = 32  # clusters that are looked up one by one in a table that has changed; for more, it is decoded


class ActiveView(View):
    """The active disk of an image that is written.

    threads  any; nobody waits for writers, and what is read is what each cluster held at some moment of the read
    """

    _keeps_last_part = False  # it may be overwritten

    def __init__(self, image: Image, metadata: Metadata) -> None:
        header = metadata.header
        super().__init__(image, L1Table(0, b""), start=0, size=header.size, has_backing=True)
        self.has_backing = image.backing is not None
        self._tables = metadata.tables
        self._users = metadata.users
        self._lock = metadata.lock
        self._format = EntryFormat(header)
        self._unit = header.subcluster_size

    def _preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        number = self._users.begin()
        try:
            super()._preadv(offset, buffers)
        finally:
            self._users.end(number)

    def table(self, index: int) -> ActiveL2 | None:
        """An L2 table, from memory or from the file."""
        table = self._tables.at_hand(index)
        if table is None:
            with self._lock:
                table = self._tables.table(index)
        return table

    def mappings(self, offset: int, length: int) -> Iterator[Mapping]:
        coverage = self._coverage
        end = offset + length
        while offset < end:
            index, in_table = divmod(offset, coverage)
            base = index * coverage
            stop = min(end, base + coverage)
            table = self.table(index)
            if table is None:
                l1, index = self._tables.l1, index + 1
                while index * coverage < end and index < len(l1) and not l1[index]:
                    index += 1
                stop = min(end, index * coverage)
                yield Mapping(offset, stop - offset, Kind.UNALLOCATED, 0, None, in_table)
            elif stop - offset > _FEW * self._cluster_size:
                decoded = self._tables.decoded(table)
                for start, until, kind, host in decoded.runs(in_table, stop - base):
                    yield Mapping(base + start, until - start, kind, host, decoded, start)
            else:
                yield from self._one_by_one(table, base, offset, stop)
            offset = stop

    def _one_by_one(self, table: ActiveL2, base: int, offset: int, end: int) -> Iterator[Mapping]:
        """The runs of a range, as L2Table gives them."""
        cluster_size, unit, has_subclusters = self._cluster_size, self._unit, self._format.has_subclusters
        last: Mapping | None = None
        while offset < end:
            slot = (offset - base) // cluster_size
            in_unit = offset % unit
            if has_subclusters:
                entry, bitmap = table.entries[2 * slot : 2 * slot + 2]  # in one step: they change together
                kind = self._format.subcluster_kind(entry, bitmap, offset % cluster_size // unit)
            else:
                entry = table.entries[slot]
                kind = self._format.kind(entry)
            length = min(unit - in_unit, end - offset)
            if kind in (Kind.COMPRESSED, Kind.INVALID):
                host = entry
                length = min(cluster_size - offset % cluster_size, end - offset)
            else:
                host = (entry & OFFSET) + offset % cluster_size
            if last is not None and _goes_on(last, kind, host):
                last = last._replace(length=last.length + length)
            else:
                if last is not None:
                    yield last
                last = Mapping(offset, length, kind, host, table, offset - base)
            offset += length
        if last is not None:
            yield last


def _goes_on(last: Mapping, kind: int, host: int) -> bool:
    if last.kind != kind or kind in (Kind.COMPRESSED, Kind.INVALID):
        return False
    return not HAS_HOST >> kind & 1 or last.host + last.length == host
