"""The interface of every driver, and the values and errors they exchange. Imports no driver.

Words and ideas are those of QEMU's block layer (include/block/block_int-common.h). All offsets and lengths are
bytes on the guest's side of a node, unless a name says `host_` or `file_`. Calls are synchronous; a node may be used
from any number of threads at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum, IntFlag
from typing import NamedTuple, NoReturn, Protocol, TypeVar

# What preadv fills. Writable and contiguous, whatever its type: bytearray, memoryview, mmap, a numpy array.
Buffer = bytearray | memoryview


class Status(IntFlag):
    """What is known about an extent; the meanings are those of QEMU's BDRV_BLOCK_* flags."""

    DATA = 1 << 0  # the bytes have to be read
    ZERO = 1 << 1  # the bytes read as zeros; together with DATA: space is allocated, and is a hole of the host file
    ALLOCATED = 1 << 2  # the layer `depth` decides what is read here, not a layer below it
    COMPRESSED = 1 << 3  # stored compressed


class HostFile(Protocol):
    """A file of the host in which an extent's bytes lie verbatim."""

    filename: str
    # Nobody can write it while it is open. So its pages may be handed on by reference, and on a read-only node where a
    # guest's bytes lie in it may be remembered. A node whose mapping changes must not show stable files.
    stable: bool

    def fileno(self) -> int: ...


class Extent(NamedTuple):
    """A run of guest bytes with one status.

    Where `file` is set, the bytes lie verbatim in it from `file_offset` on (an allocated zero extent has them too,
    but they are not to be read). `depth` counts backing files: 0 is the image itself.
    """

    offset: int
    length: int
    status: Status
    depth: int = 0
    file: HostFile | None = None
    file_offset: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def must_read(self) -> bool:
        """The bytes are not known to be zeros."""
        return int.__and__(self.status, 3) == 1  # DATA and not ZERO; a flag's own & costs ten times as much


class Change(Enum):
    """How bytes differ between two states of a disk."""

    DATA = "data"  # other bytes
    BECAME_ZERO = "became-zero"  # zeros now
    WAS_ZERO = "was-zero"  # zeros then
    SIZE = "size"  # beyond the end of one of the two


class ChangedExtent(NamedTuple):
    """A run of guest bytes that may differ between two states, in one way."""

    offset: int
    length: int
    change: Change

    @property
    def end(self) -> int:
        return self.offset + self.length


E = TypeVar("E", Extent, ChangedExtent)


class SnapshotInfo(NamedTuple):
    """One snapshot, as the image's snapshot table describes it. Sizes in bytes; the size is the snapshot's own."""

    id: str
    name: str
    size: int
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    icount: int | None  # None: record/replay was off
    position: int = 0  # in the table
    host_offset: int = 0  # where the entry starts in the image file

    def __str__(self) -> str:
        return f'"{self.name}" (id {self.id})'


class BlockNode(ABC):
    """A disk, or what reads like one.

    size       bytes; fixed while the node is open
    read_only  whether the writing methods refuse
    threads    any, at any time
    errors     Qcow2SnapError and its kinds; never a short read
    """

    size: int
    read_only: bool = True
    nb_backing: int = 0  # nodes below it in its backing chain
    # Others may write the files meanwhile. Only such a node tells preadv_unconfirmed from preadv; its files are not
    # stable, but where block_status found bytes in them may be remembered, if each use is confirmed like a read.
    must_confirm: bool = False
    # What block_status says is true now, but its ranges may become unreadable: nothing of it may be remembered.
    status_may_change: bool = False

    @abstractmethod
    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill every buffer, in turn, from `offset` on. A range that leaves the node: OutOfRange."""

    @abstractmethod
    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        """The extents of a range, in order, without gap or overlap, neighbours of one kind merged.

        Without `want_zero` nothing is spent on finding holes of the host file inside allocated extents.
        """

    def is_zero_fast(self, offset: int, length: int) -> bool:
        """Whether a range is known to be zeros, from first to last; False also where telling that takes long."""
        return all(not extent.must_read for extent in self.block_status(offset, length))

    def preadv_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        """As preadv, if that takes no waiting for a disk or another machine. False: nothing is known of the buffers."""
        return False

    def preadv_unconfirmed(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """As preadv, but what the buffers hold then may only be used after a confirm(): one is enough for many reads.

        What it raises needs no confirmation.
        """
        self.preadv(offset, buffers)

    def confirm(self) -> None:
        """Return if all that was read unconfirmed before this call was right. Otherwise raise, as a rule SnapshotGone.

        That goes for copies only: pages that were handed on by reference may change after it. What preadv and
        block_status give is confirmed already.
        """

    def prefetch(self, offset: int, length: int) -> None:
        """Begin to bring a range nearer, without waiting (QEMU: BDRV_REQ_PREFETCH). A hint: no error, no promise."""

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._refuse_to_write()

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        """Make a range read as zeros; with `may_unmap` its space may be given back.

        With `no_fallback`, what could only be done by writing zeros is NotSupported instead, and changes nothing.
        """
        self._refuse_to_write()

    def pdiscard(self, offset: int, length: int) -> None:
        """Nobody needs the bytes of a range any more: its space may be given back, and what it reads as may change."""
        self._refuse_to_write()

    def flush(self) -> None:
        """Make what was written durable. Nothing to do where nothing can be written."""

    def close(self) -> None:
        """Give back what this node owns. Children that it did not open stay open."""

    def pread(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`. For metadata and small reads; preadv copies less."""
        buffer = bytearray(length)
        self.preadv(offset, [buffer])
        return bytes(buffer)

    def check_range(self, offset: int, length: int) -> None:
        """Raise OutOfRange unless offset..offset+length lies in this node."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRange(f"{length} bytes at {offset} reach beyond the end, which is at {self.size}")

    def _refuse_to_write(self) -> NoReturn:
        raise ReadOnly("this is read-only: it cannot be written")


class SnapshotAccess(ABC):
    """What a driver adds to BlockNode if it can show frozen states of its disk.

    QEMU's handlers of the same names (bdrv_co_preadv_snapshot and so on) know one snapshot; here each call names it.
    """

    must_confirm_snapshots: bool = False  # BlockNode.must_confirm of every snapshot
    snapshot_status_may_change: bool = False  # BlockNode.status_may_change of every snapshot

    @abstractmethod
    def snapshots(self) -> Sequence[SnapshotInfo]:
        """All snapshots that can be read, in the order of the driver's table."""

    def find_snapshot(self, ref: str | None = None) -> SnapshotInfo:
        """The snapshot that `ref` names: NAME, name=NAME, id=ID, or id=ID,name=NAME. None: the only one that there is.

        Raises SnapshotNotFound, or SnapshotAmbiguous where it fits more than one.
        """
        from qcow2snap.block.snapshot_ref import find  # the grammar and its messages fill a page of their own

        return find(self.snapshots(), ref)

    @abstractmethod
    def preadv_snapshot(self, snapshot: SnapshotInfo, offset: int, buffers: Sequence[Buffer]) -> None:
        """As BlockNode.preadv, of a snapshot. Beyond the snapshot's own size: OutOfRange."""

    def preadv_snapshot_nowait(self, snapshot: SnapshotInfo, offset: int, buffers: Sequence[Buffer]) -> bool:
        """As BlockNode.preadv_nowait, of a snapshot."""
        return False

    def preadv_snapshot_unconfirmed(self, snapshot: SnapshotInfo, offset: int, buffers: Sequence[Buffer]) -> None:
        """As BlockNode.preadv_unconfirmed, of a snapshot."""
        self.preadv_snapshot(snapshot, offset, buffers)

    def confirm_snapshot(self, snapshot: SnapshotInfo) -> None:
        """As BlockNode.confirm, of a snapshot."""

    def refresh(self) -> bool:
        """Look again which snapshots there are; tells whether they are others now. Nodes of the old ones stay right."""
        return False

    @abstractmethod
    def snapshot_block_status(
        self, snapshot: SnapshotInfo, offset: int, length: int, *, want_zero: bool = True
    ) -> Iterator[Extent]:
        """As BlockNode.block_status, of a snapshot."""

    def attach_reader(self, reader: object, snapshot: SnapshotInfo) -> None:
        """Know of somebody who reads a snapshot, until detach_reader or until there is no reference to him."""

    def detach_reader(self, reader: object) -> None:
        """He reads it no more."""

    def prefetch_snapshot(self, snapshot: SnapshotInfo, offset: int, length: int) -> None:
        """As BlockNode.prefetch, of a snapshot."""

    @abstractmethod
    def changes(
        self, since: SnapshotInfo | None, state: SnapshotInfo | None, offset: int = 0, length: int | None = None
    ) -> Iterator[ChangedExtent]:
        """What may differ in `state` from what it was in `since` (None: the active disk), in order, without overlap.

        Told by metadata, without reading: bytes that differ are always in it, but so may be bytes that were written
        again with what they were. The range is one of the larger of both, by default all from `offset` on.
        """

    def vm_state(self, snapshot: SnapshotInfo) -> BlockNode:
        """The VM state that was saved with a snapshot, as a read-only node. None was saved: SnapshotNotFound."""
        raise SnapshotNotFound(f"snapshot {snapshot} has no VM state")

    def pdiscard_snapshot(self, snapshot: SnapshotInfo, offset: int, length: int) -> None:
        """The reader needs this range no more. A driver whose snapshots are not the reader's to punch does nothing."""


class ChangeTracking(ABC):
    """What a node adds that knows of its bytes, without reading them, which were changed since when."""

    @abstractmethod
    def changes_since(self, since: SnapshotInfo, offset: int, length: int) -> Iterator[ChangedExtent]:
        """What may differ here from snapshot `since` of the same disk, as SnapshotAccess.changes tells it."""

    def dirty_bitmaps(self) -> Sequence[str]:
        """The names of the dirty bitmaps that the node has, and whose contents can be trusted."""
        return ()

    def dirty_extents(self, bitmap: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Offset and length of each run of bytes that is dirty, in order. BitmapNotFound says why there is no such."""
        raise BitmapNotFound(f'there is no dirty bitmap "{bitmap}" here')


class Qcow2SnapError(Exception):
    """The root of all errors raised on purpose: one line that says what, where, and what to do."""


class ImageFormatError(Qcow2SnapError):
    """The image breaks a rule of its format.

    rule         id of the rule, such as QCOW2-L2-003
    host_offset  byte offset in the file of what breaks it
    filename     the file, where known
    guest_range  offset and length of the guest bytes that cannot be read because of it, where known: whoever salvages
                 goes on behind them
    """

    def __init__(self, rule: str, host_offset: int, message: str) -> None:
        super().__init__(rule, host_offset, message)
        self.rule = rule
        self.host_offset = host_offset
        self.message = message
        self.filename = ""
        self.guest_range: tuple[int, int] | None = None

    @property
    def detail(self) -> str:
        """What and where in the file, for who has named the file already."""
        return f"{self.message} ({self.rule}, at byte {self.host_offset:#x})"

    def __str__(self) -> str:
        return f"{self.filename}: {self.detail}" if self.filename else self.detail


class UnsupportedFeature(Qcow2SnapError):
    """The image is sound as far as can be seen, but needs something that is not built."""


class SnapshotNotFound(Qcow2SnapError):
    """No snapshot fits the reference."""


class SnapshotAmbiguous(Qcow2SnapError):
    """More than one snapshot fits the reference."""


class SnapshotGone(Qcow2SnapError):
    """The snapshot was deleted while it was being read; whatever has its name now is another one."""


class AccessDenied(Qcow2SnapError):
    """A part of a snapshot that was not kept, or was given back, or all of one that was lost (EACCES)."""


class BitmapNotFound(Qcow2SnapError):
    """No dirty bitmap has that name, or the one that has does not know what is dirty."""


class ImageInUse(Qcow2SnapError):
    """Another process holds a lock that excludes ours."""


class ReferenceRefused(Qcow2SnapError):
    """The image names a file outside of what it may reach."""


class FileError(Qcow2SnapError):
    """The operating system refused: absent, no permission, an I/O error."""


class NoSpace(FileError):
    """A write found no room: the file system is full, or a quota or the size of a file is reached."""


class NotSupported(Qcow2SnapError):
    """The node cannot do what is asked in the way that is asked."""


class InvalidOption(Qcow2SnapError):
    """An option that there is not, that has no such value, or that does not go with others."""


class NodeNotFound(Qcow2SnapError):
    """No node of the graph has that name."""


class NodeInUse(Qcow2SnapError):
    """A node that others use cannot be deleted."""


class PermissionConflict(Qcow2SnapError):
    """What one user of a node would do, another one does not share."""


class OutOfRange(Qcow2SnapError):
    """A request reaches beyond the end of a node."""


class ReadOnly(Qcow2SnapError):
    """A write to what cannot be written."""


class NBDError(Qcow2SnapError):
    """The other side of an NBD connection broke the protocol, or said no."""


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Neighbours of one kind as one extent: same status, depth and file, and bytes that follow each other in it."""
    return coalesced(extents, _are_one)


def coalesced(extents: Iterable[E], are_one: Callable[[E, E], bool]) -> Iterator[E]:
    """Extents in order, those that follow each other as one where `are_one` says so of the last and the next."""
    last: E | None = None
    try:
        for extent in extents:
            if last is None:
                last = extent
            elif are_one(last, extent):
                last = last._replace(length=last.length + extent.length)
            else:
                yield last
                last = extent
    except Qcow2SnapError:  # what came before the damage is known all the same
        if last is not None:
            yield last
        raise
    if last is not None:
        yield last


def _are_one(last: Extent, following: Extent) -> bool:
    return (
        last.status == following.status
        and last.depth == following.depth
        and last.file is following.file
        and (last.file is None or last.file_offset + last.length == following.file_offset)
    )
