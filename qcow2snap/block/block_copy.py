"""Reads clusters that are to be copied, zeros apart from data. Keeps no state, waits for nobody, writes nothing.

Which clusters, when and where to is for `copy_before_write` to say (QEMU block/block-copy.c does all of it).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from qcow2snap.block.node import BlockNode

READ_SIZE = 1 << 20  # bytes that are read at once, if a cluster is not larger

_RUN = re.compile(b"\0+|\1+")
# Of READ_SIZE each; as many as threads ever copied at once, up to 8. Others are made when they are needed.
_buffers: deque[bytearray] = deque(maxlen=8)


class Clusters(NamedTuple):
    """A run of clusters, from `first` up to, not including, `last`, and their bytes; None: zeros.

    The bytes are there until the next run is asked for.
    """

    first: int
    last: int
    data: memoryview | None


def read_clusters(node: BlockNode, first: int, last: int, cluster_size: int) -> Iterator[Clusters]:
    """The clusters from `first` up to, not including, `last`. The node's last one may be shorter than the others.

    What the node knows to be zeros is not read, and what is read is looked at: guests write zeros, too.
    """
    step = max(1, READ_SIZE // cluster_size)
    if last - first <= step:  # as a rule: what is written at once. To ask for each hole in it costs more than it saves
        offset = first * cluster_size
        if node.is_zero_fast(offset, min(last * cluster_size, node.size) - offset):
            yield Clusters(first, last, None)
        else:
            yield from _read(node, first, last, cluster_size)
        return
    for start, end, is_zero in _runs(first, _known_zeros(node, first, last, cluster_size)):
        if is_zero:
            yield Clusters(start, end, None)
            continue
        for position in range(start, end, step):
            yield from _read(node, position, min(end, position + step), cluster_size)


def _known_zeros(node: BlockNode, first: int, last: int, cluster_size: int) -> bytearray:
    """For each cluster, 1 if it is known to be zeros without reading it."""
    offset = first * cluster_size
    known = bytearray(b"\1" * (last - first))
    for extent in node.block_status(offset, min(last * cluster_size, node.size) - offset):
        if extent.must_read:
            start, end = extent.offset // cluster_size - first, -(-extent.end // cluster_size) - first
            known[start:end] = bytes(end - start)
    return known


def _read(node: BlockNode, first: int, last: int, cluster_size: int) -> Iterator[Clusters]:
    offset = first * cluster_size
    length = min(last * cluster_size, node.size) - offset
    try:
        buffer = _buffers.pop()
    except IndexError:
        buffer = bytearray(READ_SIZE)
    if len(buffer) < length:
        buffer = bytearray(length)
    try:
        view = memoryview(buffer)[:length]
        node.preadv(offset, [view])
        zeros = bytes(cluster_size)
        full = length - length % cluster_size
        are_zeros = bytearray(buffer.startswith(zeros, start) for start in range(0, full, cluster_size))
        if full < length:
            are_zeros.append(buffer.startswith(zeros[: length - full], full))
        for start, end, is_zero in _runs(first, are_zeros):
            data = view[(start - first) * cluster_size : (end - first) * cluster_size]
            yield Clusters(start, end, None if is_zero else data)
    finally:
        if len(buffer) == READ_SIZE:
            _buffers.append(buffer)


def _runs(first: int, flags: bytearray) -> list[tuple[int, int, bool]]:
    return [(first + run.start(), first + run.end(), run[0][0] == 1) for run in _RUN.finditer(flags)]
