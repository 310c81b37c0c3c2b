"""Where the bytes of a disk that does not change lie in files, remembered. No protocol, no socket.

To find where 4 KiB lie costs a driver more than to read them. What it says of 1 MiB is kept here, so that the next read
nearby is one bisection and one `preadv`: 4 KiB random reads of a fragmented snapshot went from 0.8 to 1.7 times the
rate of qemu-nbd at depth 64. That `preadv` does not wait for the disk (RWF_NOWAIT), so that whoever has several reads
at hand can answer those first that need no waiting. The plain twin is BlockNode.preadv, which serves whatever is not
at hand here, too.
"""

from __future__ import annotations

import errno
import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from typing import NamedTuple
from weakref import WeakKeyDictionary

from qcow2snap.block.buffers import fill_with_zeros
from qcow2snap.block.node import BlockNode, Extent, HostFile, Qcow2SnapError, Status

WINDOW = 1 << 20  # bytes of the disk that are looked up at once
MAX_WINDOW_EXTENTS = 1 << 8  # a window in more pieces than this is left to the node
MAX_EXTENTS = 1 << 16  # of one map; 32 bytes each
MAX_EXTENTS_IN_ALL = 1 << 19  # of all maps: an image may have 65,536 snapshots, and a client may read each

_DATA = Status.DATA | Status.ALLOCATED


class _Window(NamedTuple):
    """Runs of one window, by index."""

    starts: array[int]  # offsets on the disk, ascending
    ends: array[int]
    shifts: array[int]  # from an offset on the disk to the one in the file
    files: list[HostFile | None]  # None: in no file, or not verbatim
    zeros: bytes  # 1 where zeros are read


class FileMap:
    """Reads of a node, past the driver where the bytes lie in a file.

    The node should be one whose mapping does not change: read-only, its files stable. Or it must be confirmed
    (`must_confirm`); then so must be what is read here, before it is used. Of others nothing is remembered.

    threads  any, at any time: a window is never changed, and to look one up twice does no harm
    errors   none: what cannot be read here is left to the node
    memory   some 2 MiB at most; beyond that the oldest windows go. Of all maps 16 MiB; then those go that least lately
             learnt something
    owns     nothing: the files belong to the node, which has to stay open
    """

    def __init__(self, node: BlockNode) -> None:
        self._node = node
        self._windows: dict[int, _Window] = {}
        self._size = 0  # of all windows, in extents
        self._flags = os.RWF_NOWAIT  # 0 once a file system does not know it: then every read waits

    @property
    def is_changing(self) -> bool:
        """Whether the node may put its bytes elsewhere at any time; another may have been put below it, too."""
        return not self._node.read_only or self._node.status_may_change

    def read(self, offset: int, buffer: memoryview, *, wait: bool = False) -> bool:
        """Fill the buffer; if that takes waiting, only with `wait`. False: ask the node.

        The range has to be in the node.
        """
        if self.is_changing:
            return not wait and self._read_now(offset, buffer)
        while True:
            length = len(buffer)
            window = self._windows.get(offset // WINDOW) or self._look_up(offset // WINDOW)
            index = bisect_right(window.starts, offset) - 1
            if index < 0 or offset >= window.ends[index]:
                return False
            rest = window.ends[index] - offset
            piece = buffer if rest >= length else buffer[:rest]
            file = window.files[index]
            if file is None:
                if not window.zeros[index]:
                    return not wait and self._read_now(offset, buffer)
                fill_with_zeros(piece)
            else:
                try:
                    flags = 0 if wait else self._flags
                    if os.preadv(file.fileno(), [piece], offset + window.shifts[index], flags) != len(piece):
                        return False
                except OSError as error:
                    return self._may_wait(error) and self.read(offset, buffer)
            if rest >= length:
                return True
            offset, buffer = offset + rest, buffer[rest:]

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether a range is known to be zeros, from first to last, or was when it was looked up."""
        window = self._windows.get(offset // WINDOW) or self._look_up(offset // WINDOW)
        index = bisect_right(window.starts, offset) - 1
        return index >= 0 and window.zeros[index] == 1 and offset + length <= window.ends[index]

    def _read_now(self, offset: int, buffer: memoryview) -> bool:
        try:
            return self._node.preadv_nowait(offset, [buffer])
        except Qcow2SnapError:
            return False

    def prefetch(self, offset: int, length: int, *, ask_node: bool = True) -> bool:
        """As BlockNode.prefetch, straight from the kernel where all of the bytes lie in files: then True.

        The node, which takes longer, is asked only with `ask_node`.
        """
        extents = self.extents(offset, length)
        if extents and all(extent.file is not None or not extent.must_read for extent in extents):
            fetch_ahead(extents)
            return True
        if ask_node:
            self._node.prefetch(offset, length)
        return False

    def extents(self, offset: int, length: int) -> list[Extent]:
        """The extents of a range, none if they are not known. Not for a node that has to be confirmed."""
        found = []
        end = offset + length
        while offset < end:
            window = self._windows.get(offset // WINDOW) or self._look_up(offset // WINDOW)
            starts, ends, shifts, files, zeros = window
            stop = min(end, (offset // WINDOW + 1) * WINDOW)
            index = bisect_right(starts, offset) - 1
            while offset < stop:
                if not 0 <= index < len(starts) or not starts[index] <= offset < ends[index]:
                    return []
                run = min(ends[index], stop) - offset
                file = files[index]
                status = Status.ZERO if zeros[index] else _DATA
                found.append(Extent(offset, run, status, 0, file, offset + shifts[index] if file else 0))
                offset += run
                index += 1
        return found

    def is_at_hand(self, file: HostFile, file_offset: int) -> bool:
        """Whether a byte of a file can be read without waiting."""
        try:
            return os.preadv(file.fileno(), [bytearray(1)], file_offset, self._flags) == 1
        except OSError as error:
            return self._may_wait(error) and self.is_at_hand(file, file_offset)

    def _may_wait(self, error: OSError) -> bool:
        """Whether to try again, and wait where need be."""
        if error.errno != errno.EOPNOTSUPP or not self._flags:
            return False
        self._flags = 0
        return True

    def _look_up(self, number: int) -> _Window:
        start = number * WINDOW
        extents = self._extents_of(start, min(WINDOW, self._node.size - start))
        files = [self._usable(extent) for extent in extents]
        window = _Window(
            array("Q", [extent.offset for extent in extents]),
            array("Q", [extent.end for extent in extents]),
            array("q", [extent.file_offset - extent.offset for extent in extents]),
            files,
            bytes(not extent.must_read for extent in extents),
        )
        self._keep(number, window)
        return window

    def _usable(self, extent: Extent) -> HostFile | None:
        """The file to read an extent from, past the node."""
        if extent.must_read and extent.file is not None and (extent.file.stable or self._node.must_confirm):
            return extent.file
        return None

    def _extents_of(self, start: int, length: int) -> list[Extent]:
        """None of a window that is too ragged, or damaged somewhere: there, each read has to ask for itself."""
        if self.is_changing:
            return []
        try:
            extents = list(islice(self._node.block_status(start, length, want_zero=False), MAX_WINDOW_EXTENTS + 1))
        except Qcow2SnapError:
            return []
        return extents if len(extents) <= MAX_WINDOW_EXTENTS else []

    def _keep(self, number: int, window: _Window) -> None:
        with _keeping:
            self._size += _weight(window) - _weight(self._windows.pop(number, None))
            while self._size > MAX_EXTENTS and self._windows:
                self._size -= _weight(self._windows.pop(next(iter(self._windows))))
            self._windows[number] = window
            _maps.pop(self, None)
            _maps[self] = None
            if len(_maps) > MAX_EXTENTS_IN_ALL // MAX_EXTENTS:  # fewer cannot be too many
                _forget_oldest()


def fetch_ahead(extents: Iterable[Extent]) -> None:
    """Have the kernel begin to read those that lie in files. That it may, or may not: it is a hint."""
    for extent in extents:
        if extent.file is not None and extent.must_read:
            with suppress(OSError):
                os.posix_fadvise(extent.file.fileno(), extent.file_offset, extent.length, os.POSIX_FADV_WILLNEED)


_keeping = threading.Lock()  # to keep a window; finding one needs none
_maps: WeakKeyDictionary[FileMap, None] = WeakKeyDictionary()  # that have windows; who learnt last is the last


def _forget_oldest() -> None:
    maps = list(_maps)
    total = sum(each._size for each in maps)
    for oldest in maps[:-1]:
        if total <= MAX_EXTENTS_IN_ALL:
            return
        total -= oldest._size
        oldest._windows, oldest._size = {}, 0
        del _maps[oldest]


def _weight(window: _Window | None) -> int:
    """In extents; an empty window takes the room of some."""
    return 0 if window is None else len(window.starts) + 16
