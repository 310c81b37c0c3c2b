"""The raw format: a node that shows a stretch of its file as it is (QEMU block/raw-format.c)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcow2snap.block.node import BlockNode, Buffer, Extent, OutOfRange


class RawNode(BlockNode):
    """`size` bytes of a file from `offset` on; by default all of it.

    size     bytes
    threads  any
    errors   OutOfRange if the file does not hold that stretch; FileError when read
    owns     file, unless it was told otherwise
    """

    def __init__(self, file: BlockNode, *, offset: int = 0, size: int | None = None, owns_file: bool = True) -> None:
        self._offset = offset
        self._owns_file = owns_file
        self.size = file.size - offset if size is None else size
        if offset < 0 or self.size < 0 or offset + self.size > file.size:
            name = getattr(file, "filename", "the node below")
            raise OutOfRange(f"{name}: has {file.size} bytes, fewer than offset {offset} and size {size} ask")
        self.set_file(file)

    def set_file(self, file: BlockNode) -> None:
        """Have another node below, as large as the first. While no request is under way."""
        self.file = file
        self.read_only = file.read_only
        self.nb_backing = file.nb_backing
        self.must_confirm = file.must_confirm
        self.status_may_change = file.status_may_change

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.check_range(offset, sum(map(len, buffers)))
        self.file.preadv(self._offset + offset, buffers)

    def preadv_unconfirmed(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.check_range(offset, sum(map(len, buffers)))
        self.file.preadv_unconfirmed(self._offset + offset, buffers)

    def confirm(self) -> None:
        self.file.confirm()

    def preadv_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        self.check_range(offset, sum(map(len, buffers)))
        return self.file.preadv_nowait(self._offset + offset, buffers)

    def prefetch(self, offset: int, length: int) -> None:
        self.file.prefetch(self._offset + offset, length)

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        self.check_range(offset, length)
        for extent in self.file.block_status(self._offset + offset, length, want_zero=want_zero):
            yield extent._replace(offset=extent.offset - self._offset)

    def is_zero_fast(self, offset: int, length: int) -> bool:
        self.check_range(offset, length)
        return self.file.is_zero_fast(self._offset + offset, length)

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.check_range(offset, sum(map(len, buffers)))
        self.file.pwritev(self._offset + offset, buffers)

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        self.check_range(offset, length)
        self.file.pwrite_zeroes(self._offset + offset, length, may_unmap=may_unmap, no_fallback=no_fallback)

    def pdiscard(self, offset: int, length: int) -> None:
        self.check_range(offset, length)
        self.file.pdiscard(self._offset + offset, length)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        if self._owns_file:
            self.file.close()
