"""Snapshots of an image that QEMU writes: every read gives what the snapshot held, or says that it is gone.

The writes are real ones, logged by QEMU and replayed here one at a time: between two reads of the file, and between any
two steps of one of our reads.
"""

from __future__ import annotations

import os
import random

import pytest

import qcow2snap
from qcow2snap.block.graph import OpenOptions, open_image
from qcow2snap.block.node import ImageFormatError, ImageInUse, SnapshotGone, SnapshotInfo, Status
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.forensics.copy import copy_sparse
from qcow2snap.forensics.digest import Subject, digests
from tests.block.replay import History, Replay, key_of, record
from tests.conftest import NewImage
from tests.support import Image, table

KIB = 1 << 10
SIZE = 96 * KIB  # three L2 tables of 64 clusters of 512 bytes
IN_USE = OpenOptions(force_share=True)


def busy_day(disk: History) -> None:
    """Snapshots come and go, also under one name and id, and their clusters are used again."""
    plain = 80 * KIB
    fresh = iter(range(plain, SIZE, KIB))  # where compressed clusters can be written
    disk.write(0, plain, 1)
    disk.write(next(fresh), KIB, 2, compressed=True)
    disk.snapshot("first")
    disk.write(16 * KIB, 48 * KIB, 3)
    disk.snapshot("kept")
    disk.write(0, 40 * KIB, 4)
    disk.write(next(fresh), KIB, 5, compressed=True)
    disk.discard(70 * KIB, 8 * KIB)
    disk.snapshot("third")
    disk.write(8 * KIB, 64 * KIB, 6)
    disk.delete("first")  # the others move in the table
    disk.write(0, plain, 7)
    disk.snapshot("again")
    for value in range(10, 15):
        disk.write((value - 8) * KIB, 60 * KIB, value)
        disk.delete("again")
        start = next(fresh)
        disk.write(start, KIB, value + 50, compressed=True)
        disk.snapshot("again")
        disk.write(0, start + 512, value + 100)
    disk.resize(4096 * KIB)  # more than the L1 table has room for
    disk.write(3000 * KIB, 64 * KIB, 21)
    disk.delete("third")
    disk.write(200 * KIB, 100 * KIB, 22)
    disk.snapshot("large")
    disk.delete("again")
    disk.write(0, plain, 23)


@pytest.fixture(scope="module", params=["unmap", "ignore"])
def replay(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    return record(
        tmp_path_factory.mktemp("replay"), SIZE, busy_day, discard=request.param, cluster_size=512, refcount_bits=16
    )


class Reader:
    """One open image, and every answer of it held against what QEMU had in each snapshot."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.node: Qcow2Node = open_image(str(replay.path), IN_USE)
        self.seen: list[SnapshotInfo] = list(self.node.snapshots())
        self.right = self.gone = 0

    def refresh(self) -> None:
        self.node.refresh()
        self.seen += [snapshot for snapshot in self.node.snapshots() if key_of(snapshot) not in map(key_of, self.seen)]

    def read(self, snapshot: SnapshotInfo, offset: int, length: int, *, unconfirmed: bool = False) -> None:
        buffer, began = bytearray(length), self.replay.position
        try:
            if unconfirmed:
                self.node.preadv_snapshot_unconfirmed(snapshot, offset, [buffer])
                self.node.confirm_snapshot(snapshot)
            else:
                self.node.preadv_snapshot(snapshot, offset, [buffer])
        except SnapshotGone:
            self._check_gone(snapshot)
            return
        assert key_of(snapshot) in self.replay.standing[began], "read although it was gone"
        assert buffer == self.replay.contents[key_of(snapshot)][offset : offset + length]
        self.right += 1

    def map(self, snapshot: SnapshotInfo) -> None:
        content, offset, began = self.replay.contents[key_of(snapshot)], 0, self.replay.position
        try:
            for extent in self.node.snapshot_block_status(snapshot, 0, snapshot.size):
                assert key_of(snapshot) in self.replay.standing[began], "mapped although it was gone"
                assert extent.offset == offset
                offset = extent.end
                if extent.status & Status.ZERO:
                    assert not any(content[extent.offset : extent.end])
        except SnapshotGone:
            self._check_gone(snapshot)
            return
        assert offset == snapshot.size

    def compare(self, since: SnapshotInfo, state: SnapshotInfo) -> None:
        began, both = self.replay.position, {key_of(since), key_of(state)}
        try:
            changes = list(self.node.changes(since, state))
        except SnapshotGone:
            assert not both <= self.replay.standing[self.replay.position], "called gone while both stood"
            return
        assert both <= self.replay.standing[began], "compared although one was gone"
        was, now = (bytearray(self.replay.contents[key_of(each)]) for each in (since, state))
        for change in changes:
            for content in (was, now):
                content[change.offset : change.end] = bytes(len(content[change.offset : change.end]))
        assert was.rstrip(b"\0") == now.rstrip(b"\0")

    def _check_gone(self, snapshot: SnapshotInfo) -> None:
        assert key_of(snapshot) not in self.replay.standing[self.replay.position], "called gone while it stood"
        self.gone += 1

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.node.close()


@pytest.mark.parametrize("refreshing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_between_any_two_writes_a_snapshot_reads_right_or_is_gone(replay: Replay, refreshing: bool) -> None:
    first = next(position for position, keys in enumerate(replay.standing) if len(keys) >= 3)
    for start in (first,) if refreshing else range(first, len(replay.writes), 150):
        replay.go_to(start)
        with Reader(replay) as reader:
            while replay.position < len(replay.writes):
                for snapshot in reader.seen:
                    reader.read(snapshot, 0, snapshot.size)
                    reader.map(snapshot)
                    reader.compare(reader.seen[0], snapshot)
                replay.advance()
                if refreshing:
                    reader.refresh()
        if refreshing:
            assert len(reader.seen) >= 10
            assert reader.right > 100
            assert reader.gone > 100


@pytest.mark.parametrize("pace", [0.02, 0.2, pytest.param(0.7, marks=pytest.mark.slow)])
def test_between_any_two_steps_of_a_read_too(replay: Replay, monkeypatch: pytest.MonkeyPatch, pace: float) -> None:
    right = gone = 0
    for seed in range(100):
        chance = random.Random(seed)

        def tick(chance: random.Random = chance) -> None:
            while chance.random() < pace:
                replay.advance(chance.choice([1, 1, 1, 2, 5, 30]))

        replay.go_to(chance.randrange(len(replay.writes)))
        with replay.ticking(monkeypatch, tick), Reader(replay) as reader:
            for _ in range(12):
                if chance.random() < 0.2:
                    reader.refresh()
                if not reader.seen:
                    continue
                snapshot = chance.choice(reader.seen)
                offset = chance.randrange(snapshot.size)
                length = chance.choice([1, 700, 9000, snapshot.size])
                if chance.random() < 0.2:
                    reader.map(snapshot)
                if chance.random() < 0.2:
                    reader.compare(snapshot, chance.choice(reader.seen))
                length = min(length, snapshot.size - offset)
                reader.read(snapshot, offset, length, unconfirmed=chance.random() < 0.5)
        right, gone = right + reader.right, gone + reader.gone
    assert right > 100
    assert gone > 20


# One thing at a time, with qemu-img as the writer


def same_name_again(image: Image, name: str) -> None:
    image.delete(name)
    image.write(0, 64 * KIB, 0xEE).snapshot(name).write(0, 64 * KIB, 0xDD)


def test_another_snapshot_of_the_same_name_and_id_is_another_one(new_image: NewImage) -> None:
    image = new_image("1M").write(0, 64 * KIB, 0x11).snapshot("daily")
    with qcow2snap.open(image.path, force_share=True) as opened:
        daily = opened.snapshot("daily")
        with daily.open() as file:
            assert file.read(1) == b"\x11"
            same_name_again(image, "daily")
            with pytest.raises(SnapshotGone, match=r'disk.qcow2: snapshot "daily" \(id 1\) was deleted'):
                file.read(1)
            assert opened.refresh()
            assert opened.snapshot("daily").id == daily.id
            assert opened.snapshot("daily").open().read(1) == b"\xee"
            for _ in range(2):
                with pytest.raises(SnapshotGone):
                    file.read(1)
                with pytest.raises(SnapshotGone):
                    list(daily.extents())


def test_vm_states_are_confirmed_as_disks_are(new_image: NewImage) -> None:
    image = new_image("1M").savevm("frozen")
    state = image.vm_state("frozen")
    with qcow2snap.open(image.path, force_share=True) as opened, opened.snapshot("frozen").open_vm_state() as file:
        assert file.read() == state
        image.delete("frozen").write(0, 1 << 20)
        file.seek(0)
        with pytest.raises(SnapshotGone):
            file.read(1)


def test_a_snapshot_stays_readable_as_others_come_and_go(new_image: NewImage) -> None:
    image = new_image("1M").write(0, 64 * KIB, 0x11).snapshot("before").snapshot("kept")
    with qcow2snap.open(image.path, force_share=True) as opened:
        kept = opened.snapshot("kept")
        image.delete("before").resize("2M").write(1 << 20, 64 * KIB, 0x22).snapshot("later")
        with kept.open() as file:
            assert file.read(4) == b"\x11" * 4
            assert opened.refresh()
            assert not opened.refresh()
            file.seek(0)
            assert file.read(4) == b"\x11" * 4
        assert [(s.name, s.size) for s in opened.snapshots] == [("kept", 1 << 20), ("later", 2 << 20)]
        assert opened.snapshot("later").open().readall() == image.reference("later").read()


@pytest.mark.parametrize("extra", [0, 8, 16], ids="extra={}".format)
def test_a_table_that_an_older_qemu_wrote_may_be_written_anew(new_image: NewImage, extra: int) -> None:
    compat = "1.1" if extra == 16 else "0.10"
    image = new_image("1M", compat=compat).write(0, 64 * KIB, 0x11).snapshot("old")
    (entry,) = image.entries
    entry.extra = entry.extra[:extra]
    image.patch(entry.host_offset, entry.build())
    with qcow2snap.open(image.path, force_share=True) as opened:
        old = opened.snapshot("old")
        image.write(0, 64 * KIB, 0x22).snapshot("new")
        assert len(image.entries[0].extra) == 24
        assert old.open().read(1) == b"\x11"
        assert opened.refresh()
        assert old.open().read(1) == b"\x11"


def test_what_lies_between_entries_does_not_matter(new_image: NewImage) -> None:
    image = new_image("1M").write(0, 64 * KIB, 0x11).snapshot("a")
    (entry,) = image.entries
    with qcow2snap.open(image.path, force_share=True) as opened:
        snapshot = opened.snapshot("a")
        table.write_table(image.path, [entry])
        offset = image.entries[0].host_offset
        image.patch(offset + 66, b"\xff" * 6)
        assert snapshot.open().read(1) == b"\x11"


def test_damage_of_a_snapshot_that_stands_is_damage(new_image: NewImage) -> None:
    image = new_image("1M").write(0, 64 * KIB, 0x11).snapshot("a")
    with qcow2snap.open(image.path, force_share=True) as opened:
        (l2_table,) = opened.node.l1_table(opened.snapshot("a").info).offsets
        image.patch(l2_table, (0x8000000000010200).to_bytes(8, "big"))
        with pytest.raises(ImageFormatError, match="L2 entry"):
            opened.snapshot("a").open().read(1)


def test_a_table_that_is_lost_for_good_is_no_endless_wait(new_image: NewImage) -> None:
    image = new_image("1M").write(0, 64 * KIB, 0x11).snapshot("a")
    with qcow2snap.open(image.path, force_share=True) as opened:
        snapshot = opened.snapshot("a")
        image.patch(image.entries[0].host_offset, bytes(4096))
        with pytest.raises(ImageInUse, match="kept changing, or is damaged"):
            snapshot.open().read(1)


def test_another_image_in_the_same_file_is_not_taken_for_it(new_image: NewImage) -> None:
    image, other = new_image("1M").snapshot("a"), new_image("1M", cluster_size=4096)
    with qcow2snap.open(image.path, force_share=True) as opened:
        image.path.write_bytes(other.path.read_bytes())
        with pytest.raises(ImageInUse, match="another image"):
            opened.refresh()


def test_an_image_that_is_locked_is_not_looked_at_again(new_image: NewImage) -> None:
    with qcow2snap.open(new_image("1M").snapshot("a").path) as opened:
        assert not opened.snapshot("a").node.must_confirm
        assert not opened.refresh()


# Whoever reads past the driver


def test_extract_leaves_nothing_of_a_snapshot_that_is_gone(
    new_image: NewImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = new_image("8M").write(0, 8 << 20).snapshot("a").write(0, 8 << 20, 0x55)
    out = image.file.with_name("out.raw")
    with qcow2snap.open(image.path, force_share=True) as opened:
        node = opened.snapshot("a").node
        list(node.block_status(0, node.size))  # the tables are known
        deleted = []
        write = os.pwrite

        def delete_and_write(fd: int, data: memoryview, offset: int) -> int:
            if not deleted:
                image.delete("a").write(0, 8 << 20, 0xEE).path  # noqa: B018  # takes effect
            deleted.append(offset)
            return write(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", delete_and_write)
        with out.open("wb") as file, pytest.raises(SnapshotGone):
            copy_sparse(node, 0, node.size, file.fileno(), workers=1)
    assert image.references == []
    assert b"\xee" not in out.read_bytes()


def test_digest_hashes_nothing_that_is_not_the_snapshots(new_image: NewImage) -> None:
    image = new_image("1M").write(0, 1 << 20).snapshot("a").snapshot("b").write(0, 1 << 20, 0x55)
    with qcow2snap.open(image.path, force_share=True) as opened:
        subjects = [Subject(opened.node.view(s.info), {}, s.info) for s in opened.snapshots]
        assert len({str(digest) for digest in digests(subjects, ["sha256"])}) == 1
        image.delete("b")
        digests(subjects[:1], ["sha256"])
        with pytest.raises(SnapshotGone, match='"b"'):
            digests(subjects, ["sha256"])


def test_of_a_block_device_nothing_is_read_from_a_stale_page_cache(
    new_image: NewImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the calls can be seen here: a device that is written past its page cache is nothing that a test can have."""
    image = new_image("1M").write(0, 64 * KIB, 0x11).snapshot("a")
    dropped: list[tuple[int, int]] = []
    advise = os.posix_fadvise

    def record_advice(fd: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((offset, offset + length))
        advise(fd, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", record_advice)
    with qcow2snap.open(image.path, force_share=True) as opened:
        (extent,) = opened.snapshot("a").extents(0, 64 * KIB)
        opened.node.file.drops_cache = True
        buffer = bytearray(64 * KIB)
        opened.snapshot("a").node.preadv(0, [buffer])
        assert buffer == b"\x11" * (64 * KIB)
        assert dropped[-2][0] == 0  # the header, and last the entry
        assert all(each.file is None for each in opened.snapshot("a").extents())  # for nobody to read past the node
    assert all(start % 4096 == 0 for start, _ in dropped)
    assert any(start <= extent.file_offset and extent.file_offset + 64 * KIB <= end for start, end in dropped)
