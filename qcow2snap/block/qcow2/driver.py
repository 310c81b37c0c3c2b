"""The qcow2 driver: an image as a node, its snapshots, and the VM states saved with them. Reads; never writes.

Importing this and reading header and snapshot table stays cheap; numpy and the codecs come with the first read of data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from formats.qcow2 import CryptMethod, IncompatibleFeature
from qcow2snap.block.file import FileNode
from qcow2snap.block.lru import BoundedCache
from qcow2snap.block.node import (
    BitmapNotFound,
    BlockNode,
    Buffer,
    ChangedExtent,
    ChangeTracking,
    Extent,
    FileError,
    ImageFormatError,
    ImageInUse,
    SnapshotAccess,
    SnapshotInfo,
    SnapshotNotFound,
)
from qcow2snap.block.qcow2.epoch import L1_CACHE_SIZE, Epoch
from qcow2snap.block.qcow2.header import ImageHeader, read_header
from qcow2snap.block.qcow2.in_use import is_same_snapshot, look_at_table, pointing
from qcow2snap.block.qcow2.snapshot_table import SnapshotTable
from qcow2snap.block.qcow2.vm_state import VMState

if TYPE_CHECKING:
    from qcow2snap.block.qcow2.bitmaps import BitmapInfo, DirtyBitmap
    from qcow2snap.block.qcow2.changes import Comparison, State
    from qcow2snap.block.qcow2.l2_changes import TableChanges
    from qcow2snap.block.qcow2.view import Image, L1Table, View

TABLE_CACHE_SIZE = 32 << 20  # bytes of decoded L2 tables: 1 GiB of badly fragmented tables is about 16 MiB
CLUSTER_CACHE_SIZE = 32 << 20  # bytes of decompressed clusters
BITMAP_CACHE_SIZE = 16 << 20  # bytes of bitmap tables; the largest takes 8 MiB


class Qcow2Node(BlockNode, SnapshotAccess, ChangeTracking):
    """The active disk of a qcow2 image, with access to its snapshots.

    size     the virtual disk size of the header
    threads  any; tables and clusters that one has decoded serve all
    errors   ImageFormatError when built, for a header that cannot be read; and when read. Damage of the snapshot table
             is no error but `snapshot_table.damage`
    in use   where `file` is not stable, snapshots are read as in_use says: right, or SnapshotGone. refresh() finds new
             ones. The active disk may be changing, and is read as it happens to be
    owns     file, data_file and backing, but for those `borrowed`: they are closed with it
    source   QEMU block/qcow2.c; snapshots: qcow2-snapshot.c, which gives them the size of the active disk
    """

    def __init__(
        self,
        file: FileNode,
        header: ImageHeader,
        *,
        data_file: FileNode | None = None,
        backing: BlockNode | None = None,
        has_children: bool = True,
        table_cache_size: int = TABLE_CACHE_SIZE,
        cluster_cache_size: int = CLUSTER_CACHE_SIZE,
        borrowed: Collection[BlockNode] = (),
    ) -> None:
        self.file = file
        self.header = header
        self.size = header.size
        self.data_file = data_file
        self.backing = backing
        self.nb_backing = 0 if backing is None else backing.nb_backing + 1
        self._has_children = has_children
        self._borrowed = tuple(borrowed)
        self._table_cache_size = table_cache_size
        self._cluster_cache_size = cluster_cache_size
        self._comparisons: BoundedCache[tuple[SnapshotInfo | None, ...], Comparison] = BoundedCache(L1_CACHE_SIZE)
        self._changed_tables: BoundedCache[tuple[int, int], TableChanges] = BoundedCache(table_cache_size)
        self._bitmap_directory: dict[str, BitmapInfo] | None = None
        self._bitmap_contents: BoundedCache[str, DirtyBitmap] = BoundedCache(BITMAP_CACHE_SIZE)
        self.must_confirm_snapshots = not file.stable
        self._refreshing = Lock()
        self._epoch = self._first_epoch()

    @property
    def filename(self) -> str:
        return self.file.filename

    @property
    def snapshot_table(self) -> SnapshotTable:
        """The table as far as it can be read."""
        return self._epoch.table

    @property
    def warnings(self) -> list[str]:
        """What a user should know before trusting what is read."""
        features, found = self.header.incompatible_features, []
        if features & IncompatibleFeature.CORRUPT:
            found.append("the image is marked corrupt: some writer saw damage; what is read may be wrong")
        if features & IncompatibleFeature.DIRTY:
            found.append("the image is marked dirty: it was not closed cleanly; refcounts may be stale, data is not")
        if self.snapshot_table.damage is not None:
            read = len(self.snapshot_table.entries)
            found.append(
                f"{self.header.nb_snapshots - read} of {self.header.nb_snapshots} snapshots cannot be read, from entry "
                f"{read + 1} on: {self.snapshot_table.damage.detail}"
            )
        return found

    # -- BlockNode ----------------------------------------------------------------------------------------------------

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.view(None).preadv(offset, buffers)

    def preadv_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        return self.view(None).preadv_nowait(offset, buffers)

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        return self.view(None).block_status(offset, length, want_zero=want_zero)

    def prefetch(self, offset: int, length: int) -> None:
        self.view(None).prefetch(offset, length)

    def close(self) -> None:
        for node in (self.backing, self.data_file, self.file):
            if node is not None and node not in self._borrowed:
                node.close()

    # -- SnapshotAccess -----------------------------------------------------------------------------------------------

    def snapshots(self) -> Sequence[SnapshotInfo]:
        return [entry.info for entry in self.snapshot_table.entries]

    def preadv_snapshot(self, snapshot: SnapshotInfo, offset: int, buffers: Sequence[Buffer]) -> None:
        self.view(snapshot).preadv(offset, buffers)

    def preadv_snapshot_nowait(self, snapshot: SnapshotInfo, offset: int, buffers: Sequence[Buffer]) -> bool:
        return self.view(snapshot).preadv_nowait(offset, buffers)

    def preadv_snapshot_unconfirmed(self, snapshot: SnapshotInfo, offset: int, buffers: Sequence[Buffer]) -> None:
        self.view(snapshot).preadv_unconfirmed(offset, buffers)

    def confirm_snapshot(self, snapshot: SnapshotInfo) -> None:
        epoch = self._epoch
        if watch := epoch.watch(epoch.entry(snapshot)):
            watch.confirm()

    def snapshot_block_status(
        self, snapshot: SnapshotInfo, offset: int, length: int, *, want_zero: bool = True
    ) -> Iterator[Extent]:
        return self.view(snapshot).block_status(offset, length, want_zero=want_zero)

    def prefetch_snapshot(self, snapshot: SnapshotInfo, offset: int, length: int) -> None:
        self.view(snapshot).prefetch(offset, length)

    def changes(
        self, since: SnapshotInfo | None, state: SnapshotInfo | None, offset: int = 0, length: int | None = None
    ) -> Iterator[ChangedExtent]:
        comparison = self._comparison(since, state)
        return comparison.changes(offset, comparison.size - offset if length is None else length)

    def pdiscard_snapshot(self, snapshot: SnapshotInfo, offset: int, length: int) -> None:
        """Nothing: an internal snapshot is not the reader's to punch."""

    def vm_state(self, snapshot: SnapshotInfo) -> VMState:
        if not snapshot.vm_state_size:
            raise SnapshotNotFound(f"{self.filename}: snapshot {snapshot} has no VM state")

        def view() -> View:
            epoch = self._epoch
            return epoch.vm_state(epoch.entry(snapshot))

        return VMState(view)

    def refresh(self) -> bool:
        """As SnapshotAccess.refresh. Where the file holds another image by now: ImageInUse."""
        if not self.must_confirm_snapshots:
            return False
        with self._refreshing:
            if _encoding(read_header(self.file)) != _encoding(self.header):
                raise ImageInUse(f"{self.filename}: has become another image; open it again")
            last, epoch = self._epoch, self._look(self._epoch)
            before, now = ([entry.raw for entry in each.table.entries] for each in (last, epoch))
            if len(before) == len(now) and all(map(is_same_snapshot, before, now)):
                return False
            self._epoch = epoch
            return True

    def _first_epoch(self) -> Epoch:
        return self._look() if self.must_confirm_snapshots else Epoch(self.file, self.header, self._new_image)

    def _look(self, last: Epoch | None = None) -> Epoch:
        """What a look at the snapshot table finds now."""
        look = look_at_table(self.file, self.header)
        if last is not None:
            look = look._replace(table=look.table._replace(entries=last.known(look.table.entries)))
        self.header = pointing(self.header, look.pointer)
        return Epoch(self.file, self.header, self._new_image, look)

    # -- ChangeTracking -----------------------------------------------------------------------------------------------

    def changes_since(self, since: SnapshotInfo, offset: int, length: int) -> Iterator[ChangedExtent]:
        self.check_range(offset, length)
        return self.changes(since, None, offset, length)

    def dirty_bitmaps(self) -> Sequence[str]:
        from qcow2snap.block.qcow2.bitmaps import why_unknown

        return [name for name, info in self._bitmaps().items() if why_unknown(info, self.header) is None]

    def dirty_extents(self, bitmap: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        self.check_range(offset, length)
        contents = self._bitmap_contents.get(bitmap)
        if contents is None:
            from qcow2snap.block.qcow2.bitmaps import DirtyBitmap

            info = self._bitmaps().get(bitmap)
            if info is None:
                raise BitmapNotFound(f'{self.filename}: there is no dirty bitmap "{bitmap}"')
            contents = DirtyBitmap(self.file, self.header, info)
            if self.file.stable:
                self._bitmap_contents.put(bitmap, contents, contents.nbytes)
        return contents.dirty(offset, length)

    def _bitmaps(self) -> dict[str, BitmapInfo]:
        """By name, which is theirs alone. Kept where the file cannot change."""
        if self._bitmap_directory is None or not self.file.stable:
            from qcow2snap.block.qcow2.bitmaps import read_bitmap_directory

            try:
                self._bitmap_directory = {info.name: info for info in read_bitmap_directory(self.file, self.header)}
            except ImageFormatError as error:
                error.filename = self.filename
                raise
        return self._bitmap_directory

    # -- views --------------------------------------------------------------------------------------------------------

    def view(self, snapshot: SnapshotInfo | None) -> View:
        """The disk of a snapshot, or the active disk."""
        epoch = self._epoch
        return epoch.view(None if snapshot is None else epoch.entry(snapshot), self.size)

    def l1_table(self, snapshot: SnapshotInfo | None) -> L1Table:
        """The L1 table of a snapshot, or of the active disk. Read anew."""
        epoch = self._epoch
        return epoch.l1_table(None if snapshot is None else epoch.entry(snapshot))

    def _comparison(self, since: SnapshotInfo | None, state: SnapshotInfo | None) -> Comparison:
        """Two states side by side. Kept where the file cannot change: each BLOCK_STATUS of a client asks for it."""
        pair = since, state
        comparison = self._comparisons.get(pair)
        if comparison is None:
            from qcow2snap.block.qcow2.changes import Comparison, Shared

            is_stable = self.file.stable
            shared = Shared(
                self.file, self.header, self.backing, self._changed_tables if is_stable else None, self._confirm(*pair)
            )
            comparison = Comparison(shared, self._state(since), self._state(state))
            if is_stable:
                self._comparisons.put(pair, comparison, comparison.nbytes)
        return comparison

    def _state(self, snapshot: SnapshotInfo | None) -> State:
        from qcow2snap.block.qcow2.changes import State

        epoch = self._epoch
        entry = None if snapshot is None else epoch.entry(snapshot)
        return State(
            self.size if entry is None else entry.info.size, epoch.read_l1(entry).data, partial(self.view, snapshot)
        )

    def _confirm(self, *states: SnapshotInfo | None) -> Callable[[], None]:
        def confirm() -> None:
            for snapshot in states:
                if snapshot is not None:
                    self.confirm_snapshot(snapshot)

        return confirm

    def _new_image(self) -> Image:
        """What views share, with caches of their own."""
        from qcow2snap.block.qcow2.compressed import CompressedClusters
        from qcow2snap.block.qcow2.l2 import L2Tables
        from qcow2snap.block.qcow2.view import Image

        if not self._has_children:
            raise FileError(f"{self.filename}: opened to be described, not to be read")
        return Image(
            header=self.header,
            file=self.file,
            data_file=self.data_file or self.file,
            tables=L2Tables(self.file, self.header, self._table_cache_size),
            compressed=CompressedClusters(self.file, self.header, self._cluster_cache_size),
            backing=self.backing,
            is_encrypted=self.header.crypt_method != CryptMethod.NONE,
        )


def _encoding(header: ImageHeader) -> tuple[object, ...]:
    """What a running VM never changes: how the image's tables and clusters are to be read."""
    passing = IncompatibleFeature.DIRTY | IncompatibleFeature.CORRUPT
    features = int(header.incompatible_features) & ~int(passing)
    return header.cluster_bits, header.crypt_method, features, header.compression_type
