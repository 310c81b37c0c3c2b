"""The graph of fleecing, from two file names or nodes: copy-before-write over a disk and a target, and its snapshot.

What copy-before-write does is in `copy_before_write`; who reads and writes is not known here.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from qcow2snap.block.copy_before_write import CopyBeforeWriteNode
from qcow2snap.block.file import FileNode, Locking, file_error
from qcow2snap.block.graph import OpenOptions, files_of, open_raw, open_writable, probe
from qcow2snap.block.node import BlockNode, FileError, UnsupportedFeature
from qcow2snap.block.raw import RawNode
from qcow2snap.block.snapshot_access import SnapshotAccessNode
from qcow2snap.block.writable_file import WritableFileNode

if TYPE_CHECKING:
    from qcow2snap.block.qcow2.writing.node import WritableQcow2Node


class Fleecing:
    """A disk in use, and what it was at the moment when this was made.

    guest    the disk, to be read and written; whoever else writes it meanwhile destroys the snapshot
    backup   the snapshot, read-only; what its reader discards is given back by the target
    threads  any
    owns     both children, also those that it was given open; close() it when neither node is in use any more. A
             target's file that was made here is removed then: nobody else knows what is where in it
    """

    def __init__(self, disk: BlockNode, target: str | BlockNode, *, force: bool = False, **options: Any) -> None:
        """The target is a node, or the name of a raw file, which is made if there is none.

        `force` overwrites what there is in the target, but never what somebody uses. Other options: those of
        CopyBeforeWriteNode.
        """
        with ExitStack() as opened:
            if isinstance(target, BlockNode):
                opened.callback(target.close)
            opened.callback(disk.close)
            if isinstance(target, str):
                _check_are_two(disk, target)
                target = RawNode(_open_target(target, disk.size, force, opened))
            elif not force and any(extent.must_read for extent in target.block_status(0, target.size)):
                raise FileError("the target has something in it; --force overwrites that")
            self.guest = CopyBeforeWriteNode(disk, target, **options)
            opened.callback(self.guest.close)
            self.backup = SnapshotAccessNode(self.guest)
            self.close = opened.pop_all().close


def open_disk(
    filename: str,
    image_format: str | None = None,
    options: OpenOptions = OpenOptions(),  # noqa: B008
) -> RawNode | WritableQcow2Node:
    """The disk of a Fleecing, for who wants to look at it first: a "raw" one, or the active one of a "qcow2" image.

    Without a format it is raw, and refused if it looks like something else: a guest may write there what it likes.
    """
    if image_format == "qcow2":
        return open_writable(filename, options)
    if image_format is None:
        _check_is_raw(filename)
    return open_raw(filename, writable=True)


def _check_are_two(disk: BlockNode, target: str) -> None:
    with suppress(OSError, ValueError):
        status = os.stat(target)
        if any(file.identity == (status.st_dev, status.st_ino) for file in files_of(disk)):
            raise FileError(f"{target}: is the disk itself; the target has to be another file")


def _check_is_raw(filename: str) -> None:
    file = FileNode(filename, locking=Locking.NONE)
    try:
        guess = probe(file)
    finally:
        file.close()
    if guess != "raw":
        raise UnsupportedFeature(
            f"{filename}: looks like {guess}: say -f qcow2 if it is that, or -f raw if it is a raw disk all the same"
        )


def _open_target(filename: str, size: int, force: bool, opened: ExitStack) -> WritableFileNode:
    """A file of at least so many bytes, with nothing in it."""
    try:
        os.close(os.open(filename, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        opened.callback(_remove, filename, os.stat(filename).st_ino)
    except FileExistsError:
        pass
    except OSError as error:
        raise file_error(filename, error) from None
    except ValueError:
        raise FileError(f"{filename!r}: not a file name") from None
    file = WritableFileNode(filename)
    opened.callback(file.close)
    if not force and file.size and (file.is_block_device or file.hole_or_data(0) != (True, file.size)):
        raise FileError(f"{filename}: has something in it; --force overwrites that, or name a file that is not there")
    if not file.is_block_device:
        try:
            os.ftruncate(file.fileno(), 0)
            os.ftruncate(file.fileno(), size)
        except OSError as error:
            raise file_error(filename, error) from None
        file.size = size
    return file


def _remove(filename: str, inode: int) -> None:
    with suppress(OSError):
        if os.stat(filename).st_ino == inode:
            os.unlink(filename)
