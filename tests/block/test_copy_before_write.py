"""Copy-before-write: whatever guests, readers and discarders do at once, the snapshot is what it was, or is refused."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcow2snap.block.copy_before_write import MAX_CLAIM, CopyBeforeWriteNode, CopyTimeout, OnCbwError
from qcow2snap.block.node import (
    AccessDenied,
    FileError,
    NoSpace,
    OutOfRange,
    Qcow2SnapError,
    ReadOnly,
    Status,
    UnsupportedFeature,
)
from qcow2snap.block.snapshot_access import SnapshotAccessNode
from tests.block.memory import BLOCK, MemoryDisk, Task, failing, stopped
from tests.nbd.support import ZeroNode

K = 1024
CLUSTER = 64 * K
SIZE = 5 * CLUSTER + 3 * BLOCK + 512  # the last cluster is short
BREAK_SNAPSHOT = OnCbwError.BREAK_SNAPSHOT
POLICIES = pytest.mark.parametrize("policy", OnCbwError)


class Fleecing:
    """A disk and a target in memory, the node between them, and its snapshot."""

    def __init__(self, content: bytes | None = None, target: MemoryDisk | None = None, **options: object) -> None:
        self.before = content if content is not None else random.Random(1).randbytes(SIZE)
        self.disk = MemoryDisk(self.before)
        self.target = target or MemoryDisk(bytes(len(self.before)))
        self.node = CopyBeforeWriteNode(self.disk, self.target, **options)  # type: ignore[arg-type]
        self.snapshot = SnapshotAccessNode(self.node)

    def write(self, offset: int, length: int, fill: bytes = b"!") -> None:
        self.node.pwritev(offset, [bytearray(fill * length)])

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        return self.snapshot.pread(offset, self.node.size - offset if length is None else length)

    def is_intact(self) -> bool:
        return self.read() == self.before


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


# All at once.


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_writers_readers_and_discarders_at_once(seconds: float) -> None:
    """Four of each but discarders; each byte that is read is what it was, each that was written is there at the end."""
    clusters = 40
    content = b"".join(bytes([n + 1]) * CLUSTER for n in range(clusters))
    fleecing = Fleecing(content)
    until = time.monotonic() + seconds
    written: list[dict[int, int]] = [{} for _ in range(4)]
    lost = set()  # clusters that may have been given back
    denied, read = [0], [0]

    def write(number: int) -> None:
        mine = random.Random(number)
        while time.monotonic() < until:
            block = mine.randrange(number, clusters * CLUSTER // BLOCK - 4, 4)  # nobody else's
            fill = mine.randrange(100, 255)
            action = mine.randrange(4)
            if action == 0:
                fleecing.node.pdiscard(block * BLOCK, BLOCK)
                fill = 0
            else:
                fleecing.write(block * BLOCK, BLOCK, bytes([fill]))
            written[number][block] = fill

    def look(number: int) -> None:
        mine = random.Random(number)
        while time.monotonic() < until:
            offset = mine.randrange(len(content))
            length = mine.randrange(1, min(3 * CLUSTER, len(content) - offset) + 1)
            try:
                if mine.randrange(2):
                    data = fleecing.read(offset, length)
                    assert data == content[offset : offset + length]
                    read[0] += 1
                else:
                    extents = fleecing.snapshot.block_status(offset, length)
                    assert all(extent.must_read for extent in extents), "there was no zero"
            except AccessDenied:
                assert lost & {*range(offset // CLUSTER, -(-(offset + length) // CLUSTER))}
                denied[0] += 1

    def give_back() -> None:
        mine = random.Random(9)
        while time.monotonic() < until:
            time.sleep(seconds / 10)
            cluster = mine.randrange(clusters)
            lost.add(cluster)
            fleecing.snapshot.pdiscard(cluster * CLUSTER, CLUSTER)

    tasks = (
        [Task(write, number) for number in range(4)] + [Task(look, number) for number in range(4)] + [Task(give_back)]
    )
    for task in tasks:
        task.join(seconds + 20)
        task.result()
    assert read[0] > 10
    assert denied[0] > 0
    for blocks in written:
        for block, fill in blocks.items():
            assert fleecing.disk.content[block * BLOCK : (block + 1) * BLOCK] == bytes([fill]) * BLOCK
    for n in {*range(clusters)} - lost:
        assert fleecing.read(n * CLUSTER, CLUSTER) == content[n * CLUSTER : (n + 1) * CLUSTER]
    assert not {block * BLOCK // CLUSTER for block in fleecing.target.allocated} & lost


# Who waits for whom: disks that stop where they are told to.


def test_two_writers_of_one_cluster_copy_it_once() -> None:
    fleecing = Fleecing()
    with stopped(fleecing.target, "write-half") as copying:
        first = Task(fleecing.write, 0, 10)
        copying.wait_for_one()
        second = Task(fleecing.write, 100, 10)
        assert first.waits()
        assert second.waits()
        assert fleecing.disk.content == fleecing.before, "neither may write before the copy is whole"
    first.result()
    second.result()
    assert [call for call in fleecing.target.calls if call[0] == "write"] == [("write", 0, CLUSTER)]
    assert fleecing.is_intact()


def test_a_write_over_what_is_being_copied_copies_only_the_rest() -> None:
    fleecing = Fleecing()
    with stopped(fleecing.target, "write") as copying:
        first = Task(fleecing.write, CLUSTER, 1)
        copying.wait_for_one()
        second = Task(fleecing.write, 0, 3 * CLUSTER)
        assert second.waits()
    first.result()
    second.result()
    assert fleecing.node.copied == 3 * CLUSTER
    assert sum(length for what, _, length in fleecing.target.calls if what == "write") == 3 * CLUSTER
    assert fleecing.is_intact()


@pytest.mark.parametrize("change", ["pdiscard", "pwrite_zeroes", "write"])
def test_a_guest_waits_for_a_snapshot_read_in_flight(change: str) -> None:
    fleecing = Fleecing()
    act = fleecing.write if change == "write" else getattr(fleecing.node, change)
    with stopped(fleecing.disk, "read-half", at=0) as reading:
        reader = Task(fleecing.read, 0, CLUSTER)
        reading.wait_for_one()
        fleecing.disk.hook = lambda *step: None  # the copy is not stopped
        guest = Task(act, 0, CLUSTER)
        assert guest.waits()
        assert fleecing.disk.content == fleecing.before
        assert fleecing.target.content[:CLUSTER] == fleecing.before[:CLUSTER], "the copy has not waited"
        assert not Task(fleecing.read, 0, CLUSTER).waits(), "who comes later reads from the target"
        assert not Task(fleecing.write, CLUSTER, 1).waits(), "other clusters are other people's"
    assert reader.result() == fleecing.before[:CLUSTER]
    guest.result()
    assert fleecing.is_intact()


def test_a_second_write_waits_for_the_read_that_the_first_waits_for() -> None:
    """What it finds copied already may still be read from the disk."""
    fleecing = Fleecing()
    with stopped(fleecing.disk, "read-half", at=0) as reading:
        reader = Task(fleecing.read, 0, CLUSTER)
        reading.wait_for_one()
        fleecing.disk.hook = lambda *step: None
        first = Task(fleecing.write, 0, 1)
        assert first.waits()
        second = Task(fleecing.write, CLUSTER - 1, 1)
        assert second.waits()
    assert reader.result() == fleecing.before[:CLUSTER]
    first.result()
    second.result()


def test_a_guest_waits_for_a_question_about_zeros_in_flight() -> None:
    """If its write came between, holes would be told that were data."""
    fleecing = Fleecing()
    with stopped(fleecing.disk, "status", at=0) as asking:
        reader = Task(lambda: list(fleecing.snapshot.block_status(0, CLUSTER)))
        asking.wait_for_one()
        fleecing.disk.hook = lambda *step: None
        guest = Task(fleecing.node.pdiscard, 0, CLUSTER)
        assert guest.waits()
    [extent] = reader.result()  # type: ignore[misc]
    assert extent.must_read
    guest.result()


def test_nothing_else_waits_while_the_target_is_slow() -> None:
    fleecing = Fleecing()
    fleecing.write(CLUSTER, 1)
    with stopped(fleecing.target, "write-half", at=0) as copying:
        guest = Task(fleecing.write, 0, 10)
        copying.wait_for_one()
        others: list[Callable[[], object]] = [
            lambda: fleecing.write(CLUSTER, 10),
            lambda: fleecing.write(2 * CLUSTER, 10),
            lambda: fleecing.read(0, SIZE) == fleecing.before or pytest.fail("half a cluster was read"),
            lambda: list(fleecing.snapshot.block_status(0, SIZE)),
            lambda: fleecing.node.pread(0, SIZE),
            lambda: fleecing.snapshot.pdiscard(3 * CLUSTER, CLUSTER),
        ]
        for other in others:
            task = Task(other)
            assert not task.waits()
            task.result()
        assert guest.waits()
    guest.result()


def test_a_read_holds_off_no_guest_where_it_reads_from_the_target() -> None:
    fleecing = Fleecing()
    fleecing.write(CLUSTER, 1)
    with stopped(fleecing.disk, "read-half", at=0) as reading:
        reader = Task(fleecing.read, 0, 2 * CLUSTER)
        reading.wait_for_one()
        fleecing.disk.hook = lambda *step: None
        assert not Task(fleecing.write, CLUSTER, 1).waits()
    assert reader.result() == fleecing.before[: 2 * CLUSTER]


def test_what_is_given_back_while_it_is_copied_is_freed() -> None:
    fleecing = Fleecing()
    with stopped(fleecing.target, "write-half") as copying:
        guest = Task(fleecing.write, 0, 10)
        copying.wait_for_one()
        discarder = Task(fleecing.snapshot.pdiscard, 0, CLUSTER)
        assert discarder.waits()
        with pytest.raises(AccessDenied):
            fleecing.read(0, 1)
    guest.result()
    discarder.result()
    assert not fleecing.target.allocated
    assert fleecing.node.held == 0
    fleecing.write(0, 10)
    assert not fleecing.target.allocated, "nobody needs it any more"


def test_what_is_being_read_from_the_target_is_not_freed_yet() -> None:
    fleecing = Fleecing()
    fleecing.write(0, 10)
    with stopped(fleecing.target, "read-half") as reading:
        reader = Task(fleecing.read, 0, CLUSTER)
        reading.wait_for_one()
        discarder = Task(fleecing.snapshot.pdiscard, 0, 2 * CLUSTER)
        assert discarder.waits()
    assert reader.result() == fleecing.before[:CLUSTER]
    discarder.result()
    assert not fleecing.target.allocated


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


# Failures.

FAULTS = pytest.mark.parametrize(
    ("where", "what"),
    [("disk", "read"), ("disk", "read-half"), ("disk", "status"), ("target", "write"), ("target", "write-half")],
)


@FAULTS
def test_a_failed_copy_fails_the_write_and_the_next_one_tries_again(where: str, what: str) -> None:
    fleecing = Fleecing()
    child = getattr(fleecing, where)
    child.hook = failing(what, NoSpace("injected"))
    for act in (fleecing.write, fleecing.node.pdiscard, fleecing.node.pwrite_zeroes):
        with pytest.raises(NoSpace, match="injected"):
            act(5, CLUSTER)
    assert fleecing.disk.content == fleecing.before
    child.hook = lambda *step: None
    assert fleecing.is_intact()
    assert fleecing.node.held == 0
    fleecing.write(5, CLUSTER)
    assert fleecing.disk.content[5 : 5 + CLUSTER] == b"!" * CLUSTER
    assert fleecing.is_intact()


@FAULTS
def test_a_failed_copy_breaks_the_snapshot_if_that_is_wanted(where: str, what: str) -> None:
    fleecing = Fleecing(on_cbw_error=BREAK_SNAPSHOT)
    fleecing.write(2 * CLUSTER, 1)
    child = getattr(fleecing, where)
    child.hook = failing(what, FileError("injected"))
    fleecing.write(0, CLUSTER)
    child.hook = lambda *step: None
    assert fleecing.disk.content[:CLUSTER] == b"!" * CLUSTER
    for offset in (0, CLUSTER, 2 * CLUSTER):  # also what is on the target
        with pytest.raises(AccessDenied, match="injected"):
            fleecing.read(offset, 1)
        with pytest.raises(AccessDenied, match="injected"):
            list(fleecing.snapshot.block_status(offset, 1))
    before = len(fleecing.target.calls)
    fleecing.write(0, SIZE)
    assert len(fleecing.target.calls) == before, "nothing is copied any more"
    assert [change.length for change in fleecing.node.changes(fleecing.snapshot.snapshot, None)] == [SIZE]


def test_a_read_in_flight_when_the_snapshot_breaks_is_refused() -> None:
    """Guests do not wait for it any more, so it may hold what they have written."""
    fleecing = Fleecing(on_cbw_error=BREAK_SNAPSHOT)
    with stopped(fleecing.disk, "read-half", at=0) as reading:
        reader = Task(fleecing.read, 0, CLUSTER)
        reading.wait_for_one()
        fleecing.disk.hook = lambda *step: None
        fleecing.target.hook = failing("write", FileError("injected"))
        fleecing.write(0, CLUSTER)
    with pytest.raises(AccessDenied):
        reader.result()


def test_a_write_that_waits_for_a_copy_that_fails_copies_itself() -> None:
    fleecing = Fleecing()
    with stopped(fleecing.target, "write") as copying:
        first = Task(fleecing.write, 0, 1)
        copying.wait_for_one()
        second = Task(fleecing.write, 1, 1)
        assert second.waits()
        failed: list[int] = []

        def fail_once(what: str, offset: int, length: int) -> None:
            if what == "write-half" and not failed:
                failed.append(offset)
                raise FileError("injected")

        fleecing.target.hook = fail_once
    fleecing.target.hook = fail_once
    results = []
    for task in (first, second):
        try:
            results.append(task.result())
        except FileError as error:
            results.append(str(error))
    assert fleecing.is_intact()
    assert fleecing.disk.content[1:2] == b"!"


@POLICIES
def test_a_full_target_is_a_failed_copy(policy: OnCbwError) -> None:
    fleecing = Fleecing(on_cbw_error=policy, max_target=2 * CLUSTER)
    fleecing.write(0, 2 * CLUSTER)
    if policy is BREAK_SNAPSHOT:
        fleecing.write(2 * CLUSTER, 1)
        with pytest.raises(AccessDenied, match="131072 bytes"):
            fleecing.read(0, 1)
        return
    with pytest.raises(NoSpace, match="131072 bytes"):
        fleecing.write(2 * CLUSTER, 1)
    assert fleecing.is_intact()
    fleecing.snapshot.pdiscard(0, CLUSTER)
    fleecing.write(2 * CLUSTER, 1)
    assert fleecing.node.held == 2 * CLUSTER
    assert fleecing.read(CLUSTER) == fleecing.before[CLUSTER:]


def test_zeros_need_no_room_on_the_target() -> None:
    fleecing = Fleecing(bytes(SIZE), max_target=0)
    fleecing.write(0, SIZE)
    assert fleecing.is_intact()


@POLICIES
def test_a_target_that_cannot_be_flushed_is_a_failed_copy(policy: OnCbwError) -> None:
    fleecing = Fleecing(on_cbw_error=policy)
    fleecing.write(0, 1)
    fleecing.target.hook = failing("flush", FileError("injected"))
    if policy is BREAK_SNAPSHOT:
        fleecing.node.flush()
        with pytest.raises(AccessDenied):
            fleecing.read(0, 1)
    else:
        for _ in range(2):
            with pytest.raises(FileError, match="injected"):
                fleecing.node.flush()
        assert fleecing.is_intact()
    assert fleecing.disk.calls.count(("flush", 0, 0)) >= 1


@POLICIES
def test_a_guest_waits_no_longer_than_the_timeout(policy: OnCbwError) -> None:
    fleecing = Fleecing(on_cbw_error=policy, cbw_timeout=0.3)
    with stopped(fleecing.target, "write-half", at=0) as copying:
        started = time.monotonic()
        first = Task(fleecing.write, 0, 1)
        copying.wait_for_one()
        second = Task(fleecing.write, 1, 1)  # waits for the first one's copy
        for guest in (first, second):
            if policy is BREAK_SNAPSHOT:
                guest.result()
            else:
                with pytest.raises(CopyTimeout):
                    guest.result()
        assert 0.3 <= time.monotonic() - started < 5
        assert (fleecing.disk.content == fleecing.before) == (policy is not BREAK_SNAPSHOT)
        closing = Task(fleecing.node.close)
        assert closing.waits(), "the copy still uses both disks"
    closing.result()
    if policy is BREAK_SNAPSHOT:
        with pytest.raises(AccessDenied):
            fleecing.read(0, 1)
    else:
        assert fleecing.is_intact()
        fleecing.write(0, 1)  # the copy that came late is good
        assert fleecing.is_intact()
        assert fleecing.node.copied == CLUSTER


def test_in_time_a_timeout_changes_nothing() -> None:
    fleecing = Fleecing(cbw_timeout=20)
    fleecing.write(0, SIZE)
    assert fleecing.is_intact()
    fleecing.target.hook = fleecing.disk.hook = lambda *step: None
    assert not [thread for thread in threading.enumerate() if thread.name == "copy-before-write"]


def test_a_failure_in_time_is_the_guests() -> None:
    fleecing = Fleecing(cbw_timeout=20)
    fleecing.target.hook = failing("write", NoSpace("injected"))
    with pytest.raises(NoSpace, match="injected"):
        fleecing.write(0, 1)
    assert fleecing.is_intact()
