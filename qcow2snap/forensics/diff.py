"""Dropping from what may differ between two states the bytes that do not: both sides are read and compared.

In order, by a few threads, each with two buffers; how much memory that takes does not depend on the disk.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from qcow2snap.block.node import BlockNode, Change, ChangedExtent

PIECE_SIZE = 2 << 20  # bytes of each side that a thread reads at a time; a multiple of every unit

Progress = Callable[[int], None]


def verified(
    changes: Iterable[ChangedExtent],
    since: BlockNode,
    state: BlockNode,
    unit: int,
    *,
    progress: Progress = lambda _count: None,
    workers: int | None = None,
) -> Iterator[ChangedExtent]:
    """Those of the changes whose bytes differ, to the `unit` (a power of 2 up to 2 MiB, counted from the disk's start).

    A change of size stays as it is: one side has nothing there.
    """
    compare = _Comparer(since, state, unit)
    pending: deque[Future[list[ChangedExtent]]] = deque()
    last: ChangedExtent | None = None
    workers = workers or min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for extent in _settled(_pieces(changes), pool, compare, pending, 2 * workers, progress):
                if last is not None and last.end == extent.offset and last.change is extent.change:
                    last = last._replace(length=last.length + extent.length)
                    continue
                if last is not None:
                    yield last
                last = extent
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if last is not None:
        yield last


def _settled(
    pieces: Iterator[ChangedExtent],
    pool: ThreadPoolExecutor,
    compare: _Comparer,
    pending: deque[Future[list[ChangedExtent]]],
    limit: int,
    progress: Progress,
) -> Iterator[ChangedExtent]:
    """What remains of the pieces, in order; so many at most are under way."""
    for piece in pieces:
        pending.append(pool.submit(compare, piece))
        progress(piece.length)
        if len(pending) > limit:
            yield from pending.popleft().result()
    while pending:
        yield from pending.popleft().result()


def _pieces(changes: Iterable[ChangedExtent]) -> Iterator[ChangedExtent]:
    for extent in changes:
        offset = extent.offset
        while extent.change is not Change.SIZE and offset < extent.end:
            count = min(PIECE_SIZE - offset % PIECE_SIZE, extent.end - offset)
            yield ChangedExtent(offset, count, extent.change)
            offset += count
        if extent.change is Change.SIZE:
            yield extent


class _Comparer:
    """Compares one piece. For any number of threads, each of which gets buffers of its own."""

    def __init__(self, since: BlockNode, state: BlockNode, unit: int) -> None:
        self._since = since
        self._state = state
        self._unit = unit
        self._thread = threading.local()

    def __call__(self, piece: ChangedExtent) -> list[ChangedExtent]:
        """The units of a piece, or parts of units at its ends, that differ."""
        if piece.change is Change.SIZE:
            return [piece]
        # Of just its length, so that they compare as wholes, at the speed of memory; those of whole pieces are kept.
        if piece.length < PIECE_SIZE:
            old, new = bytearray(piece.length), bytearray(piece.length)
        else:
            try:
                old, new = self._thread.buffers
            except AttributeError:
                old, new = self._thread.buffers = bytearray(PIECE_SIZE), bytearray(PIECE_SIZE)
        self._since.preadv(piece.offset, [old])
        self._state.preadv(piece.offset, [new])
        if old == new:
            return []
        differing, start = [], 0
        while start < piece.length:
            stop = min(start + self._unit - (piece.offset + start) % self._unit, piece.length)
            if old[start:stop] != new[start:stop]:
                differing.append(ChangedExtent(piece.offset + start, stop - start, piece.change))
            start = stop
        return differing
