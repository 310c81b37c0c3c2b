"""A qcow2 image that is written: its active disk as a node for reading and writing, its snapshots as ever.

One process has the image, with threads: what is read of the active disk comes from the tables that are being changed.
Snapshots are read from the file, where nothing that they refer to changes as long as they stand.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from threading import Lock
from weakref import WeakKeyDictionary

from formats.qcow2 import IncompatibleFeature
from qcow2snap.block.node import (
    BlockNode,
    Buffer,
    ChangedExtent,
    FileError,
    NodeInUse,
    Qcow2SnapError,
    SnapshotGone,
    SnapshotInfo,
    UnsupportedFeature,
)
from qcow2snap.block.qcow2.driver import CLUSTER_CACHE_SIZE, TABLE_CACHE_SIZE, Qcow2Node
from qcow2snap.block.qcow2.epoch import Epoch, identity, judge_l1
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.in_use import Look
from qcow2snap.block.qcow2.snapshot_table import SnapshotTable, TableEntry, read_snapshot_table
from qcow2snap.block.qcow2.view import View
from qcow2snap.block.qcow2.writing.active_view import ActiveView
from qcow2snap.block.qcow2.writing.dirty_bitmaps import DirtyBitmaps
from qcow2snap.block.qcow2.writing.header_state import HeaderState, refuse_unwritable
from qcow2snap.block.qcow2.writing.image_file import ImageFile
from qcow2snap.block.qcow2.writing.metadata import Metadata
from qcow2snap.block.qcow2.writing.repair import repair_refcounts
from qcow2snap.block.qcow2.writing.snapshots import Snapshots
from qcow2snap.block.qcow2.writing.writer import Writer
from qcow2snap.block.qcow2.writing.zeroing import Zeroing

logger = logging.getLogger(__name__)

_COMMITS_AT_CLOSE = 3  # the second writes what the first made free, the third finds nothing


class Standing:
    """Whether a snapshot stands, which only this process decides (in_use.Watch)."""

    def __init__(self, filename: str, snapshot: SnapshotInfo) -> None:
        self._filename = filename
        self._snapshot = snapshot
        self.is_gone = False

    def confirm(self) -> None:
        if self.is_gone:
            raise SnapshotGone(f"{self._filename}: snapshot {self._snapshot} was deleted from the image meanwhile")


class WritableQcow2Node(Qcow2Node):
    """The active disk of a qcow2 image, for reading and writing, with access to its snapshots.

    size     of the disk, now
    threads  any; a flush makes durable what was written before it, by whomever
    errors   as Qcow2Node and Writer. When built: UnsupportedFeature for images that must not be written (corrupt,
             encrypted), ImageFormatError for those whose metadata cannot be followed
    close    all is on disk and nothing leaks; it fails like a write
    """

    read_only = False

    def __init__(
        self,
        file: ImageFile,
        header: ImageHeader,
        *,
        data_file: ImageFile | None = None,
        backing: BlockNode | None = None,
        table_cache_size: int = TABLE_CACHE_SIZE,
        cluster_cache_size: int = CLUSTER_CACHE_SIZE,
        borrowed: Collection[BlockNode] = (),
        discard_no_unref: bool = False,
    ) -> None:
        """`discard_no_unref`: what is discarded keeps its clusters; version 2 has no such entries (InvalidOption)."""
        refuse_unwritable(header, file.filename)
        self._readers: WeakKeyDictionary[object, SnapshotInfo] = WeakKeyDictionary()
        self._reading = Lock()  # over _readers
        self._standing: dict[SnapshotInfo, Standing] = {}
        self.metadata: Metadata
        super().__init__(
            file,
            header,
            data_file=data_file,
            backing=backing,
            table_cache_size=table_cache_size,
            cluster_cache_size=cluster_cache_size,
            borrowed=borrowed,
        )
        table = self.snapshot_table
        try:
            for entry in table.entries:
                judge_l1(entry, header)
            self.metadata = Metadata(
                file, header, data_file=data_file, snapshots=table.entries, table_cache_size=table_cache_size
            )
            self._dirty_bitmaps = DirtyBitmaps(self.metadata)
        except Qcow2SnapError as error:
            if hasattr(error, "filename"):
                error.filename = file.filename
            raise
        self._header_state = HeaderState(file, header)
        self.metadata.order.corrupt = self._header_state.corrupt
        if header.incompatible_features & IncompatibleFeature.DIRTY:
            self._repair(table)
        self._active = ActiveView(self._new_image(), self.metadata)
        self.writer = Writer(self.metadata, self._active, self._header_state, self._before_first_change)
        self._zeroing = Zeroing(self.writer, no_unref=discard_no_unref)
        self._snapshots = Snapshots(
            self.metadata,
            table,
            alone=self.writer.alone,
            gone=self._mark_gone,
            broken=self._header_state.give_up,
        )

    def _first_epoch(self) -> Epoch:
        return self._epoch_of(read_snapshot_table(self.file, self.header))

    def _epoch_of(self, table: SnapshotTable) -> Epoch:
        """The snapshots of a table. Those that were known still stand, or have gone, as before."""
        if table.damage is not None:
            raise UnsupportedFeature(
                f"{self.filename}: its snapshot table is damaged, so it cannot be written: {table.damage.detail}"
            )
        standing = self._standing
        for entry in table.entries:
            standing.setdefault(identity(entry.info), Standing(self.filename, entry.info))
        watches = [standing[identity(entry.info)] for entry in table.entries]
        return Epoch(self.file, self.header, self._new_image, Look(b"", table), watches)

    def _repair(self, table: SnapshotTable) -> None:
        self._header_state.clear_unknown_autoclear()
        wrong = repair_refcounts(self.metadata, table)
        self._header_state.clear_dirty()
        features = self.header.incompatible_features & ~IncompatibleFeature.DIRTY
        self.header = self.header._replace(incompatible_features=IncompatibleFeature(features))
        logger.warning("%s: was not closed cleanly; %d refcounts were wrong and are repaired", self.filename, wrong)

    def _before_first_change(self) -> None:
        self._header_state.clear_unknown_autoclear()
        if self._dirty_bitmaps.begin():
            self.writer.record = self._dirty_bitmaps.record

    # -- BlockNode ----------------------------------------------------------------------------------------------------

    def view(self, snapshot: SnapshotInfo | None) -> View:
        return self._active if snapshot is None else super().view(snapshot)

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._active.preadv(offset, buffers)

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.writer.pwritev(offset, buffers)

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        self._zeroing.pwrite_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback)

    def pdiscard(self, offset: int, length: int) -> None:
        self._zeroing.pdiscard(offset, length)

    def flush(self) -> None:
        self.metadata.commit()

    def close(self) -> None:
        failure: Qcow2SnapError | None = None
        try:
            self._settle()
            if self._header_state.may_be_written and self._dirty_bitmaps.store():
                self._settle()
        except Qcow2SnapError as error:
            failure = error
        super().close()
        if failure is not None:
            raise FileError(f"{self.filename}: not all could be written when it was closed: {failure}") from failure

    def _settle(self) -> None:
        for _ in range(_COMMITS_AT_CLOSE):
            self.metadata.commit()  # also where only data was written
            if self.metadata.order.is_clean:
                break

    # -- dirty bitmaps ------------------------------------------------------------------------------------------------

    def dirty_bitmaps(self) -> Sequence[str]:
        return self._dirty_bitmaps.names()

    def dirty_extents(self, bitmap: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """As it is now, with what was written since the image was opened."""
        recorded = self._dirty_bitmaps.find(bitmap)
        if recorded is None:
            return super().dirty_extents(bitmap, offset, length)
        self.check_range(offset, length)
        return recorded.dirty(offset, length)

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def create_snapshot(self, name: str, *, date_ns: int | None = None, vm_clock_nsec: int = 0) -> SnapshotInfo:
        """Keep what the disk is at one moment: writes that are under way are in it whole, or not at all."""
        snapshot = self._snapshots.create(name, date_ns=date_ns, vm_clock_nsec=vm_clock_nsec)
        self._see_snapshots()
        return snapshot

    def delete_snapshot(self, snapshot: SnapshotInfo, *, force: bool = False) -> None:
        """NodeInUse if somebody reads it, unless by `force`: then he gets SnapshotGone from that moment on."""
        if not force:
            self._refuse_if_read(snapshot)
        try:
            self._snapshots.delete(snapshot)
        finally:
            self._see_snapshots()

    def rename_snapshot(self, snapshot: SnapshotInfo, name: str) -> SnapshotInfo:
        self._refuse_if_read(snapshot)
        renamed = self._snapshots.rename(snapshot, name)
        self._standing[identity(renamed)] = self._standing.pop(identity(snapshot))
        self._see_snapshots()
        return renamed

    def apply_snapshot(self, snapshot: SnapshotInfo) -> None:
        """Make the disk what the snapshot is, with its size. Nobody may be reading the disk."""
        self._snapshots.apply(snapshot)
        self._see_size()

    def resize(self, size: int) -> None:
        """Make the disk larger, and its external data file with it.

        What is new reads as zeros when the size says that it is there; in bitmaps it is clean.
        """
        before = self.size
        self._snapshots.judge_growth(size)
        self._header_state.check()
        self._dirty_bitmaps.begin_resizing(size)
        self._snapshots.grow(size)
        self._see_size()
        try:
            self._dirty_bitmaps.resized(size)
            self._active.size = size
            self._zero_behind(before)
            if self.metadata.data_file is not None:
                self.metadata.data_file.grow(size)
            self._snapshots.set_size(size)
        finally:
            self._see_size()
            self._dirty_bitmaps.resized(self.size)

    def attach_reader(self, reader: object, snapshot: SnapshotInfo) -> None:
        with self._reading:
            self._readers[reader] = identity(snapshot)

    def detach_reader(self, reader: object) -> None:
        with self._reading:
            self._readers.pop(reader, None)

    def _refuse_if_read(self, snapshot: SnapshotInfo) -> None:
        with self._reading:
            readers = list(self._readers.values()).count(identity(snapshot))
        if readers:
            raise NodeInUse(
                f"{self.filename}: snapshot {snapshot} is in use by {readers} reader{'s' * (readers > 1)}; take them "
                "away first, or delete it by force: they get errors then"
            )

    def _mark_gone(self, entry: TableEntry) -> None:
        self._standing.pop(identity(entry.info)).is_gone = True

    def _see_snapshots(self) -> None:
        self.header = self.metadata.header
        self._epoch = self._epoch_of(SnapshotTable(self._snapshots.entries))

    def _see_size(self) -> None:
        self.header = self.metadata.header
        self.size = self._active.size = self.header.size

    def _zero_behind(self, end: int) -> None:
        """What the disk's last cluster has behind its end, and what a longer backing file would show there."""
        stop = end
        if self.backing is not None:
            stop = max(stop, self.backing.size)
        if self.metadata.data_file is not None and self.header.is_data_file_raw:  # whose bytes are the disk's
            stop = max(stop, self.metadata.data_file.size)
        stop = min(-(-stop // self.header.cluster_size) * self.header.cluster_size, self._active.size)
        if end < stop:
            self._zeroing.pwrite_zeroes(end, stop - end, may_unmap=True, no_fallback=False, is_new=True)

    def refresh(self) -> bool:
        """Nobody but this process changes the image."""
        return False

    def changes(
        self, since: SnapshotInfo | None, state: SnapshotInfo | None, offset: int = 0, length: int | None = None
    ) -> Iterator[ChangedExtent]:
        if None not in (since, state):
            return super().changes(since, state, offset, length)
        # It is read from the file: tables of the active disk go there first, and stay until it has been read.
        self.metadata.order.write_back()
        with self.metadata.users.using():
            return iter(list(super().changes(since, state, offset, length)))
