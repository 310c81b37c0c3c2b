"""The file of an image that is written: it grows as clusters are allocated at its end. Knows nothing of clusters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from threading import Lock
from typing import Self

from qcow2snap.block.file import IOV_MAX, FileNode, Locking, file_error
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
        length = sum(map(len, buffers))
        if not self._writes_at_once(offset, buffers, length):
            super().pwritev(offset, buffers)  # all of it again, in pieces, or with the error
        end = offset + length
        if end > self.size:
            with self._growing:
                self.size = max(self.size, end)

    def _writes_at_once(self, offset: int, buffers: Sequence[Buffer], length: int) -> bool:
        """What nearly every write is: one call that writes all. It takes half of the time, which is 2 µs of 4 KiB."""
        if self.is_block_device or len(buffers) > IOV_MAX:
            return False
        try:
            return os.pwritev(self._fd, buffers, offset) == length
        except OSError:
            return False

    def grow(self, size: int) -> None:
        """Have at least so many bytes; what is new reads as zeros."""
        with self._growing:
            if size > self.current_size():
                self.check_range(0, size)
                try:
                    os.ftruncate(self._fd, size)
                except OSError as error:
                    raise file_error(f"{self.filename}: growing to {size} bytes", error) from None
            self.size = max(self.size, size)

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        """Past the end there is nothing to do but to grow: fallocate() would keep the size."""
        inside = max(0, min(length, self.size - offset))
        if inside:
            super().pwrite_zeroes(offset, inside, may_unmap=may_unmap, no_fallback=no_fallback)
        if inside < length:
            self.pwritev(offset + length - 1, [memoryview(b"\0")])
