"""One snapshot of a driver with SnapshotAccess, as an ordinary read-only node. Knows no driver."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcow2snap.block.node import BlockNode, Buffer, ChangedExtent, ChangeTracking, Extent, SnapshotAccess, SnapshotInfo


class SnapshotAccessNode(BlockNode, ChangeTracking):
    """One snapshot of `file`, as an ordinary read-only node.

    size     the snapshot's own, in bytes; not that of the active disk
    threads  any, at any time; nothing changes after construction
    errors   SnapshotNotFound, SnapshotAmbiguous when built from a reference; when read, ImageFormatError,
             SnapshotGone if the snapshot was deleted meanwhile, or AccessDenied
    owns     nothing: `file` stays open when this node is closed
    source   QEMU block/snapshot-access.c, which takes no snapshot's name and has no size of its own
    """

    def __init__(self, file: SnapshotAccess, snapshot: SnapshotInfo | str | None = None) -> None:
        """Without `snapshot`: the only one that there is."""
        self.file = file
        self.snapshot = snapshot if isinstance(snapshot, SnapshotInfo) else file.find_snapshot(snapshot)
        self.size = self.snapshot.size
        self.nb_backing = file.nb_backing if isinstance(file, BlockNode) else 0
        self.must_confirm = file.must_confirm_snapshots
        self.status_may_change = file.snapshot_status_may_change
        file.attach_reader(self, self.snapshot)

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.file.preadv_snapshot(self.snapshot, offset, buffers)

    def preadv_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        return self.file.preadv_snapshot_nowait(self.snapshot, offset, buffers)

    def preadv_unconfirmed(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.file.preadv_snapshot_unconfirmed(self.snapshot, offset, buffers)

    def confirm(self) -> None:
        self.file.confirm_snapshot(self.snapshot)

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        return self.file.snapshot_block_status(self.snapshot, offset, length, want_zero=want_zero)

    def prefetch(self, offset: int, length: int) -> None:
        self.file.prefetch_snapshot(self.snapshot, offset, length)

    def pdiscard(self, offset: int, length: int) -> None:
        self.check_range(offset, length)
        self.file.pdiscard_snapshot(self.snapshot, offset, length)

    def changes_since(self, since: SnapshotInfo, offset: int, length: int) -> Iterator[ChangedExtent]:
        self.check_range(offset, length)
        return self.file.changes(since, self.snapshot, offset, length)

    def close(self) -> None:
        self.file.detach_reader(self)
