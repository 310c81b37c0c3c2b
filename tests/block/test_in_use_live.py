"""Readers of an image while QEMU writes it, makes and deletes snapshots: nothing wrong, and nothing missing."""

from __future__ import annotations

import hashlib
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
from tests.support import guest, qemu_img
from tests.support.busy import BLOCK, BusyDisk, Key
from tests.support.qmp import RunningQemu, file_node

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


class GuestReader(threading.Thread):
    """Reads whole snapshots of the guest's disk, each several times: of one moment, and always the same."""

    def __init__(self, path: Path, doomed: set[str], done: threading.Event) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._path, self._doomed, self._done = path, doomed, done
        self._first: dict[tuple[Key, str], bytes] = {}

    def run(self) -> None:
        try:
            with qcow2snap.open(self._path, force_share=True) as image:
                known = list(image.snapshots)
                while not self._done.is_set():
                    self.count["refreshed"] += image.refresh()
                    known = known[-4:] + list(image.snapshots)
                    for snapshot in known:
                        try:
                            self._look_at(snapshot)
                        except SnapshotGone:
                            assert snapshot.name in self._doomed, "called gone while it stood"
                            self.count["gone"] += 1
        except BaseException as failure:
            self.failure = failure

    def _look_at(self, snapshot: qcow2snap.Snapshot) -> None:
        files = {"disk": snapshot.open()} | ({"vm state": snapshot.open_vm_state()} if snapshot.vm_state_size else {})
        for what, file in files.items():
            data = file.readall()
            digest = hashlib.sha256(data).digest()
            assert self._first.setdefault((key_of(snapshot.info), what), digest) == digest, "not what it was"
            if what == "disk":
                newest, *older = guest.generations(data)
                assert older in ([newest - 1], []), "of more than one moment"
            self.count[what] += 1


@pytest.mark.slow
def test_a_guest_that_runs_does_not_show_in_its_snapshots(tmp_path: Path) -> None:
    path, doomed, done = tmp_path / "disk.qcow2", set[str](), threading.Event()
    qemu_img("create", "-q", "-f", "qcow2", path, str(guest.SIZE))
    with RunningQemu(file_node(path), machine=guest.machine(tmp_path)) as qemu:
        time.sleep(1)  # until it has booted
        qemu.snapshot("kept")
        reader = GuestReader(path, doomed, done)
        reader.start()
        until = time.monotonic() + SECONDS
        number = 0
        while time.monotonic() < until and reader.is_alive():
            number += 1
            qemu.snapshot(f"disk-{number}")
            qemu.monitor(f"savevm live-{number}")
            doomed |= {f"disk-{number}", f"live-{number}"}  # from here on
            time.sleep(0.05)
            qemu.delete(f"disk-{number}")
            qemu.monitor(f"delvm live-{number}")
        done.set()
        reader.join()
    if reader.failure is not None:
        raise reader.failure
    assert number > 20
    assert reader.count["disk"] > 50
    assert reader.count["vm state"] > 5
    assert reader.count["gone"] > 5
