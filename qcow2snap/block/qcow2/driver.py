"""The qcow2 driver: an image as a node, its snapshots, and the VM states saved with them. Reads; never writes.

Importing this and reading header and snapshot table stays cheap; numpy and the codecs come with the first read of data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from formats import qcow2 as layout
from formats.qcow2 import CryptMethod, IncompatibleFeature
from qcow2snap.block.file import FileNode
from qcow2snap.block.lru import BoundedCache
from qcow2snap.block.node import (
    BlockNode,
    Buffer,
    Extent,
    FileError,
    ImageFormatError,
    SnapshotAccess,
    SnapshotInfo,
    SnapshotNotFound,
)
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.snapshot_table import SnapshotTable, TableEntry, read_snapshot_table

if TYPE_CHECKING:
    from qcow2snap.block.qcow2.view import Image, L1Table, View

TABLE_CACHE_SIZE = 32 << 20  # bytes of decoded L2 tables: 1 GiB of badly fragmented tables is about 16 MiB
CLUSTER_CACHE_SIZE = 32 << 20  # bytes of decompressed clusters
L1_CACHE_SIZE = 40 << 20  # bytes; the largest L1 table takes 48 MiB and is then read again for each request


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
        self._l1_tables: BoundedCache[tuple[int, int], L1Table] = BoundedCache(L1_CACHE_SIZE)

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
                f"{read + 1} on: {self.snapshot_table.damage}"
            )
        return found

    # -- BlockNode ----------------------------------------------------------------------------------------------------

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.active_view().preadv(offset, buffers)

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        return self.active_view().block_status(offset, length, want_zero=want_zero)

    def close(self) -> None:
        for node in (self.backing, self.data_file, self.file):
            if node is not None:
                node.close()

    # -- SnapshotAccess -----------------------------------------------------------------------------------------------

    def snapshots(self) -> Sequence[SnapshotInfo]:
        return [entry.info for entry in self.snapshot_table.entries]

    def preadv_snapshot(self, snapshot: SnapshotInfo, offset: int, buffers: Sequence[Buffer]) -> None:
        self.snapshot_view(snapshot).preadv(offset, buffers)

    def snapshot_block_status(
        self, snapshot: SnapshotInfo, offset: int, length: int, *, want_zero: bool = True
    ) -> Iterator[Extent]:
        return self.snapshot_view(snapshot).block_status(offset, length, want_zero=want_zero)

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

    def active_view(self) -> View:
        from qcow2snap.block.qcow2.view import View

        return View(self._image, self.l1_table(None), start=0, size=self.size, has_backing=True)

    def l1_table(self, snapshot: SnapshotInfo | None) -> L1Table:
        """The L1 table of a snapshot, or of the active disk."""
        if snapshot is None:
            return self._l1(self.header.l1_table_offset, self.header.l1_size)
        return self._snapshot_l1(self._entry(snapshot))

    def snapshot_view(self, snapshot: SnapshotInfo) -> View:
        from qcow2snap.block.qcow2.view import View

        return View(self._image, self.l1_table(snapshot), start=0, size=snapshot.size, has_backing=True)

    def _entry(self, snapshot: SnapshotInfo) -> TableEntry:
        entries = self.snapshot_table.entries
        if snapshot.position < len(entries) and entries[snapshot.position].info == snapshot:
            return entries[snapshot.position]
        raise SnapshotNotFound(f"{self.filename}: snapshot {snapshot} is not in the table")

    def _snapshot_l1(self, entry: TableEntry) -> L1Table:
        offset, nb_entries = entry.l1_table_offset, entry.l1_size
        try:
            if offset % self.header.cluster_size:
                raise rules.SNAPSHOT_L1_OFFSET.broken(
                    entry.info.host_offset,
                    f"the L1 table of snapshot {entry.info} is at {offset:#x}, not a cluster boundary",
                )
            if nb_entries * 8 > layout.MAX_L1_TABLE_SIZE:
                raise rules.SNAPSHOT_L1_OFFSET.broken(
                    entry.info.host_offset + 8,
                    f"the L1 table of snapshot {entry.info} has {nb_entries} entries, more than 32 MiB",
                )
        except ImageFormatError as error:
            error.filename = self.filename
            error.guest_range = (0, entry.info.size)
            raise
        return self._l1(offset, nb_entries)

    def _l1(self, host_offset: int, nb_entries: int) -> L1Table:
        from qcow2snap.block.qcow2.view import load_l1

        key = (host_offset, nb_entries)
        l1 = self._l1_tables.get(key)
        if l1 is None:
            try:
                l1 = load_l1(self.file, host_offset, nb_entries)
            except ImageFormatError as error:
                error.filename = self.filename
                raise
            self._l1_tables.put(key, l1, l1.nbytes)
        return l1

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
