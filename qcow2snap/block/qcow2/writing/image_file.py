"""The file of an image that is written: it grows as clusters are allocated at its end. Knows nothing of clusters."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Self

from qcow2snap.block.file import FileNode, Locking
from qcow2snap.block.image_lock import lock_for_resizing
from qcow2snap.block.node import Buffer, NoSpace
from qcow2snap.block.writable_file import WritableFileNode


class ImageFile(WritableFileNode):
    """A file of the host that grows when it is written beyond its end. A block device does not: NoSpace.

    size    bytes, now
    errors  as WritableFileNode; with QEMU's locks of a writer that resizes
    """

    def __init__(self, filename: str, *, locking: Locking = Locking.DATA) -> None:
        self._growing = Lock()  # over size
        super().__init__(filename, locking=locking)

    @classmethod
    def of(cls, file: FileNode) -> Self:
        """A second way into a file that is open, and locked by whoever opened it."""
        made = cls(f"/proc/self/fd/{file.fileno()}", locking=Locking.NONE)
        made.filename = file.filename
        return made

    def _lock(self, locking: Locking) -> bool:
        if locking is not Locking.NONE:
            lock_for_resizing(self._fd, self.filename)
        return False

    def check_range(self, offset: int, length: int) -> None:
        if self.is_block_device and offset + length > self.size:
            raise NoSpace(f"{self.filename}: {length} bytes at {offset:#x} do not fit on the device")

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Past the end are zeros: clusters there are allocated, but were not written to their end."""
        self.preadv_available(offset, buffers)

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        super().pwritev(offset, buffers)
        end = offset + sum(map(len, buffers))
        if end > self.size:
            with self._growing:
                self.size = max(self.size, end)

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        """Past the end there is nothing to do but to grow: fallocate() would keep the size."""
        inside = max(0, min(length, self.size - offset))
        if inside:
            super().pwrite_zeroes(offset, inside, may_unmap=may_unmap, no_fallback=no_fallback)
        if inside < length:
            self.pwritev(offset + length - 1, [memoryview(b"\0")])
