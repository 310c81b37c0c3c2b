"""Copy-before-write where something fails, is full or slow: the guest's write or the snapshot, as the policy says."""

from __future__ import annotations

import threading
import time

import pytest

from qcow2snap.block.copy_before_write import CopyTimeout, OnCbwError
from qcow2snap.block.node import AccessDenied, FileError, NoSpace
from tests.block.fleecing import CLUSTER, SIZE, Fleecing
from tests.block.memory import Task, failing, stopped

BREAK_SNAPSHOT = OnCbwError.BREAK_SNAPSHOT
POLICIES = pytest.mark.parametrize("policy", OnCbwError)

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
