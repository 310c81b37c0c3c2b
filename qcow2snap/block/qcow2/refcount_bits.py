"""Refcounts of any width: a refcount block's bytes from and to numpy arrays. Knows no file.

The plain twin, and the declaration of the layout, is formats.qcow2.refcount_block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def packed(refcounts: NDArray[Any], refcount_order: int) -> bytes:
    """Refcounts as they stand in a block. Below a byte, the first is in the least significant bits."""
    if refcount_order >= 3:
        return refcounts.astype(f">u{1 << refcount_order - 3}").tobytes()
    width = 1 << refcount_order
    groups = refcounts.astype(np.uint8).reshape(-1, 8 // width)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    joined: NDArray[np.uint8] = np.bitwise_or.reduce(groups << shifts, axis=1)
    return joined.tobytes()


def unpacked(data: bytes, refcount_order: int) -> NDArray[np.unsignedinteger[Any]]:
    """The refcounts of a block, or of whole bytes of one, as wide as they are there; below a byte, a byte each.

    Where the data ends within a refcount, that one is left out.
    """
    if refcount_order >= 3:
        size = 1 << refcount_order - 3
        return np.frombuffer(data, dtype=f">u{size}", count=len(data) // size)
    width = 1 << refcount_order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    fields = np.frombuffer(data, dtype=np.uint8)[:, None] >> shifts & np.uint8((1 << width) - 1)
    return fields.reshape(-1)
