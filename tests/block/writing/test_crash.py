"""Whatever moment a crash comes at, it leaves leaks at worst, and nothing that was flushed is lost.

More of the same, for as long as one likes: python -m tests.block.writing.crash
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.block.writing.crash import DISKS, Disk, judge_all, live, live_together
from tests.block.writing.recorded import open_recorded

SEEDS = (1, 2)
STEPS = 40
RANDOM_POINTS = 160
LEAST = 5000 // (len(DISKS) * len(SEEDS))  # crash points of each session, for 5,000 in all


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("disk", DISKS, ids=lambda disk: disk.name.replace(" ", "-"))
def test_a_crash_leaves_leaks_at_worst_and_all_that_was_flushed(disk: Disk, seed: int, tmp_path: Path) -> None:
    session = live(disk, tmp_path, seed, STEPS)
    assert judge_all(session, seed, RANDOM_POINTS, qemu_every=20) >= LEAST


def test_a_crash_in_a_short_life(tmp_path: Path) -> None:
    """The same in little, for `make check`."""
    session = live(DISKS[1], tmp_path, 7, 12)
    assert judge_all(session, 7, 40, qemu_every=10) > 40


@pytest.mark.slow
@pytest.mark.parametrize("disk", DISKS[:3], ids=lambda disk: disk.name.replace(" ", "-"))
def test_a_crash_while_several_guests_write_side_by_side(disk: Disk, tmp_path: Path) -> None:
    session = live_together(disk, tmp_path, 1, 40)
    assert judge_all(session, 1, 100, qemu_every=20) > 100


def test_a_clean_close_makes_durable_what_changed_no_table(tmp_path: Path) -> None:
    path = DISKS[0].make(tmp_path, 1)
    for data in (b"a" * 4096, b"b" * 4096):
        node, log = open_recorded(path)
        node.pwritev(8192, [memoryview(data)])
        node.close()
    lost = log.crashed(len(log.events), random.Random(1))  # nothing: all was flushed
    assert lost == {path: path.read_bytes()}
    assert b"b" * 4096 in lost[path]
