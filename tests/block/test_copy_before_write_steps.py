"""Copy-before-write step by step: hypothesis says who goes on next, in the middle of what each does to a disk.

Every read, write, discard and question of the two disks stops before each half of it. Rules begin something in a thread
of its own, or let one of those that are stopped go on to its next step. So any order of steps that threads could take
may come up, and what failed comes up again. Beside it is a plain model: what the disk was, which clusters were given
back, what each byte of the disk may be by now.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qcow2snap.block.copy_before_write import CopyBeforeWriteNode
from qcow2snap.block.node import AccessDenied
from qcow2snap.block.snapshot_access import SnapshotAccessNode
from tests.block.memory import BLOCK, WAIT, MemoryDisk, Task

CLUSTER = 1 << 16
CLUSTERS = 3
SIZE = (CLUSTERS - 1) * CLUSTER + 3 * BLOCK  # the last cluster is short
PROMPT = 0.02  # seconds in which a thread that waits for nobody comes to its next step

# Few places, so that what begins meets what is there.
OFFSETS = st.sampled_from([0, 0, 0, CLUSTER, 2 * CLUSTER, 512, CLUSTER - 512])
LENGTHS = st.sampled_from([CLUSTER, CLUSTER, 512, BLOCK, 2 * CLUSTER])


class Stops:
    """Where threads stop before their next step, and are let go from."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stopped: list[int] = []  # of threads, in the order in which they came
        self._open = False

    def __call__(self, what: str, offset: int, length: int) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._open:
                return
            self._stopped.append(me)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open or me not in self._stopped, WAIT)

    def stopped(self) -> list[int]:
        return [*self._stopped]

    def let_go(self, thread: int) -> None:
        with self._changed:
            self._stopped.remove(thread)
            self._changed.notify_all()

    def is_stopped(self, thread: int | None) -> bool:
        return thread in self._stopped

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._stopped.clear()
            self._changed.notify_all()


class Doing(NamedTuple):
    """Something that began and was not seen to end."""

    what: str
    offset: int
    end: int
    task: Task
    lost_before: frozenset[int]  # clusters that were given back before it began

    @property
    def clusters(self) -> set[int]:
        return {*range(self.offset // CLUSTER, -(-self.end // CLUSTER))}


class Fleecing(RuleBasedStateMachine):
    """The machine; each example is one disk."""

    def __init__(self) -> None:
        super().__init__()
        self.doing: list[Doing] = []
        self.lost: set[int] = set()  # clusters that were given back, or are about to be
        self.fill = 1

    @initialize(seed=st.integers(0, 3), bitmap=st.none() | st.sets(st.integers(0, CLUSTERS - 1)))
    def begin(self, seed: int, bitmap: set[int] | None) -> None:
        content = bytearray(random.Random(seed).randbytes(SIZE))
        content[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER) if seed else content[:CLUSTER]
        self.before = bytes(content)
        self.may_be = [{byte} for byte in content[::512]]  # the first byte of each sector, after all that was written
        self.stops = Stops()
        self.disk, self.target = MemoryDisk(self.before), MemoryDisk(bytes(SIZE))
        self.disk.hook = self.target.hook = self.stops
        kept = None if bitmap is None else [(n * CLUSTER, min(CLUSTER, SIZE - n * CLUSTER)) for n in sorted(bitmap)]
        self.node = CopyBeforeWriteNode(self.disk, self.target, bitmap=kept)
        self.snapshot = SnapshotAccessNode(self.node)
        self.lost |= set() if bitmap is None else {*range(CLUSTERS)} - bitmap

    def start(self, what: str, offset: int, length: int, function: Callable[..., object], *arguments: object) -> None:
        task = Task(function, *arguments)
        self.doing.append(Doing(what, offset, offset + length, task, frozenset(self.lost)))
        self.settle(task)

    def settle(self, task: threading.Thread) -> None:
        """Until it has come to its next step, or its end; or to where it waits for others."""
        until = time.monotonic() + PROMPT
        while task.is_alive() and not self.stops.is_stopped(task.ident) and time.monotonic() < until:
            time.sleep(0.0005)
        self.look()

    def look(self) -> None:
        """Judge what has ended."""
        for each in [each for each in self.doing if not each.task.is_alive()]:
            self.doing.remove(each)
            try:
                result = each.task.result()
            except AccessDenied:
                assert each.what in ("read", "status"), each
                assert each.clusters & self.lost, "denied what was never given back"
                continue
            if each.what in ("read", "status"):
                assert not each.clusters & each.lost_before, "gave what was given back"
            if each.what == "read":
                assert result == self.before[each.offset : each.end], "not what it was"
            if each.what == "status":
                assert isinstance(result, list)
                for extent in result:
                    assert extent.must_read or not any(self.before[extent.offset : extent.end]), "no zeros there"

    def cut(self, offset: int, length: int) -> int:
        return min(length, SIZE - offset)

    def changes(self, offset: int, end: int, fill: int) -> bool:
        """Note a change of the guest's. Where another one is under way, either may be the last: not begun."""
        writing = [each for each in self.doing if each.what == "write"]
        if any(each.offset < end and offset < each.end for each in writing):
            return False
        for sector in range(-(-offset // 512), -(-end // 512)):
            self.may_be[sector] = {fill}
        return True

    @rule(offset=OFFSETS, length=LENGTHS, how=st.sampled_from(["pwritev", "pwritev", "pwrite_zeroes", "pdiscard"]))
    def write(self, offset: int, length: int, how: str) -> None:
        length = self.cut(offset, length)
        self.fill = self.fill % 255 + 1
        fill = self.fill if how == "pwritev" else 0
        if self.changes(offset, offset + length, fill):
            what = [bytearray([fill]) * length] if how == "pwritev" else length
            self.start("write", offset, length, getattr(self.node, how), offset, what)

    @rule(offset=OFFSETS, length=LENGTHS, status=st.sampled_from([False, False, True]))
    def look_at(self, offset: int, length: int, status: bool) -> None:
        length = self.cut(offset, length)
        if status:
            self.start("status", offset, length, lambda: list(self.snapshot.block_status(offset, length)))
        else:
            self.start("read", offset, length, self.snapshot.pread, offset, length)

    @rule(offset=OFFSETS, length=LENGTHS)
    def give_back(self, offset: int, length: int) -> None:
        length = self.cut(offset, length)
        self.lost |= {*range(-(-offset // CLUSTER), (offset + length) // CLUSTER)}
        self.start("give back", offset, length, self.snapshot.pdiscard, offset, length)

    @rule(numbers=st.lists(st.integers(0, 7), min_size=1, max_size=4))
    def go_on(self, numbers: list[int]) -> None:
        for number in numbers:
            if stopped := self.stops.stopped():
                self.let_go(stopped[number % len(stopped)])

    @rule(kind=st.sampled_from(["read", "read", "write", "give back", "status", ""]))
    def all_but_one_kind_go_on(self, kind: str) -> None:
        """As far as they come without those."""
        for _ in range(100):
            held = {each.task.ident for each in self.doing if each.what == kind}
            others = [thread for thread in self.stops.stopped() if thread not in held]
            if not others:
                return
            self.let_go(others[0])

    def let_go(self, thread: int) -> None:
        self.stops.let_go(thread)
        for each in self.doing:
            if each.task.ident == thread:
                self.settle(each.task)
                return

    @invariant()
    def judge(self) -> None:
        if hasattr(self, "stops"):
            self.look()

    def teardown(self) -> None:
        if not hasattr(self, "stops"):
            return
        self.stops.open()
        for each in self.doing:
            each.task.join(WAIT)
            assert not each.task.is_alive(), f"{each.what} hangs"
        self.look()
        self.node.close()
        assert [{byte} for byte in self.disk.content[::512]] == self.may_be
        for n in {*range(CLUSTERS)} - self.lost:
            length = self.cut(n * CLUSTER, CLUSTER)
            assert self.snapshot.pread(n * CLUSTER, length) == self.before[n * CLUSTER :][:length]
        taken = {block * BLOCK // CLUSTER for block in self.target.allocated}
        assert not taken & self.lost, "space was not given back"
        assert self.node.held == sum(CLUSTER for _ in taken)


TestSteps = Fleecing.TestCase
TestSteps.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
