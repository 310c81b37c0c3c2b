"""Where a new file goes: it appears only when it is whole; or a block device, or a pipe."""

from __future__ import annotations

import os
import secrets
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from qcow2snap.block.file import FileNode
from qcow2snap.block.node import FileError


def is_stream(filename: str) -> bool:
    """A pipe or character device: it is written, not replaced."""
    try:
        mode = os.stat(filename).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


_PATIENCE = 0.5  # seconds that a file system may take for a name

# Held while temporary files are made, named as outputs, or taken away. To hold it around the ends of several outputs
# makes all of them appear, or none, should a signal end the process.
in_one_go = threading.RLock()
_unfinished: set[str] = set()


def discard_unfinished() -> None:
    """Take away all that is half written, and let no output appear from now on: for who ends the process next."""
    in_one_go.acquire(timeout=_PATIENCE)  # and never let go
    for temporary in list(_unfinished):
        with suppress(OSError):
            os.unlink(temporary)


class OutputFile:
    """A file of `size` bytes, written beside its place and renamed when the `with` block ends; an exception removes it.

    force           replace what is there
    inputs          files that are being read: they are never the output, forced or not
    reads_as_zeros  what is not written is zeros. Not so a block device, which is written in place
    errors          FileError when built, entered, or put in place
    """

    fd: int

    def __init__(self, filename: str, size: int, *, force: bool, inputs: Sequence[FileNode] = ()) -> None:
        self.filename = filename
        self._size = size
        self._force = force
        self._temporary: str | None = None
        try:
            status = os.stat(filename)
        except FileNotFoundError:
            self._is_device = False
        except (OSError, ValueError) as error:
            raise FileError(f"{filename}: {getattr(error, 'strerror', error)}") from None
        else:
            self._is_device = stat.S_ISBLK(status.st_mode)
            if (status.st_dev, status.st_ino) in [file.identity for file in inputs]:
                raise FileError(f"{filename}: is read as part of the image; name another file")
            if stat.S_ISDIR(status.st_mode):
                raise FileError(f"{filename}: is a directory; name a file in it")
            if not force:
                raise FileError(f"{filename}: exists already; --force overwrites it")
        self.reads_as_zeros = not self._is_device

    def beside(self, suffix: str) -> OutputFile:
        """Another output whose name is this one's and a suffix, to be replaced if this one is."""
        return OutputFile(self.filename + suffix, 0, force=self._force)

    def __enter__(self) -> OutputFile:
        try:
            if self._is_device:
                self._open_device()
            else:
                self._open_beside()
        except OSError as error:
            self._discard()
            raise FileError(f"{self.filename}: {error.strerror}") from None
        except BaseException:  # a signal
            self._discard()
            raise
        return self

    def _open_device(self) -> None:
        self.fd = os.open(self.filename, os.O_RDWR | os.O_CLOEXEC | os.O_EXCL)
        room = os.lseek(self.fd, 0, os.SEEK_END)
        if room < self._size:
            raise FileError(f"{self.filename}: has {room} bytes, too few for {self._size}")

    def _open_beside(self) -> None:
        # Through a link to where it points, so that the link stays one.
        self._target = os.path.realpath(self.filename)
        self._temporary = os.path.join(os.path.dirname(self._target), f".qcow2snap-{secrets.token_hex(8)}.part")
        with in_one_go:
            self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            _unfinished.add(self._temporary)
        if self._size:  # ext4 writes a file that was ever truncated to nothing to the disk when it is closed, and waits
            os.ftruncate(self.fd, self._size)

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
        with in_one_go:
            self._name(temporary)
            _unfinished.discard(temporary)

    def _name(self, temporary: str) -> None:
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
            with in_one_go, suppress(OSError):
                _unfinished.discard(self._temporary)
                os.unlink(self._temporary)
        with suppress(OSError, AttributeError):
            os.close(self.fd)
