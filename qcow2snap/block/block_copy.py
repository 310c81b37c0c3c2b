"""Reads clusters that are to be copied, zeros apart from data. Keeps no state, waits for nobody, writes nothing.

Which clusters, when and where to is for `copy_before_write` to say (QEMU block/block-copy.c does all of it).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from qcow2snap.block.node import BlockNode

READ_SIZE = 1 << 20  # bytes that are read at once, if a cluster is not larger

_RUN = re.compile(b"\0+|\1+")


class Clusters(NamedTuple):
    """A run of clusters, from `first` up to, not including, `last`, and their bytes; None: zeros."""

    first: int
    last: int
    data: memoryview | None


def read_clusters(node: BlockNode, first: int, last: int, cluster_size: int) -> Iterator[Clusters]:
    """The clusters from `first` up to, not including, `last`. The node's last one may be shorter than the others.

    What the node knows to be zeros is not read, and what is read is looked at: guests write zeros, too.
    """
    step = max(1, READ_SIZE // cluster_size)
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
    data = bytearray(min(last * cluster_size, node.size) - offset)
    node.preadv(offset, [data])
    zeros = bytes(cluster_size)
    full = len(data) - len(data) % cluster_size
    are_zeros = bytearray(data.startswith(zeros, start) for start in range(0, full, cluster_size))
    if full < len(data):
        are_zeros.append(data.endswith(zeros[: len(data) - full]))
    view = memoryview(data)
    for start, end, is_zero in _runs(first, are_zeros):
        piece = view[(start - first) * cluster_size : (end - first) * cluster_size]
        yield Clusters(start, end, None if is_zero else piece)


def _runs(first: int, flags: bytearray) -> list[tuple[int, int, bool]]:
    return [(first + run.start(), first + run.end(), run[0][0] == 1) for run in _RUN.finditer(flags)]
