"""QEMU's image locks: the byte-range locks by which qemu-img, a running VM and we refuse each other.

QEMU block/file-posix.c: every permission has two bytes of the file. A read lock on byte 100 + p says "I use p", one on
byte 200 + p says "nobody else may use p"; both are open file description locks, and nothing is ever written there.
Whoever takes a lock then tests the opposite bytes, so that of two who start at once at least one backs off.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from enum import IntEnum

from qcow2snap.block.node import ImageInUse


class Permission(IntEnum):
    """QEMU's BLK_PERM_* (include/block/block-common.h), by bit number."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


_USED_BASE = 100
_UNSHARED_BASE = 200

# struct flock on 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for open file description locks).
_FLOCK = struct.Struct("hhxxxxqqixxxx")


def lock_for_reading(fd: int, filename: str, *, data: bool) -> bool:
    """Refuse writers and resizers for as long as `fd` is open, as qemu-img does; with `data`, also say that we read.

    Returns False where the file system has no such locks (QEMU goes on without them as well). Raises ImageInUse if
    somebody writes the image now.
    """
    used = [Permission.CONSISTENT_READ] if data else []
    return _lock_all(fd, filename, used, "stop it, or read the image as it is with -U/--force-share")


def lock_for_writing(fd: int, filename: str) -> bool:
    """Say that we read and write, and refuse other writers and resizers, as a running VM does. Else as for reading."""
    return _lock_all(fd, filename, [Permission.CONSISTENT_READ, Permission.WRITE], "stop it first")


def lock_for_resizing(fd: int, filename: str) -> bool:
    """As lock_for_writing, and say that the size changes, as QEMU does for the file of an image that can grow."""
    used = [Permission.CONSISTENT_READ, Permission.WRITE, Permission.RESIZE]
    return _lock_all(fd, filename, used, "stop it first")


def _lock_all(fd: int, filename: str, used: list[Permission], advice: str) -> bool:
    unshared = [Permission.WRITE, Permission.RESIZE]
    try:
        for permission in used:
            _lock(fd, _USED_BASE + permission)
        for permission in unshared:
            _lock(fd, _UNSHARED_BASE + permission)
        held = [p for p in used if _is_locked(fd, _UNSHARED_BASE + p)]
        held += [p for p in unshared if _is_locked(fd, _USED_BASE + p) and p not in held]
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            held = unshared
        elif error.errno in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        else:
            raise
    if held:
        use = " and ".join(p.name.lower().replace("_", " ") for p in held)
        raise ImageInUse(f'{filename}: in use by another process (it holds QEMU\'s "{use}" lock); {advice}')
    return True


def _lock(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def _is_locked(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


class ImageLock:
    """The locks on one open file, as many as its users need at a time (QEMU raw_handle_perm_lock).

    threads  one at a time
    owns     nothing: the locks end with the descriptor
    """

    def __init__(self, fd: int, filename: str) -> None:
        self._fd = fd
        self._filename = filename
        self._bytes: set[int] = set()

    def update(self, used: Iterable[Permission], unshared: Iterable[Permission]) -> bool:
        """Say what we do from now on, and what others must not. ImageInUse, and nothing is changed, if others object.

        Returns False where the file system has no such locks.
        """
        wanted = {_USED_BASE + p for p in used} | {_UNSHARED_BASE + p for p in unshared}
        try:
            for byte in wanted - self._bytes:
                _lock(self._fd, byte)
            for byte in sorted(wanted):
                opposite = (
                    byte - _USED_BASE + _UNSHARED_BASE if byte < _UNSHARED_BASE else byte - _UNSHARED_BASE + _USED_BASE
                )
                if _is_locked(self._fd, opposite):
                    raise self._in_use(byte)
        except OSError as error:
            self._unlock(wanted - self._bytes)
            if error.errno in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return False
            raise ImageInUse(f"{self._filename}: cannot be locked: {os.strerror(error.errno or errno.EIO)}") from None
        except ImageInUse:
            self._unlock(wanted - self._bytes)
            raise
        self._unlock(self._bytes - wanted)
        self._bytes = wanted
        return True

    def _in_use(self, byte: int) -> ImageInUse:
        shared = "shared " if byte >= _UNSHARED_BASE else ""
        name = Permission(byte % 100).name.lower().replace("_", " ")
        return ImageInUse(
            f'Failed to get {shared}"{name}" lock: {self._filename} is used by another process, or by another node'
        )

    def _unlock(self, bytes_: Iterable[int]) -> None:
        for byte in bytes_:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))
