"""Readers of an image while QEMU writes it, makes and deletes snapshots: nothing wrong, and nothing missing."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow2snap
from qcow2snap.block.node import BlockNode, SnapshotGone, SnapshotInfo, Status
from tests.support.busy import BLOCK, BusyDisk, Key

SECONDS = 15
READERS = 2


def key_of(snapshot: SnapshotInfo) -> Key:
    return Key(snapshot.id, snapshot.name, snapshot.date_sec, snapshot.date_nsec, snapshot.vm_clock_nsec)


class Reader(threading.Thread):
    """One open image that is read for a while, snapshots that are long gone too."""

    def __init__(self, disk: BusyDisk, seed: int, deadline: float) -> None:
        super().__init__()
        self.disk = disk
        self.count: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._random = random.Random(seed)
        self._deadline = deadline
        self._gone: set[Key] = set()

    def run(self) -> None:
        try:
            with qcow2snap.open(self.disk.path, force_share=True) as image:
                known = list(image.snapshots)
                while time.monotonic() < self._deadline:
                    if self._random.random() < 0.1:
                        self.count["refreshed"] += image.refresh()
                        known = [old for old in known if old.name != "kept"][-6:] + list(image.snapshots)
                    snapshot = self._random.choice(known)
                    try:
                        self._look_at(snapshot.node, key_of(snapshot.info))
                    except SnapshotGone:
                        self.count["gone"] += 1
                        self._gone.add(key_of(snapshot.info))
                        assert key_of(snapshot.info) in self.disk.deleted, "called gone while it stood"
        except BaseException as failure:
            self.failure = failure

    def _look_at(self, node: BlockNode, key: Key) -> None:
        length = self._random.choice([512, BLOCK, BLOCK, 8 * BLOCK, 64 * BLOCK])
        offset = self._random.randrange(0, node.size - length + 1, 512)
        how = self._random.choice(["alone", "alone", "together", "mapped"])
        ranges = [(offset, length)]
        if how == "mapped":
            extents = list(node.block_status(offset, length))
            zeros = [(extent.offset, extent.length) for extent in extents if extent.status & Status.ZERO]
            got = [(start, bytes(count)) for start, count in zeros]
        else:
            if how == "together":
                ranges = [(self._random.randrange(0, node.size - length + 1, 512), length) for _ in range(8)]
            got = [(start, bytearray(count)) for start, count in ranges]
            for start, buffer in got:
                (node.preadv_unconfirmed if how == "together" else node.preadv)(start, [buffer])
            if how == "together":
                node.confirm()
        assert key not in self._gone, "back from the dead"
        for start, data in got:
            assert data == self.disk.expected(key, start, len(data)), f"wrong bytes at {start} of {key}"
            self.count["bytes"] += len(data)
        self.count["right"] += 1


@pytest.fixture(autouse=True)
def fair_threads() -> Iterator[None]:
    """QEMU waits for a thread of this process between any two commands: readers have to let it go on."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.slow
@pytest.mark.parametrize("discard", ["unmap", "ignore"])
def test_every_read_is_right_or_of_a_snapshot_that_was_deleted(tmp_path: Path, discard: str) -> None:
    with BusyDisk(tmp_path / "disk.qcow2", discard=discard) as disk:
        readers = [Reader(disk, seed, time.monotonic() + SECONDS) for seed in range(READERS)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    for reader in readers:
        if reader.failure is not None:
            raise reader.failure
        assert reader.count["right"] > 500
        assert reader.count["gone"] > 100
        assert reader.count["refreshed"] > 10
