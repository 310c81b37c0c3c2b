"""The refcounts of an image as they stand in it, read by the layouts alone, to judge what counts references."""

from __future__ import annotations

from pathlib import Path

from formats.qcow2 import refcount_block
from tests.support.table import cluster_size, field


def refcounts(image: Path) -> dict[int, int]:
    """The refcount of every host cluster that has one which is not 0."""
    size = cluster_size(image)
    order = field(image, 96, 4) if field(image, 4, 4) >= 3 else 4
    data, found = image.read_bytes(), {}
    table, length = field(image, 48), field(image, 56, 4) * size
    for index in range(length // 8):
        offset = int.from_bytes(data[table + 8 * index : table + 8 * index + 8], "big")
        if offset:
            counts = refcount_block(order).parse(data[offset : offset + size])
            found |= {index * (size * 8 >> order) + i: count for i, count in enumerate(counts) if count}
    return found
