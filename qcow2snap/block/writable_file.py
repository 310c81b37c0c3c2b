"""A regular file or block device of the host that is written, too (QEMU block/file-posix.c). Its size is fixed."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from functools import cache

from qcow2snap.block.file import IOV_MAX, FileNode, Locking, file_error
from qcow2snap.block.image_lock import lock_for_writing
from qcow2snap.block.node import Buffer, FileError, NotSupported

_ZEROS = bytes(1 << 20)  # written at a time where nothing faster makes zeros

# linux/falloc.h; the size of the file never changes.
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02 | _KEEP_SIZE
_ZERO_RANGE = 0x10 | _KEEP_SIZE

# What fallocate says of what the file system, or the device for this range, does not have.
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL)


class WritableFileNode(FileNode):
    """A file of the host, for reading and writing.

    stable   never: it is written through us, so its pages must not be handed on by reference
    threads  any; of writes that overlap and are under way at once, any may be the last
    errors   FileError, NoSpace; ImageInUse when opened: with QEMU's lock of a writer, nobody else writes or resizes it
    """

    read_only = False
    _ACCESS = os.O_RDWR

    def __init__(self, filename: str, *, locking: Locking = Locking.DATA) -> None:
        self._lost = False  # a write that was acknowledged never reached the disk
        super().__init__(filename, locking=locking)

    def _lock(self, locking: Locking) -> bool:
        if locking is not Locking.NONE:
            lock_for_writing(self._fd, self.filename)
        return False

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        remaining = sum(map(len, buffers))
        self.check_range(offset, remaining)
        while remaining:  # as a rule once
            try:
                count = os.pwritev(self._fd, buffers[:IOV_MAX], offset)
            except OSError as error:
                raise file_error(f"{self.filename}: write at byte {offset:#x}", error) from None
            offset += count
            remaining -= count
            if remaining:
                buffers = _behind(count, buffers)

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        self.check_range(offset, length)
        if not length:
            return
        if may_unmap and self._fallocate(_PUNCH_HOLE, offset, length):
            return
        # A device may zero a range by writing it, without saying so.
        may_be_slow = self.is_block_device and no_fallback
        if not may_be_slow and self._fallocate(_ZERO_RANGE, offset, length):
            return
        if no_fallback:
            raise NotSupported(f"{self.filename}: zeros can only be written here, which is not fast")
        for start in range(offset, offset + length, len(_ZEROS)):
            self.pwritev(start, [memoryview(_ZEROS)[: offset + length - start]])

    def pdiscard(self, offset: int, length: int) -> None:
        self.check_range(offset, length)
        if length:
            self._fallocate(_PUNCH_HOLE, offset, length)  # a hint: where there are no holes, nothing is to be done

    def flush(self) -> None:
        """Make what was written durable.

        After a failure the kernel may have forgotten what it could not write, and would call the next flush a success:
        so none succeeds any more (as in QEMU).
        """
        if self._lost:
            raise FileError(f"{self.filename}: earlier writes were lost; nothing can be made durable any more")
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._lost = True
            raise file_error(f"{self.filename}: flush", error) from None

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Whether the file system did it. What it does not have is no error."""
        error = _linux_fallocate()(self._fd, mode, offset, length)
        while error == errno.EINTR:
            error = _linux_fallocate()(self._fd, mode, offset, length)
        if error and error not in _CANNOT:
            raise file_error(f"{self.filename}: write at byte {offset:#x}", OSError(error, ""))
        return not error


def _behind(count: int, buffers: Sequence[Buffer]) -> list[memoryview]:
    """What is left of buffers without their first `count` bytes."""
    views = []
    for buffer in buffers:
        view = memoryview(buffer)
        if count < len(view):
            views.append(view[count:])
        count = max(0, count - len(view))
    return views


@cache
def _linux_fallocate() -> Callable[[int, int, int, int], int]:
    """fallocate(2), which Python lacks: os.posix_fallocate has no modes. Returns 0 or an error's number."""
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or library.fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        return ctypes.get_errno() if function(fd, mode, offset, length) else 0

    return fallocate
