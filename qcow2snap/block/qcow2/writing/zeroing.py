"""Zeros and discards of the active disk: L2 entries that say so, and zeros written where there are no such.

QEMU: qcow2_co_pwrite_zeroes, qcow2_subcluster_zeroize, qcow2_co_pdiscard and qcow2_cluster_discard. What is no longer
used goes back to the file system when nothing on disk refers to it any more (WriteOrder.release with `punch`).
"""

from __future__ import annotations

from array import array

from qcow2snap.block.node import InvalidOption, NotSupported
from qcow2snap.block.qcow2.l2 import Kind
from qcow2snap.block.qcow2.writing.entries import ALL_ZEROES, COMPRESSED, COPIED, OFFSET, ZERO, subclusters, with_zero
from qcow2snap.block.qcow2.writing.writer import Writer

_ZEROS = memoryview(bytes(1 << 20))  # written at a time
_WINDOW = 64 << 20  # bytes that are looked at together
_STEP = 4096  # clusters that are changed at once: what others may have to wait for


class Zeroing:
    """Zeros and discards by way of a writer. Threads and errors as there.

    With `no_unref`, what is discarded keeps its cluster, so that the image's file is not fragmented by what is written
    there later (QEMU's discard-no-unref). Only data that no snapshot shares goes back to the file system then: QEMU 10
    takes that of the snapshots away as well.
    """

    def __init__(self, writer: Writer, *, no_unref: bool = False) -> None:
        header = writer.metadata.header
        if no_unref and header.version < 3:
            filename = writer.metadata.file.filename
            raise InvalidOption(f"{filename}: discard-no-unref is only supported since qcow2 version 3")
        self._no_unref = no_unref
        self._writer = writer
        self._version = header.version
        self._unit = header.subcluster_size
        self._has_backing = writer.view.has_backing
        self._is_raw = header.has_data_file and header.is_data_file_raw

    def pwrite_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool, is_new: bool = False
    ) -> None:
        """`is_new`: the disk is only getting this range, so no bitmap records it."""
        writer = self._writer
        with writer.changing(offset, length, records=not is_new):
            end = offset + length
            start, stop = self._aligned(offset, end)
            if not self._has_zeros(may_unmap):
                start = stop = end
            if no_fallback:
                for first, last in ((offset, min(start, end)), (stop, end)):
                    if first < last and not self._reads_as_zeros(first, last):
                        raise NotSupported("zeros can only be written here, which is not fast")
            self._write_zeros(offset, min(start, end))
            if start < stop:
                self._change(start, stop, punch=may_unmap)
            self._write_zeros(max(stop, min(start, end)), end)
        writer.commit_if_due()

    def pdiscard(self, offset: int, length: int) -> None:
        """Whole clusters only; what is left of others stays as it is."""
        writer = self._writer
        size = writer.cluster_size
        with writer.changing(offset, length):
            end = offset + length
            start = -(-offset // size) * size
            stop = end if end == writer.view.size else end // size * size
            # Without zero clusters, what lies below would show through.
            if start < stop and (self._version >= 3 or not self._has_backing):
                self._change(start, stop, punch=True)
        writer.commit_if_due()

    def _aligned(self, offset: int, end: int) -> tuple[int, int]:
        """The part of a range that is whole subclusters, the last of the disk counting as whole."""
        start = -(-offset // self._unit) * self._unit
        stop = end if end == self._writer.view.size else end // self._unit * self._unit
        if start >= stop:
            return end, end
        size = self._writer.cluster_size
        # Of a compressed cluster, parts are not zeros by themselves.
        if start % size and self._is_compressed(start):
            start = -(-start // size) * size
        if stop % size and stop != self._writer.view.size and start < stop and self._is_compressed(stop):
            stop = stop // size * size
        return (start, stop) if start < stop else (end, end)

    def _is_compressed(self, offset: int) -> bool:
        writer = self._writer
        index, start = divmod(offset, writer.coverage)
        table = writer.view.table(index)
        return table is not None and bool(table.entries[(start >> writer.bits) * writer.format.words] & COMPRESSED)

    def _has_zeros(self, may_unmap: bool) -> bool:
        """Whether entries can say that a range is zeros. In version 2, only by being empty, above no backing file."""
        return self._version >= 3 or (may_unmap and not self._has_backing)

    def _reads_as_zeros(self, start: int, end: int) -> bool:
        extents = self._writer.view.block_status(start, end - start, want_zero=False)
        return not any(extent.must_read for extent in extents)

    def _write_zeros(self, start: int, end: int) -> None:
        """Zeros where entries cannot say so, if there are none yet."""
        for first in range(start, end, _WINDOW):
            window = min(_WINDOW, end - first)
            for extent in list(self._writer.view.block_status(first, window, want_zero=False)):
                for offset in range(extent.offset, extent.end if extent.must_read else extent.offset, len(_ZEROS)):
                    self._writer.write_inside(offset, [_ZEROS[: extent.end - offset]])

    def _change(self, start: int, stop: int, *, punch: bool) -> None:
        writer, l1 = self._writer, self._writer.metadata.tables.l1
        skips = not self._has_backing and not self._is_raw  # where there is no L2 table, all reads as zeros
        while start < stop:
            index = start // writer.coverage
            if skips and not l1[index]:
                start = (index + 1) * writer.coverage
                continue
            base = index * writer.coverage
            end = min(stop, base + writer.coverage, (start >> writer.bits) + _STEP << writer.bits)
            self._change_in_table(start, end, punch=punch)
            start = end

    def _change_in_table(self, start: int, end: int, *, punch: bool) -> None:
        """A range of whole subclusters, or to the disk's end, that one L2 table describes."""
        writer = self._writer
        lock, in_flight = writer.metadata.lock, writer.in_flight
        index = start // writer.coverage
        first, last = start >> writer.bits, (end - 1 >> writer.bits) + 1
        with lock:
            in_flight.wait(first, last)
            under_way = in_flight.add(first, last)
        try:
            if self._is_raw:  # it has to read the same without us
                writer.data_file.pwrite_zeroes(start, end - start, may_unmap=punch)
            elif writer.has_data_file and punch and start < writer.data_file.size:
                writer.data_file.pdiscard(start, min(end, writer.data_file.size) - start)
            elif punch and self._no_unref:
                self._punch_kept(index, start, end)
        except BaseException:
            with lock:
                in_flight.end(under_way)
            raise
        with lock:
            try:
                self._change_entries(index, start, end, punch=punch)
            finally:
                in_flight.end(under_way)

    def _punch_kept(self, index: int, start: int, end: int) -> None:
        """Give back the space of clusters that stay ours. While they are in flight: who writes there later keeps it."""
        writer = self._writer
        with writer.metadata.lock:
            runs = self._kept(index, start, end)
        for host, length in runs:
            length = min(length, writer.data_file.size - host)
            if length > 0:
                writer.data_file.pdiscard(host, length)

    def _kept(self, index: int, start: int, end: int) -> list[tuple[int, int]]:
        """Locked. Host offset and length of clusters with data that are discarded whole and that no snapshot has."""
        writer, tables = self._writer, self._writer.metadata.tables
        table, words, size = tables.table(index), writer.format.words, writer.cluster_size
        if table is None or not tables.l1[index] & COPIED:
            return []
        base = index * writer.coverage
        first, last = (start - base) // size, (end - 1 - base) // size + 1
        writer.check_entries(table, first, last)
        runs: list[tuple[int, int]] = []
        for slot in range(first, last):
            entry, cluster = table.entries[slot * words], base + slot * size
            is_whole = start <= cluster and (end >= cluster + size or end == writer.view.size)
            is_zero = table.entries[slot * 2 + 1] == ALL_ZEROES if words == 2 else entry & ZERO
            if is_zero or not is_whole or entry & (COPIED | COMPRESSED) != COPIED:
                continue
            host = entry & OFFSET
            writer.check_overlap(host, size)
            if runs and sum(runs[-1]) == host:
                runs[-1] = runs[-1][0], runs[-1][1] + size
            else:
                runs.append((host, size))
        return runs

    def _change_entries(self, index: int, start: int, end: int, *, punch: bool) -> None:
        """Locked."""
        writer = self._writer
        tables, words, size = writer.metadata.tables, writer.format.words, writer.cluster_size
        base = index * writer.coverage
        table = tables.table(index)
        old = table.entries if table is not None else array("Q", bytes(writer.coverage // size * words * 8))
        changed: list[tuple[int, array[int], int]] = []
        first, last = (start - base) // size, (end - 1 - base) // size + 1
        if table is not None:
            writer.check_entries(table, first, last)
        for slot in range(first, last):
            cluster = base + slot * size
            entry = old[slot * words]
            is_whole = start <= cluster and (end >= cluster + size or end == writer.view.size)
            if words == 2:
                new, given_up = self._subclusters(
                    entry, old[2 * slot + 1], max(start - cluster, 0), end - cluster, is_whole, punch
                )
            else:
                new, given_up = self._cluster(entry, punch)
            if new != old[slot * words : (slot + 1) * words]:
                changed.append((slot, new, entry if given_up else 0))
        if not changed:
            return
        table = tables.writable(index)
        for slot, new, released in changed:
            if released:
                writer.release_entry(released, punch=punch)
            table.entries[slot * words : (slot + 1) * words] = new
        tables.touch(table, changed[0][0] * words, (changed[-1][0] + 1) * words)

    def _cluster(self, entry: int, punch: bool) -> tuple[array[int], bool]:
        """The new entry of a whole cluster, and whether what it had is given up."""
        kind = self._writer.format.kind(entry)
        if kind is Kind.UNALLOCATED:
            return array("Q", [ZERO if self._has_backing and self._version >= 3 else 0]), False
        if kind is Kind.ZERO_PLAIN or (kind is Kind.ZERO_ALLOC and not punch):
            return array("Q", [entry]), False
        if entry & COMPRESSED or (punch and not self._no_unref):
            return array("Q", [ZERO if self._version >= 3 else 0]), True
        return array("Q", [entry | ZERO]), False

    def _subclusters(
        self, entry: int, bitmap: int, start: int, end: int, is_whole: bool, punch: bool
    ) -> tuple[array[int], bool]:
        """The same, with subclusters; `start` and `end` are counted from the cluster's start."""
        kind = self._writer.format.kind(entry)
        if kind is Kind.UNALLOCATED and not self._has_backing:
            return array("Q", [entry, bitmap]), False
        if is_whole:
            if entry & COMPRESSED or (punch and not self._no_unref):
                return array("Q", [0, ALL_ZEROES]), kind is not Kind.UNALLOCATED
            return array("Q", [entry, ALL_ZEROES]), False
        bits = subclusters(start // self._unit, -(-min(end, self._writer.cluster_size) // self._unit))
        return array("Q", [entry, with_zero(bitmap, bits)]), False
