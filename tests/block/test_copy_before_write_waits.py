"""Copy-before-write with many at once: who waits for whom, who does not, and what each reads then."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from qcow2snap.block.node import AccessDenied
from tests.block.fleecing import CLUSTER, SIZE, Fleecing
from tests.block.memory import BLOCK, Task, stopped

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
