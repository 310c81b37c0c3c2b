"""The Python API: an image, its active disk, its snapshots, and each of them as a file. Friendlier names for block/."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING

from qcow2snap.block.graph import OpenOptions, open_image
from qcow2snap.block.node import BlockNode, ChangedExtent, Extent, SnapshotInfo
from qcow2snap.block.qcow2.driver import TABLE_CACHE_SIZE
from qcow2snap.block.snapshot_access import SnapshotAccessNode

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from qcow2snap.block.qcow2.driver import Qcow2Node
    from qcow2snap.conformance.usage import ImageUsage


def open(  # noqa: A001  # as in tarfile, zipfile and wave
    filename: str | os.PathLike[str],
    *,
    force_share: bool = False,
    allow_paths: Sequence[str] = (),
    l2_cache_size: int = TABLE_CACHE_SIZE,
) -> Image:
    """Open a qcow2 image for reading.

    force_share    read it although a VM has it open; snapshots are read right, or raise SnapshotGone once they are
                   deleted; the active disk is changing
    allow_paths    directories whose files the image may name as backing or data file, besides its own directory
    l2_cache_size  bytes of decoded L2 tables to keep
    Raises ImageFormatError, UnsupportedFeature, ImageInUse, ReferenceRefused, FileError.
    """
    node = open_image(os.fspath(filename), OpenOptions(force_share, tuple(allow_paths), l2_cache_size))
    for warning in node.warnings:
        warnings.warn(f"{node.filename}: {warning}", stacklevel=2)
    return Image(node)


class Disk:
    """Something that reads like a disk: the active disk, or a snapshot."""

    def __init__(self, node: BlockNode) -> None:
        self.node = node

    @property
    def size(self) -> int:
        """Bytes."""
        return self.node.size

    def open(self) -> io.RawIOBase:
        """As a file: seekable, read-only, for any thread. Wrap it in io.BufferedReader for small reads."""
        return NodeFile(self.node)

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """What is known of a range without reading it; by default of all from `offset` on."""
        return self.node.block_status(offset, self.size - offset if length is None else length)


class Snapshot(Disk):
    """One snapshot, with its own size."""

    def __init__(self, image: Qcow2Node, info: SnapshotInfo) -> None:
        super().__init__(SnapshotAccessNode(image, info))
        self.info = info
        self._image = image

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def vm_state_size(self) -> int:
        """Bytes; 0 if no VM state was saved."""
        return self.info.vm_state_size

    @property
    def date_sec(self) -> int:
        return self.info.date_sec

    @property
    def date_nsec(self) -> int:
        return self.info.date_nsec

    @property
    def vm_clock_nsec(self) -> int:
        return self.info.vm_clock_nsec

    @property
    def icount(self) -> int | None:
        return self.info.icount

    def open_vm_state(self) -> io.RawIOBase:
        """The VM state as a file. None was saved: SnapshotNotFound."""
        return NodeFile(self._image.vm_state(self.info))

    def __repr__(self) -> str:
        return f"<Snapshot id={self.id!r} name={self.name!r} size={self.size}>"


class Image:
    """An open qcow2 image. Use it in a `with` statement, or close() it; files opened from it end with it."""

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.active = Disk(node)

    @property
    def size(self) -> int:
        """Of the active disk, in bytes."""
        return self.node.size

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """All that can be read, in the order of the image's table."""
        return tuple(Snapshot(self.node, info) for info in self.node.snapshots())

    def snapshot(self, ref: str) -> Snapshot:
        """By NAME, name=NAME, id=ID, or id=ID,name=NAME. Raises SnapshotNotFound, SnapshotAmbiguous."""
        return Snapshot(self.node, self.node.find_snapshot(ref))

    def diff(self, since: str, state: str | None = None, *, verify: bool = False) -> Iterator[ChangedExtent]:
        """What may differ between two snapshots, or a snapshot and the active disk, by the tables: no data is read.

        With `verify` what was written again with the same bytes is left out, for which both are read.
        """
        older = self.snapshot(since)
        newer = None if state is None else self.snapshot(state)
        changes = self.node.changes(older.info, None if newer is None else newer.info)
        if not verify:
            return changes
        from qcow2snap.forensics.diff import verified

        unit = self.node.header.subcluster_size
        return verified(changes, older.node, self.node if newer is None else newer.node, unit)

    def usage(self) -> ImageUsage:
        """The bytes that the active disk and each snapshot refer to, share, and have alone. Reads the L2 tables."""
        from qcow2snap.conformance.usage import usage_of

        return usage_of(self.node)

    def refresh(self) -> bool:
        """Look for snapshots that were made or deleted since; tells whether there are any. For `force_share`."""
        return self.node.refresh()

    def close(self) -> None:
        self.node.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class NodeFile(io.RawIOBase):
    """A node as a file. Its only state is the position: each read takes its range and moves on in one step.

    Threads that seek want a file each, or pread().
    """

    def __init__(self, node: BlockNode) -> None:
        self._node = node
        self._position = 0
        self._lock = Lock()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._check_open()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._node.size}.get(whence)
        if base is None:
            raise ValueError(f"whence {whence} is not 0, 1 or 2")
        if base + offset < 0:
            raise ValueError(f"position {base + offset} is before the start")
        with self._lock:
            self._position = base + offset
            return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill the buffer, less only at the end."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        with self._lock:
            start = self._position
            count = max(0, min(len(view), self._node.size - start))
            self._position = start + count
        if count:
            self._node.preadv(start, [view[:count]])
        return count

    def readall(self) -> bytes:
        self._check_open()
        rest = max(0, self._node.size - self._position)
        buffer = bytearray(rest)
        self.readinto(buffer)
        return bytes(buffer)

    def write(self, data: ReadableBuffer, /) -> int:
        raise io.UnsupportedOperation("a disk in an image is read-only")

    def pread(self, length: int, offset: int) -> bytes:
        """Bytes at an offset, whatever the position is: for threads that share a file. Short at the end."""
        self._check_open()
        count = min(length, self._node.size - offset)
        return self._node.pread(offset, count) if count > 0 else b""

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
