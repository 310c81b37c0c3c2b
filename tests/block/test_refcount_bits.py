"""Refcounts packed and unpacked by numpy, against the declaration of the layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.qcow2 import refcount_block
from qcow2snap.block.qcow2.refcount_bits import packed, unpacked


@pytest.mark.parametrize("order", range(7))
@given(data=st.data())
def test_every_width_is_the_layouts(order: int, data: st.DataObject) -> None:
    counts = st.lists(st.integers(0, (1 << (1 << order)) - 1), min_size=1, max_size=8)
    refcounts = (data.draw(counts) * 8)[:64]
    refcounts += [0] * (-len(refcounts) % 8)
    built = refcount_block(order).build(refcounts)
    assert packed(np.array(refcounts, dtype=np.uint64), order) == built
    assert unpacked(built, order).tolist() == refcounts
