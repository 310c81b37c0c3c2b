"""A snapshot's VM state as a node that holds no tables itself. Where the state lies and how it is read: epoch, view."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from qcow2snap.block.node import BlockNode, Buffer, Extent


class VMState(BlockNode):
    """Asks for its view at each call, so that the cache of L1 tables may forget it in between.

    A server keeps a node for each export that was ever chosen. With a view in each, an image of a thousand VM states,
    with an L1 table of 32 MiB for each (they may be the same 32 MiB), made it keep them all.

    size     bytes
    threads  any
    errors   as the view's; when built, too
    owns     nothing
    """

    def __init__(self, view: Callable[[], BlockNode]) -> None:
        self._view = view
        now = view()
        self.size = now.size
        self.must_confirm = now.must_confirm

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._view().preadv(offset, buffers)

    def preadv_unconfirmed(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._view().preadv_unconfirmed(offset, buffers)

    def confirm(self) -> None:
        self._view().confirm()

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        return self._view().block_status(offset, length, want_zero=want_zero)

    def prefetch(self, offset: int, length: int) -> None:
        self._view().prefetch(offset, length)
