"""A regular file or block device of the host as a node. Opened read-only; knows nothing of what is in it.

Writing is `writable_file`'s.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import Enum

from qcow2snap.block.image_lock import lock_for_reading
from qcow2snap.block.node import BlockNode, Buffer, Extent, FileError, NoSpace, Status

IOV_MAX = 1024  # buffers that one preadv or pwritev takes
_UNCHECKED = 2 << 20  # bytes that may be asked for without a look at what there is
_LAST_OFFSET = (1 << 63) - (4 << 20)  # what the kernel takes as an offset, with a cluster behind it


class Locking(Enum):
    """Which of QEMU's image locks a file is opened with."""

    NONE = "none"  # -U/--force-share
    METADATA = "metadata"  # nobody may write meanwhile
    DATA = "data"  # nor forbid reading


class FileNode(BlockNode):
    """A file of the host.

    size     bytes, when it was opened; what has grown since can be read with pread_available
    stable   we hold QEMU's lock, so nobody that honours it writes; pages may be handed on by reference
    errors   FileError; ImageInUse when opened
    """

    _ACCESS = os.O_RDONLY
    _nowait = os.RWF_NOWAIT

    def __init__(self, filename: str, *, locking: Locking = Locking.DATA) -> None:
        self.filename = filename
        self._fd = _open(filename, self._ACCESS)
        try:
            status = os.fstat(self._fd)
            self.identity = (status.st_dev, status.st_ino)
            self.is_block_device = stat.S_ISBLK(status.st_mode)
            if not (stat.S_ISREG(status.st_mode) or self.is_block_device):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file or block device"
                raise FileError(f"{filename}: is {kind}; give a disk image")
            self.size = self.current_size()
            self.set_stable(self._lock(locking))
        except OSError as error:
            os.close(self._fd)
            raise file_error(filename, error) from None
        except BaseException:
            os.close(self._fd)
            raise

    def set_stable(self, stable: bool) -> None:
        """Whether nobody can write the file from now on."""
        self.stable = stable
        # What others write past the page cache, asynchronously, does not show in a block device's: it is dropped before
        # each read. So nobody may read past this node, and no extent shows its file. Where we write, nobody else does.
        self.drops_cache = self.is_block_device and self.read_only and not stable

    def _lock(self, locking: Locking) -> bool:
        """Whether the file cannot change while it is open."""
        if locking is Locking.NONE:
            return False
        return lock_for_reading(self._fd, self.filename, data=locking is Locking.DATA)

    def fileno(self) -> int:
        return self._fd

    def current_size(self) -> int:
        """Bytes that the file has now; an image in use may have grown since it was opened."""
        try:
            return os.lseek(self._fd, 0, os.SEEK_END) if self.is_block_device else os.fstat(self._fd).st_size
        except OSError as error:
            raise file_error(self.filename, error) from None

    def allocated_size(self) -> int:
        """Bytes that the file takes on its file system."""
        return os.fstat(self._fd).st_blocks * 512

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        length = sum(map(len, buffers))
        self.check_range(offset, length)
        if len(buffers) == 1 and not self.drops_cache:  # as a rule that is all of it, by one call
            try:
                if os.preadv(self._fd, buffers, offset) == length:
                    return
            except OSError as error:
                raise file_error(f"{self.filename}: read at byte {offset:#x}", error) from None
        missing = self.preadv_available(offset, buffers)
        if missing:
            raise FileError(f"{self.filename}: {missing} bytes are missing; the file was cut while it was read")

    def preadv_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        """What is in the page cache; all of it where the file system cannot tell."""
        length = sum(map(len, buffers))
        self.check_range(offset, length)
        if self.drops_cache:
            return False
        try:
            return os.preadv(self._fd, buffers[:IOV_MAX], offset, self._nowait) == length
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._nowait = 0
            return False

    def preadv_available(self, offset: int, buffers: Sequence[Buffer]) -> int:
        """Fill the buffers as far as the file reaches, the rest with zeros; returns the number of these zeros."""
        views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        if self.drops_cache:
            self._drop_cache(offset, sum(map(len, views)))
        while views:
            try:
                count = os.preadv(self._fd, views[:IOV_MAX], offset)
            except OSError as error:
                raise file_error(f"{self.filename}: read at byte {offset:#x}", error) from None
            if count == 0:
                break
            offset += count
            while count:
                taken = min(count, len(views[0]))
                views[0] = views[0][taken:]
                count -= taken
                if not views[0]:
                    del views[0]
        for view in views:
            view[:] = bytes(len(view))
        return sum(map(len, views))

    def prefetch(self, offset: int, length: int) -> None:
        """Have the kernel begin to read a range that is not in the page cache."""
        with suppress(OSError):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def pread_available(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`, fewer where the file ends. Allocates no more than there is, or 2 MiB."""
        if length > _UNCHECKED or offset > _LAST_OFFSET:
            length = min(length, max(0, self.current_size() - offset))
        if self.drops_cache:
            self._drop_cache(offset, length)
        data = b""
        while len(data) < length:
            try:
                more = os.pread(self._fd, length - len(data), offset + len(data))
            except OSError as error:
                raise file_error(f"{self.filename}: read at byte {offset:#x}", error) from None
            if not more:
                break
            data = data + more if data else more
        return data

    def _drop_cache(self, offset: int, length: int) -> None:
        """Make the next read of a range see what is on the device."""
        start = offset - offset % mmap.PAGESIZE
        os.posix_fadvise(self._fd, start, offset + length - start + mmap.PAGESIZE, os.POSIX_FADV_DONTNEED)

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        """Holes of the file as zeros, found with SEEK_DATA where it has that (QEMU raw_co_block_status)."""
        self.check_range(offset, length)
        end = offset + length
        while offset < end:
            is_hole, stop = self.hole_or_data(offset) if want_zero else (False, end)
            stop = min(stop, end)
            status = (Status.ZERO if is_hole else Status.DATA) | Status.ALLOCATED
            yield Extent(offset, stop - offset, status, 0, None if self.drops_cache else self, offset)
            offset = stop

    def is_zero_fast(self, offset: int, length: int) -> bool:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            return error.errno == errno.ENXIO  # a hole to the end of the file

    def hole_or_data(self, offset: int) -> tuple[bool, int]:
        """Whether `offset` is in a hole of the file, and where that hole or data ends. Past the end is a hole."""
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
            if data > offset:
                return True, data
            return False, os.lseek(self._fd, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return True, max(self.current_size(), offset + 1) if offset < self.size else 1 << 63
            return False, 1 << 63  # no such call here: it is all data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(filename: str, access: int) -> int:
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        return os.open(filename, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise file_error(filename, error) from None
    except ValueError:  # a NUL byte in the name
        raise FileError(f"{filename!r}: not a file name") from None


def file_error(what: str, error: OSError) -> FileError:
    """The operating system's refusal as one of ours."""
    kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else FileError
    return kind(f"{what}: {os.strerror(error.errno or errno.EIO)}")
