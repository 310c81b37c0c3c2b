"""The qcow2 driver: an image as a node, its snapshots, and the VM states saved with them. Reads; never writes.

Importing this and reading header and snapshot table stays cheap; numpy and the codecs come with the first read of data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING

from formats import qcow2 as layout
from formats.qcow2 import CryptMethod, IncompatibleFeature
from qcow2snap.block.file import FileNode
from qcow2snap.block.lru import BoundedCache
from qcow2snap.block.node import (
    BlockNode,
    Buffer,
    ChangedExtent,
    Extent,
    FileError,
    ImageFormatError,
    SnapshotAccess,
    SnapshotInfo,
    SnapshotNotFound,
)
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader, judge_active_l1
from qcow2snap.block.qcow2.l1 import read_l1
from qcow2snap.block.qcow2.snapshot_table import SnapshotTable, TableEntry, read_snapshot_table

if TYPE_CHECKING:
    from qcow2snap.block.qcow2.changes import Comparison, State
    from qcow2snap.block.qcow2.l2_changes import TableChanges
    from qcow2snap.block.qcow2.view import Image, L1Table, View

TABLE_CACHE_SIZE = 32 << 20  # bytes of decoded L2 tables: 1 GiB of badly fragmented tables is about 16 MiB
CLUSTER_CACHE_SIZE = 32 << 20  # bytes of decompressed clusters
L1_CACHE_SIZE = 64 << 20  # bytes; the largest L1 table takes 48 MiB


class Qcow2Node(BlockNode, SnapshotAccess):
    """The active disk of a qcow2 image, with access to its snapshots.

    size     the virtual disk size of the header
    threads  any; tables and clusters that one has decoded serve all
    errors   ImageFormatError when built, for a header that cannot be read; and when read. Damage of the snapshot table
             is no error but `snapshot_table.damage`
    owns     file, data_file and backing: they are closed with it
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
    ) -> None:
        self.file = file
        self.header = header
        self.size = header.size
        self.data_file = data_file
        self.backing = backing
        self._has_children = has_children
        self._table_cache_size = table_cache_size
        self._cluster_cache_size = cluster_cache_size
        self._comparisons: BoundedCache[tuple[SnapshotInfo | None, ...], Comparison] = BoundedCache(L1_CACHE_SIZE)
        self._changed_tables: BoundedCache[tuple[int, int], TableChanges] = BoundedCache(table_cache_size)
        self._views: BoundedCache[int, View] = BoundedCache(L1_CACHE_SIZE)  # by position in the table; -1: active

    @property
    def filename(self) -> str:
        return self.file.filename

    @cached_property
    def snapshot_table(self) -> SnapshotTable:
        """The table as far as it can be read."""
        table = read_snapshot_table(self.file, self.header)
        if table.damage is not None:
            table.damage.filename = self.filename
        return table

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

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        return self.view(None).block_status(offset, length, want_zero=want_zero)

    def prefetch(self, offset: int, length: int) -> None:
        self.view(None).prefetch(offset, length)

    def close(self) -> None:
        if "_image" in self.__dict__:  # something was read
            self._image.compressed.close()
        for node in (self.backing, self.data_file, self.file):
            if node is not None:
                node.close()

    # -- SnapshotAccess -----------------------------------------------------------------------------------------------

    def snapshots(self) -> Sequence[SnapshotInfo]:
        return [entry.info for entry in self.snapshot_table.entries]

    def preadv_snapshot(self, snapshot: SnapshotInfo, offset: int, buffers: Sequence[Buffer]) -> None:
        self.view(snapshot).preadv(offset, buffers)

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

    def vm_state(self, snapshot: SnapshotInfo) -> View:
        from qcow2snap.block.qcow2.view import View

        if not snapshot.vm_state_size:
            raise SnapshotNotFound(f"{self.filename}: snapshot {snapshot} has no VM state")
        # Its place follows from the snapshot's own size; a backing file has nothing to say there.
        return View(
            self._image,
            self.l1_table(snapshot),
            start=self.header.vm_state_offset(snapshot.size),
            size=snapshot.vm_state_size,
            has_backing=False,
        )

    # -- views --------------------------------------------------------------------------------------------------------

    def view(self, snapshot: SnapshotInfo | None) -> View:
        """The disk of a snapshot, or the active disk. Kept, since each small read asks for it."""
        position = -1 if snapshot is None else self._entry(snapshot).info.position
        view = self._views.get(position)
        if view is None:
            from qcow2snap.block.qcow2.view import View

            l1 = self.l1_table(snapshot)
            size = self.size if snapshot is None else snapshot.size
            view = View(self._image, l1, start=0, size=size, has_backing=True)
            self._views.put(position, view, l1.nbytes)
        return view

    def l1_table(self, snapshot: SnapshotInfo | None) -> L1Table:
        """The L1 table of a snapshot, or of the active disk. Read anew."""
        from qcow2snap.block.qcow2.view import load_l1

        with self._naming_the_file():
            return load_l1(self.file, *self._l1_place(snapshot))

    def _l1_place(self, snapshot: SnapshotInfo | None) -> tuple[int, int]:
        """Host offset and number of entries of an L1 table, judged."""
        if snapshot is None:
            judge_active_l1(self.header)
            return self.header.l1_table_offset, self.header.l1_size
        entry = self._entry(snapshot)
        _judge_l1(entry, self.header)
        return entry.l1_table_offset, entry.l1_size

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Around what reads tables: an error says which file it is about."""
        try:
            yield
        except ImageFormatError as error:
            error.filename = self.filename
            raise

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
            with self._naming_the_file():
                comparison = Comparison(shared, self._state(since), self._state(state))
            if is_stable:
                self._comparisons.put(pair, comparison, comparison.nbytes)
        return comparison

    def _state(self, snapshot: SnapshotInfo | None) -> State:
        from qcow2snap.block.qcow2.changes import State

        size = self.size if snapshot is None else snapshot.size
        return State(size, read_l1(self.file, *self._l1_place(snapshot)), partial(self.view, snapshot))

    def _confirm(self, *states: SnapshotInfo | None) -> Callable[[], None]:
        def confirm() -> None:
            for snapshot in states:
                if snapshot is not None:
                    self.confirm_snapshot(snapshot)

        return confirm

    def _entry(self, snapshot: SnapshotInfo) -> TableEntry:
        entries = self.snapshot_table.entries
        if snapshot.position < len(entries) and entries[snapshot.position].info == snapshot:
            return entries[snapshot.position]
        raise SnapshotNotFound(f"{self.filename}: snapshot {snapshot} is not in the table")

    @cached_property
    def _image(self) -> Image:
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


def _judge_l1(entry: TableEntry, header: ImageHeader) -> None:
    """The rules for a snapshot's L1 table; those for the active one are the header's."""
    offset, where = entry.l1_table_offset, entry.info.host_offset
    if offset % header.cluster_size:
        what = f"the L1 table of snapshot {entry.info} is at {offset:#x}, not a cluster boundary"
        raise rules.SNAPSHOT_L1_OFFSET.broken(where, what)
    if entry.l1_size * 8 > layout.MAX_L1_TABLE_SIZE:
        what = f"the L1 table of snapshot {entry.info} has {entry.l1_size} entries, more than 32 MiB"
        raise rules.SNAPSHOT_L1_OFFSET.broken(where + 8, what)
