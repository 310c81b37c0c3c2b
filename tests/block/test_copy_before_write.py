"""Copy-before-write: whatever is done to a disk, its snapshot is what it was, and no more is copied than it takes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcow2snap.block.copy_before_write import MAX_CLAIM, CopyBeforeWriteNode
from qcow2snap.block.node import AccessDenied, OutOfRange, Qcow2SnapError, ReadOnly, Status, UnsupportedFeature
from tests.block.fleecing import CLUSTER, SIZE, Fleecing, K
from tests.block.memory import BLOCK, MemoryDisk
from tests.nbd.support import ZeroNode

# One after the other, against a plain model.

RANGES = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair) - min(pair)))
# Edges of clusters and of blocks, and what lies beside them, are where mistakes are.
EDGES = st.sampled_from(
    [edge + by for edge in range(CLUSTER, SIZE, CLUSTER) for by in (-1, 0, 1, BLOCK)] + [0, 1, SIZE]
)
NEAR_EDGES = st.tuples(EDGES, EDGES).map(lambda pair: (min(pair), max(pair) - min(pair)))
OPERATIONS = st.tuples(
    st.sampled_from(["write", "zero", "discard", "read", "status", "give back", "flush"]), RANGES | NEAR_EDGES
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(OPERATIONS, max_size=15), st.none() | st.lists(NEAR_EDGES, max_size=2), st.sampled_from([0, 2 * CLUSTER])
)
def test_whatever_is_done_the_snapshot_stays(
    operations: list[tuple[str, tuple[int, int]]], bitmap: list[tuple[int, int]] | None, min_cluster_size: int
) -> None:
    hole = range(CLUSTER + BLOCK, 3 * CLUSTER - BLOCK)  # some of it whole clusters, some not
    content = bytearray(random.Random(1).randbytes(SIZE))
    content[hole.start : hole.stop] = bytes(len(hole))
    fleecing = Fleecing(bytes(content), bitmap=bitmap, min_cluster_size=min_cluster_size)
    cluster = fleecing.node.cluster_size
    kept = [bitmap is None] * -(-SIZE // cluster)
    for start, length in bitmap or ():
        for n in range(start // cluster, -(-(start + length) // cluster) if length else 0):
            kept[n] = True
    guest = bytearray(content)
    for number, (what, (offset, length)) in enumerate(operations):
        end = offset + length
        may_read = all(kept[offset // cluster : -(-end // cluster)])
        if what == "write":
            fleecing.write(offset, length, bytes([number + 1]))
            guest[offset:end] = bytes([number + 1]) * length
        elif what in ("zero", "discard"):
            (fleecing.node.pwrite_zeroes if what == "zero" else fleecing.node.pdiscard)(offset, length)
            guest[offset:end] = bytes(length)
        elif what == "give back":
            fleecing.snapshot.pdiscard(offset, length)
            for n in range(-(-offset // cluster), end // cluster):
                kept[n] = False
        elif what == "flush":
            fleecing.node.flush()
        elif length and not may_read:
            with pytest.raises(AccessDenied):
                fleecing.read(offset, length)
            with pytest.raises(AccessDenied):
                list(fleecing.snapshot.block_status(offset, length))
        elif what == "read":
            assert fleecing.read(offset, length) == content[offset:end]
        else:
            position = offset
            for extent in fleecing.snapshot.block_status(offset, length):
                assert extent.offset == position
                assert extent.length > 0
                assert extent.file is None
                position = extent.end
                if extent.status & Status.ZERO:
                    assert not any(content[extent.offset : extent.end])
            assert position == end
    assert fleecing.disk.content == guest == fleecing.node.pread(0, SIZE)
    taken = {block * BLOCK // cluster for block in fleecing.target.allocated}
    assert len(taken) * cluster == fleecing.node.held <= fleecing.node.copied
    changed = {n for n in range(len(kept)) if guest[n * cluster :][:cluster] != content[n * cluster :][:cluster]}
    told = {n for change in fleecing.node.changes(fleecing.snapshot.snapshot, None)
            for n in range(change.offset // cluster, -(-change.end // cluster))}  # fmt: skip
    assert changed <= told


# What is copied, and what is not.


def test_clusters_are_copied_whole_and_the_short_one_at_the_end_too() -> None:
    fleecing = Fleecing()
    fleecing.write(CLUSTER - 1, 2)
    fleecing.write(SIZE - 1, 1)
    assert [call for call in fleecing.target.calls if call[0] == "write"] == [
        ("write", 0, 2 * CLUSTER),
        ("write", 5 * CLUSTER, SIZE - 5 * CLUSTER),
    ]
    assert fleecing.is_intact()


@pytest.mark.parametrize("are_holes", [True, False])
def test_zeros_are_remembered_and_not_copied(are_holes: bool) -> None:
    fleecing = Fleecing(bytes(SIZE - 1) + b"x")
    if not are_holes:
        fleecing.disk.allocated = {*range(-(-SIZE // BLOCK))}
    fleecing.write(0, 5 * CLUSTER)
    fleecing.write(5 * CLUSTER - 1, SIZE - 5 * CLUSTER + 1)
    assert [call for call in fleecing.target.calls if call[0] == "write"] == [
        ("write", 5 * CLUSTER, SIZE - 5 * CLUSTER)
    ]
    assert fleecing.is_intact()
    zeros, data = fleecing.snapshot.block_status(0, SIZE)
    assert (zeros.length, zeros.must_read, data.must_read) == (5 * CLUSTER, False, True)
    assert any(what == "read" and offset == 0 for what, offset, _ in fleecing.disk.calls) != are_holes


def test_much_at_once_is_claimed_in_pieces() -> None:
    fleecing = Fleecing(bytes(MAX_CLAIM + CLUSTER))
    fleecing.node.pdiscard(0, MAX_CLAIM + CLUSTER)
    assert [length for what, _, length in fleecing.disk.calls if what == "status"] == [MAX_CLAIM, CLUSTER]


def test_bytes_of_no_length_copy_nothing() -> None:
    fleecing = Fleecing()
    fleecing.write(5, 0)
    fleecing.node.pdiscard(CLUSTER, 0)
    assert not fleecing.target.calls


def test_a_write_beyond_the_end_copies_nothing() -> None:
    fleecing = Fleecing()
    with pytest.raises(OutOfRange):
        fleecing.write(SIZE - 1, 2)
    assert not fleecing.target.calls


def test_what_the_bitmap_leaves_out_is_neither_kept_nor_read() -> None:
    fleecing = Fleecing(bitmap=[(CLUSTER, 1), (3 * CLUSTER - 1, 2)])
    fleecing.write(0, SIZE)
    assert fleecing.node.copied == 3 * CLUSTER
    assert fleecing.read(CLUSTER, 3 * CLUSTER) == fleecing.before[CLUSTER : 4 * CLUSTER]
    for offset, length in ((0, CLUSTER + 1), (4 * CLUSTER - 1, 2), (SIZE - 1, 1)):
        with pytest.raises(AccessDenied):
            fleecing.read(offset, length)


def test_parts_of_clusters_are_not_given_back() -> None:
    fleecing = Fleecing()
    fleecing.write(0, SIZE)
    fleecing.snapshot.pdiscard(1, 2 * CLUSTER)  # one whole cluster
    fleecing.snapshot.pdiscard(5 * CLUSTER, SIZE - 5 * CLUSTER)  # none: the last one is short
    assert fleecing.read(0, CLUSTER) + fleecing.read(2 * CLUSTER) == (
        fleecing.before[:CLUSTER] + fleecing.before[2 * CLUSTER :]
    )
    with pytest.raises(AccessDenied):
        fleecing.read(2 * CLUSTER - 1, 1)


def test_a_larger_cluster_is_copied_at_once() -> None:
    fleecing = Fleecing(min_cluster_size=256 * K)
    fleecing.write(5, 1)
    assert fleecing.node.copied == 256 * K
    assert fleecing.is_intact()


def test_flush_reaches_the_disk_and_the_target_if_that_was_written() -> None:
    fleecing = Fleecing()
    fleecing.node.flush()
    assert [call[0] for call in fleecing.disk.calls + fleecing.target.calls] == ["flush"]
    fleecing.write(0, 1)
    fleecing.node.flush()
    fleecing.node.flush()
    assert [call[0] for call in fleecing.target.calls if call[0] == "flush"] == ["flush"]


def test_what_changed_since_is_what_was_written() -> None:
    fleecing = Fleecing()
    fleecing.write(CLUSTER, 1)
    [change] = fleecing.node.changes(fleecing.snapshot.snapshot, None)
    assert (change.offset, change.length) == (CLUSTER, CLUSTER)
    [change] = fleecing.node.changes(None, fleecing.snapshot.snapshot, CLUSTER + 5, 7)
    assert (change.offset, change.length) == (CLUSTER + 5, 7)
    assert not [*fleecing.node.changes(None, fleecing.snapshot.snapshot, CLUSTER + 5, 0)]
    assert not [*fleecing.node.changes(fleecing.snapshot.snapshot, fleecing.snapshot.snapshot)]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: CopyBeforeWriteNode(MemoryDisk(b"12"), MemoryDisk(b"1")), OutOfRange),
        (lambda: CopyBeforeWriteNode(MemoryDisk(b"1"), ZeroNode(1)), ReadOnly),
        (lambda: Fleecing(min_cluster_size=3 * CLUSTER), UnsupportedFeature),
        (lambda: Fleecing(bitmap=[(SIZE, 1)]), OutOfRange),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], error: type[Qcow2SnapError]) -> None:
    with pytest.raises(error):
        make()


def test_a_disk_of_no_bytes_has_a_snapshot_of_none() -> None:
    fleecing = Fleecing(b"")
    assert fleecing.read() == b""
    assert not [*fleecing.snapshot.block_status(0, 0)]
    fleecing.node.close()
