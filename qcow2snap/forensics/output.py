"""Where an extract goes: a new file that appears only when it is whole, a block device, or a pipe."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from types import TracebackType

from qcow2snap.block.node import FileError


class OutputFile:
    """A file that is written beside its place and renamed when whole; leaving the block by an exception removes it.

    A block device is written in place: it cannot be renamed over. `reads_as_zeros` tells whether what is not written
    is zeros.
    """

    def __init__(self, filename: str, size: int, *, force: bool) -> None:
        self.filename = filename
        self._force = force
        self._temporary: str | None = None
        try:
            mode = os.stat(filename).st_mode
        except FileNotFoundError:
            mode = 0
        except OSError as error:
            raise FileError(f"{filename}: {error.strerror}") from None
        if stat.S_ISDIR(mode):
            raise FileError(f"{filename}: is a directory; name a file in it")
        if mode and not force:
            raise FileError(f"{filename}: exists already; --force overwrites it")
        self.reads_as_zeros = not stat.S_ISBLK(mode)
        try:
            if stat.S_ISBLK(mode):
                self.fd = os.open(filename, os.O_RDWR | os.O_CLOEXEC | os.O_EXCL)
                self._check_device(size)
            else:
                # Through a link to where it points, so that the link stays one.
                self._target = os.path.realpath(filename)
                directory, name = os.path.split(self._target)
                self._temporary = os.path.join(directory, f".{name[:200]}.{secrets.token_hex(4)}.part")
                self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                os.ftruncate(self.fd, size)
        except OSError as error:
            self._discard()
            raise FileError(f"{filename}: {error.strerror}") from None

    def _check_device(self, size: int) -> None:
        room = os.lseek(self.fd, 0, os.SEEK_END)
        if room < size:
            os.close(self.fd)
            raise FileError(f"{self.filename}: has {room} bytes, too few for {size}")

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            if self._temporary is not None:
                self._put_in_place(self._temporary)
            else:
                os.fsync(self.fd)
        except OSError as failure:
            self._discard()
            raise FileError(f"{self.filename}: {failure.strerror}") from None
        os.close(self.fd)

    def _put_in_place(self, temporary: str) -> None:
        if self._force:
            os.rename(temporary, self._target)
            return
        try:
            os.link(temporary, self._target)  # unlike rename, refuses if somebody made the file meanwhile
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.rename(temporary, self._target)
        else:
            os.unlink(temporary)

    def _discard(self) -> None:
        if self._temporary is not None:
            with suppress(OSError):
                os.unlink(self._temporary)
        with suppress(OSError, AttributeError):
            os.close(self.fd)
