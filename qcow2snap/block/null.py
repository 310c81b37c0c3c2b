"""A disk that is all zeros and forgets what is written (QEMU block/null.c), for graphs without a disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcow2snap.block.node import BlockNode, Buffer, Extent, Status


class NullNode(BlockNode):
    """So many bytes of zeros. Any thread; no errors but OutOfRange."""

    def __init__(self, size: int, *, read_only: bool = False) -> None:
        self.size = size
        self.read_only = read_only

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.check_range(offset, sum(map(len, buffers)))
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        self.check_range(offset, length)
        if length:
            yield Extent(offset, length, Status.ZERO | Status.ALLOCATED)

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_write(offset, sum(map(len, buffers)))

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        self._check_write(offset, length)

    def pdiscard(self, offset: int, length: int) -> None:
        self._check_write(offset, length)

    def _check_write(self, offset: int, length: int) -> None:
        if self.read_only:
            self._refuse_to_write()
        self.check_range(offset, length)
