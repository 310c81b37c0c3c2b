"""What a user from outside of the graph has of a node (QEMU's BlockBackend): a node that may be exchanged under it.

A graph changes only while no request is in it: `drained` holds new ones back, and waits for those that are under way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from qcow2snap.block.node import BlockNode, Buffer, ChangedExtent, ChangeTracking, Extent, NotSupported, SnapshotInfo


class BlockBackend(BlockNode, ChangeTracking):
    """The root of a graph, for its one user.

    size     of the node when this was made: users do not learn of another. One of another size cannot take its place
    threads  requests from any; set_node() and the ends of `drained` from one that holds no request
    errors   of the node
    owns     nothing
    """

    status_may_change = True  # the node may be another one at any time

    def __init__(
        self,
        node: BlockNode,
        *,
        read_only: bool,
        may_trim: bool = False,
        ignores_discard: bool = False,
        detect_zeroes: bool = False,
        unmap_zeroes: bool = False,
    ) -> None:
        """`may_trim`: of what is read-only, parts may be discarded all the same: they are needed no more.

        `detect_zeroes`: writes of zeros are made as such, with `unmap_zeroes` so that their space is given back.
        """
        self._node = node
        self._may_trim = may_trim
        self._ignores_discard = ignores_discard
        self._detect_zeroes = detect_zeroes
        self._unmap_zeroes = unmap_zeroes
        self.size = node.size
        self.read_only = read_only
        self.nb_backing = node.nb_backing
        self.must_confirm = node.must_confirm
        self._request = _Requests()

    @property
    def node(self) -> BlockNode:
        return self._node

    def set_node(self, node: BlockNode) -> None:
        """Have another node of the same size. Only while drained."""
        self._node = node
        self.nb_backing = node.nb_backing

    def drain(self, deadline: float) -> bool:
        """Let no new request in, and wait for those under way. False: they are not done by then (time.monotonic())."""
        return self._request.hold(deadline)

    def resume(self) -> None:
        """Let requests in, whether drain() came to its end or not."""
        self._request.resume()

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        with self._request:
            self._node.preadv(offset, buffers)

    def preadv_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        with self._request:
            return self._node.preadv_nowait(offset, buffers)

    def preadv_unconfirmed(self, offset: int, buffers: Sequence[Buffer]) -> None:
        with self._request:
            if self.must_confirm:
                self._node.preadv_unconfirmed(offset, buffers)
            else:  # the user was told so, and will not confirm
                self._node.preadv(offset, buffers)

    def confirm(self) -> None:
        with self._request:
            self._node.confirm()

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        """Nothing is held still between two of its steps: where bytes lie in a file is left out."""
        with self._request:
            for extent in self._node.block_status(offset, length, want_zero=want_zero):
                yield extent._replace(file=None, file_offset=0) if extent.file is not None else extent

    def is_zero_fast(self, offset: int, length: int) -> bool:
        with self._request:
            return self._node.is_zero_fast(offset, length)

    def prefetch(self, offset: int, length: int) -> None:
        with self._request:
            self._node.prefetch(offset, length)

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_may_write()
        with self._request:
            if self._detect_zeroes and not any(map(any, buffers)):
                self._node.pwrite_zeroes(offset, sum(map(len, buffers)), may_unmap=self._unmap_zeroes)
            else:
                self._node.pwritev(offset, buffers)

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        self._check_may_write()
        with self._request:
            may_unmap = may_unmap and not self._ignores_discard
            self._node.pwrite_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback)

    def pdiscard(self, offset: int, length: int) -> None:
        if not self._may_trim:
            self._check_may_write()
        with self._request:
            if self._ignores_discard:
                self.check_range(offset, length)
            else:
                self._node.pdiscard(offset, length)

    def flush(self) -> None:
        with self._request:
            self._node.flush()

    def changes_since(self, since: SnapshotInfo, offset: int, length: int) -> Iterator[ChangedExtent]:
        with self._request:
            yield from self._tracking().changes_since(since, offset, length)

    def dirty_bitmaps(self) -> Sequence[str]:
        return self._node.dirty_bitmaps() if isinstance(self._node, ChangeTracking) else ()

    def dirty_extents(self, bitmap: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        with self._request:
            yield from self._tracking().dirty_extents(bitmap, offset, length)

    def _tracking(self) -> ChangeTracking:
        if not isinstance(self._node, ChangeTracking):
            raise NotSupported("the node that is here now does not know what was changed")
        return self._node

    def _check_may_write(self) -> None:
        if self.read_only:
            self._refuse_to_write()


class _Requests:
    """Counts those that are under way: each is a `with` on this. A generator's would be too slow for every request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._in_flight = 0
        self._is_held = False

    def __enter__(self) -> None:
        with self._lock:
            while self._is_held:
                self._changed.wait()
            self._in_flight += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._in_flight -= 1
            if self._is_held:
                self._changed.notify_all()

    def hold(self, deadline: float) -> bool:
        with self._lock:
            self._is_held = True
            while self._in_flight:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._changed.wait(remaining)
        return True

    def resume(self) -> None:
        with self._lock:
            self._is_held = False
            self._changed.notify_all()
