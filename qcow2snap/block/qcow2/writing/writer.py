"""What a guest does to the active disk: writes, and what they allocate and copy. Zeros and discards are `zeroing`'s.

A write of clusters that are ours alone goes to the file and changes nothing else. Any other is cut into pieces:
clusters are allocated, what is around the data is read and written with it, and then the L2 entries are changed, in
memory. Nobody holds a lock while data moves; only those wait who want clusters that somebody is just linking.
QEMU: qcow2_co_pwritev, qcow2_alloc_host_offset and qcow2_alloc_cluster_link_l2.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from qcow2snap.block.buffers import Cursor
from qcow2snap.block.in_flight import InFlight
from qcow2snap.block.node import Buffer, NoSpace, OutOfRange
from qcow2snap.block.qcow2.writing.active_tables import ActiveL2
from qcow2snap.block.qcow2.writing.active_view import ActiveView
from qcow2snap.block.qcow2.writing.entries import COMPRESSED, COPIED, OFFSET, EntryFormat
from qcow2snap.block.qcow2.writing.header_state import HeaderState
from qcow2snap.block.qcow2.writing.metadata import Metadata
from qcow2snap.block.qcow2.writing.pieces import Cutter, Piece
from qcow2snap.block.qcow2.writing.tree import compressed_range
from qcow2snap.block.qcow2.writing.users import Gate

MAX_DIRTY = 64 << 20  # bytes of L2 tables: with more than that, a write commits


class Writer:
    """Changes the active disk.

    threads  any; writes that overlap and are under way at once leave each byte as one of them had it
    errors   OutOfRange, NoSpace, FileError; ImageFormatError where the image is damaged, which may mark it corrupt
    """

    def __init__(
        self, metadata: Metadata, view: ActiveView, header: HeaderState, before_first: Callable[[], None]
    ) -> None:
        """`before_first` is called before the first change of the image."""
        image_header = metadata.header
        self.metadata = metadata
        self.view = view
        self.header = header
        self.gate = Gate(metadata.lock)
        self.in_flight = InFlight(metadata.lock)  # clusters of the guest that somebody is linking
        self.format = EntryFormat(image_header)
        self.bits = image_header.cluster_bits
        self.cluster_size = image_header.cluster_size
        self.coverage = image_header.l2_coverage
        self.data_file = metadata.data_file or metadata.file
        self.has_data_file = metadata.data_file is not None
        self._cutter = Cutter(self.format, image_header.subcluster_size)
        self._before_first: Callable[[], None] | None = before_first
        self.record: Callable[[int, int], None] | None = None  # called before each change of the disk: offset, length
        self._starting = Lock()  # while `before_first` is called

    # -- around every change ------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self, offset: int, length: int, *, records: bool = True) -> Iterator[None]:
        """Around every change of a range: it is in the disk, the image may be written, and nobody is alone with it.

        Bitmaps know of it before it happens, as it may happen in part.
        """
        self.begin(offset, length, records=records)
        try:
            yield
        finally:
            self.end()

    def begin(self, offset: int, length: int, *, records: bool = True) -> None:
        if offset < 0 or length < 0 or offset + length > self.view.size:
            raise OutOfRange(f"{length} bytes at {offset} reach beyond the end, which is at {self.view.size}")
        self.header.check()
        with self.metadata.lock:
            self.gate.enter()
        try:
            if self._before_first is not None:
                with self._starting:
                    if self._before_first is not None:
                        self._before_first()
                        self._before_first = None
            if self.record is not None and records:
                self.record(offset, length)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        with self.metadata.lock:
            self.gate.leave()

    def commit_if_due(self) -> None:
        """After a change, without any lock: when so much is waiting that it has to go to the disk."""
        if self.metadata.order.is_due or self.metadata.tables.dirty_bytes > MAX_DIRTY:
            self.metadata.commit()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Around a change of the image as a whole: nobody changes the disk meanwhile, what was under way has ended."""
        self.header.check()
        with self.gate.alone():
            self.header.clear_unknown_autoclear()
            yield

    # -- writes -------------------------------------------------------------------------------------------------------

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        length = sum(map(len, buffers))
        if not length:
            return
        self.begin(offset, length)
        try:
            self.write_inside(offset, buffers)
        finally:
            self.end()
        self.commit_if_due()

    def write_inside(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """As pwritev, for who has begun already. Some bytes, in the disk."""
        length = sum(map(len, buffers))
        user = self.metadata.users.begin()
        try:
            with self.metadata.lock:
                host = self._in_place(offset, length)
            if host >= 0:
                self.data_file.pwritev(host, buffers)
            else:
                self._write_pieces(offset, offset + length, Cursor(buffers))
        finally:
            self.metadata.users.end(user)

    def _in_place(self, offset: int, length: int) -> int:
        """Locked. The host offset of a range that is ours alone and lies in one piece, or -1."""
        index, start = divmod(offset, self.coverage)
        tables = self.metadata.tables
        if start + length > self.coverage or not tables.l1[index] & COPIED:
            return -1
        if self.in_flight.overlap(offset >> self.bits, (offset + length - 1 >> self.bits) + 1):
            return -1
        table = tables.at_hand(index) or tables.table(index)
        if table is None:
            return -1
        host = self._cutter.in_place(table.entries, start, start + length)
        if host >= 0 and not self.has_data_file:
            self.check_overlap(host, length)
        return host

    def _write_pieces(self, offset: int, end: int, data: Cursor) -> None:
        while offset < end:
            with self.metadata.lock:
                piece = self._plan(offset, end)
                clusters = piece.offset >> self.bits, (piece.end - 1 >> self.bits) + 1
                in_flight = None if piece.in_place else self.in_flight.add(*clusters)
            linked = False
            try:
                self._write(piece, data.take(piece.end - offset))
                linked = True
            finally:
                if in_flight is not None:
                    with self.metadata.lock:
                        try:
                            if linked:
                                self._link(piece)
                            elif piece.allocate:
                                self._take_back(piece)
                        finally:
                            self.in_flight.end(in_flight)
            offset = piece.end

    def _plan(self, offset: int, end: int) -> Piece:
        """Locked. The next piece of a write, its clusters allocated, when nobody is linking any of them."""
        tables, index = self.metadata.tables, offset // self.coverage
        while True:
            table = tables.table(index)
            is_shared = not tables.l1[index] & COPIED
            entries = None if table is None else table.entries
            piece = self._cutter.cut(entries, offset, end, index, is_shared=is_shared)
            clusters = piece.offset >> self.bits, (piece.end - 1 >> self.bits) + 1
            if not self.in_flight.overlap(*clusters):
                break
            self.in_flight.wait(*clusters)
        if table is not None:
            self.check_entries(table, piece.slot, piece.slot + piece.nb_clusters)
        if not piece.in_place:
            tables.writable(index)
        if not piece.allocate:
            if not self.has_data_file:
                self.check_overlap(piece.host, piece.nb_clusters << self.bits)
            return piece
        if self.has_data_file:
            return piece._replace(host=piece.offset >> self.bits << self.bits)
        return self._allocate(entries, piece, offset, end, index, is_shared)

    def _allocate(
        self, entries: array[int] | None, piece: Piece, offset: int, end: int, index: int, is_shared: bool
    ) -> Piece:
        """Locked. The piece with a place in the file; a shorter one where there is not so much room in one."""
        refcounts, count = self.metadata.refcounts, piece.nb_clusters
        untouched = refcounts.untouched
        while True:
            try:
                host = refcounts.allocate(count) << self.bits
            except NoSpace:
                if count == 1:
                    raise
                count //= 2
                continue
            break
        if count < piece.nb_clusters:
            end = ((offset >> self.bits) + count) << self.bits
            piece = self._cutter.cut(entries, offset, end, index, is_shared=is_shared)
        return piece._replace(host=host, in_hole=host >> self.bits >= untouched)

    def _write(self, piece: Piece, data: list[memoryview]) -> None:
        """The data of a piece and what is around it, in one write."""
        if piece.in_place:
            host = piece.host + piece.offset % self.cluster_size
            self.data_file.pwritev(host, data)
            return
        start, stop = piece.fill_start, piece.fill_end
        if start < piece.offset and self._is_hole(piece, start, piece.offset):
            start = piece.offset
        if stop > piece.end and self._is_hole(piece, piece.end, stop):
            stop = piece.end
        before, after = self._filling(start, piece.offset), self._filling(piece.end, stop)
        base = piece.offset >> self.bits << self.bits
        self.data_file.pwritev(piece.host + start - base, [*before, *data, *after])

    def _is_hole(self, piece: Piece, start: int, end: int) -> bool:
        """Whether a part of one of the piece's clusters reads as zeros, and its new place is a hole of the file."""
        table = self.metadata.tables.at_hand(piece.l1_index) if piece.in_hole else None
        if table is None:
            return False
        slot, in_cluster = divmod(start % self.coverage, self.cluster_size)
        zeros = self._cutter.reads_as_zeros(table.entries, slot, in_cluster, in_cluster + end - start)
        if zeros is not None:
            return zeros
        end = min(end, self.view.size)
        return start >= end or not any(
            extent.must_read for extent in self.view.block_status(start, end - start, want_zero=False)
        )

    def _filling(self, start: int, end: int) -> list[memoryview]:
        """What a range reads as now, and zeros behind the end of the disk."""
        if start >= end:
            return []
        filling = memoryview(bytearray(end - start))
        length = min(end, self.view.size) - start
        if length > 0:
            self.view.preadv(start, [filling[:length]])
        return [filling]

    def _link(self, piece: Piece) -> None:
        """Locked. Have the table say where the clusters of a piece are now; what they had before is given up."""
        tables, words = self.metadata.tables, self.format.words
        table = tables.writable(piece.l1_index)
        start, end = piece.slot * words, (piece.slot + piece.nb_clusters) * words
        new = self._cutter.linked(table.entries, piece, piece.host)
        if piece.allocate:
            for entry in table.entries[start:end:words]:
                if entry:
                    self.release_entry(entry)
        table.entries[start:end] = new
        tables.touch(table, start, end)

    def _take_back(self, piece: Piece) -> None:
        """Locked. Clusters that were to be linked, and were not written."""
        if not self.has_data_file:
            self.metadata.refcounts.add(piece.host >> self.bits, piece.nb_clusters, -1)

    # -- shared with zeroing ------------------------------------------------------------------------------------------

    def release_entry(self, entry: int, *, punch: bool = False) -> None:
        """Locked. The clusters of an L2 entry that the table has no more."""
        if self.has_data_file:
            return
        if entry & COMPRESSED:
            first, last = compressed_range(entry, self.metadata.header)
            self.metadata.order.release(range(first, last + 1), punch=punch)
        elif entry & OFFSET:
            cluster = (entry & OFFSET) >> self.bits
            self.metadata.order.release(range(cluster, cluster + 1), punch=punch)

    def check_entries(self, table: ActiveL2, first: int, last: int) -> None:
        """Locked. Refuse entries `first` to `last`, the latter not included, if one of them cannot be right.

        The image is marked then, as QEMU does for those it would change.
        """
        words = self.format.words
        for slot in range(first, last):
            entry = table.entries[slot * words]
            bitmap = table.entries[slot * words + 1] if words == 2 else 0
            if (entry or bitmap) and not self.format.is_valid(entry, bitmap):
                where = table.host_offset + 8 * words * slot
                what = f"the L2 entry {entry:#x}" + (f" with the subclusters {bitmap:#x}" if words == 2 else "")
                raise self.header.corrupt(where, f"{what} is none that the disk can have")

    def check_overlap(self, host: int, length: int) -> None:
        """Locked. Refuse what would go over metadata; the image is marked then."""
        found = self.metadata.sections.overlap(host, length)
        if found is not None:
            raise self.header.corrupt(host, f"a write of the guest's would overwrite the {found.value}")
