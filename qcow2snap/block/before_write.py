"""A disk that tells copy-before-write filters what is about to be written, by whomever (QEMU had notifiers for that).

A filter sees what is written through it. This is put below all users of a disk, its filters included, where there is
anybody who might write past one of them: so a snapshot begins when its filter is made, and not when its users have been
moved over to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcow2snap.block.copy_before_write import CopyBeforeWriteNode
from qcow2snap.block.node import BlockNode, Buffer, Extent


class BeforeWriteNode(BlockNode):
    """`file`, with each of `filters` asked to put aside what is there before anything is written.

    threads  any
    errors   of `file`, and of a filter whose policy is to fail the write
    owns     nothing
    """

    def __init__(self, file: BlockNode, filters: Sequence[CopyBeforeWriteNode]) -> None:
        self.file = file
        self.size = file.size
        self.read_only = file.read_only
        self.nb_backing = file.nb_backing
        self.must_confirm = file.must_confirm
        self.status_may_change = file.status_may_change
        self._filters = tuple(filters)

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.file.preadv(offset, buffers)

    def preadv_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        return self.file.preadv_nowait(offset, buffers)

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        return self.file.block_status(offset, length, want_zero=want_zero)

    def is_zero_fast(self, offset: int, length: int) -> bool:
        return self.file.is_zero_fast(offset, length)

    def prefetch(self, offset: int, length: int) -> None:
        self.file.prefetch(offset, length)

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._tell(offset, sum(map(len, buffers)))
        self.file.pwritev(offset, buffers)

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        self._tell(offset, length)
        self.file.pwrite_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback)

    def pdiscard(self, offset: int, length: int) -> None:
        self._tell(offset, length)
        self.file.pdiscard(offset, length)

    def flush(self) -> None:
        self.file.flush()

    def _tell(self, offset: int, length: int) -> None:
        for each in self._filters:
            each.before_write(offset, length)
