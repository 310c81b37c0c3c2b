"""Snapshots made, deleted, applied and renamed by us, with QEMU in between: what each holds, and that nothing leaks."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcow2snap.block.graph import open_image, open_writable
from qcow2snap.block.node import NodeInUse, NotSupported, SnapshotGone
from qcow2snap.block.qcow2.writing.node import WritableQcow2Node
from qcow2snap.block.snapshot_access import SnapshotAccessNode
from tests.block.writing import soundness
from tests.block.writing.recorded import Write, open_recorded
from tests.conftest import NewImage
from tests.support import qemu_img, qemu_io
from tests.support.table import read_table
from tests.support.tools import TIME_LIMIT

SIZE = 192 << 10

LAYOUTS = [
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k,refcount_bits=8",
    "cluster_size=4k,compat=0.10",
    "cluster_size=16k,extended_l2=on",
]


def contents_by_qemu(image: Path) -> tuple[bytes, dict[str, bytes]]:
    """The active disk, and each snapshot by its name: on a copy that is reverted to it."""
    raw = image.with_suffix(".raw")

    def read(path: Path) -> bytes:
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        return raw.read_bytes()

    snapshots = {}
    for entry in read_table(image):
        copy = image.with_suffix(".copy")
        copy.write_bytes(image.read_bytes())
        qemu_img("snapshot", "-a", entry.id, copy)
        snapshots[entry.name.decode()] = read(copy)
    return read(image), snapshots


class Model:
    """What an image should hold."""

    def __init__(self, size: int) -> None:
        self.disk = bytearray(size)
        self.snapshots: dict[str, bytes] = {}

    def write(self, offset: int, data: bytes) -> None:
        self.disk[offset : offset + len(data)] = data


steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["write", "write", "zero", "discard", "create", "create", "delete", "apply", "rename", "resize", "reopen"]
        ),
        st.integers(0, (1 << 16) - 1),
        st.integers(1, 40000),
    ),
    min_size=3,
    max_size=14,
)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=15)
@given(steps=steps, turns=st.booleans())
def test_any_sequence_leaves_what_qemu_would(
    tmp_path_factory: pytest.TempPathFactory, layout: str, steps: list[tuple[str, int, int]], turns: bool
) -> None:
    """With `turns`, QEMU's tools make every second change."""
    path = tmp_path_factory.mktemp("snapshots") / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", layout, path, str(SIZE))
    model, is_old = Model(SIZE), "compat=0.10" in layout
    node: WritableQcow2Node | None = None
    for number, (step, where, much) in enumerate(steps):
        theirs = turns and number % 2 == 1
        if theirs and node is not None:
            node.close()
            node = None
        if not theirs and node is None:
            node = open_writable(str(path))
        size, name = len(model.disk), f"s{number}"
        offset = where * size // (1 << 16) // 512 * 512
        length = min(max(512, much // 512 * 512), size - offset)
        names = sorted(model.snapshots)
        chosen = names[where % len(names)] if names else ""
        if step == "write":
            data = bytes([number + 1]) * length
            if node:
                node.pwritev(offset, [bytearray(data)])
            else:
                qemu_io(path, f"write -P {number + 1} {offset} {length}")
            model.write(offset, data)
        elif step in ("zero", "discard"):
            if node:
                node.pwrite_zeroes(offset, length, may_unmap=step == "discard")
            else:
                qemu_io(path, f"write -z {offset} {length}")
            model.write(offset, bytes(length))
        elif step == "create":
            if node:
                node.create_snapshot(name)
            else:
                qemu_img("snapshot", "-c", name, path)
            model.snapshots[name] = bytes(model.disk)
        elif step == "delete" and chosen:
            if node:
                node.delete_snapshot(node.find_snapshot(f"name={chosen}"))
            else:
                qemu_img("snapshot", "-d", chosen, path)
            del model.snapshots[chosen]
        elif step == "apply" and chosen:
            if node:
                node.apply_snapshot(node.find_snapshot(f"name={chosen}"))
            else:
                qemu_img("snapshot", "-a", chosen, path)
            model.disk[:] = model.snapshots[chosen]
        elif step == "rename" and chosen and node:
            node.rename_snapshot(node.find_snapshot(f"name={chosen}"), name)
            model.snapshots[name] = model.snapshots.pop(chosen)
        elif step == "resize" and size < 8 * SIZE and not (is_old and names):
            grown = size + length
            if node:
                node.resize(grown)
            else:
                qemu_img("resize", "-f", "qcow2", path, str(grown))
            model.disk.extend(bytes(length))
        elif step == "reopen" and node:
            node.close()
            node = None
        if node is None or step != "write":
            if node is not None:
                node.flush()
                assert node.pread(0, len(model.disk)) == model.disk
                for snapshot in node.snapshots():
                    assert (
                        SnapshotAccessNode(node, f"id={snapshot.id}").pread(0, snapshot.size)
                        == (model.snapshots[snapshot.name])
                    )
            soundness.check_file(path)
    if node is not None:
        node.close()
    assert qemu_img("check", path).returncode == 0
    assert contents_by_qemu(path) == (model.disk, model.snapshots)


# A crash


def test_a_crash_leaves_the_old_state_or_the_new_and_no_leak(new_image: NewImage) -> None:
    image = new_image("1M", cluster_size=4096)
    image.write(0, 300_000, 1).write(500_000, 100_000, 2, compressed=False).snapshot("first").write(4096, 65536, 3)
    chosen = random.Random(7)
    before = image.path.read_bytes()
    operations = {
        "create": lambda node: node.create_snapshot("second"),
        "delete": lambda node: node.delete_snapshot(node.find_snapshot("first")),
        "rename": lambda node: node.rename_snapshot(node.find_snapshot("first"), "other"),
        "apply": lambda node: node.apply_snapshot(node.find_snapshot("first")),
        "resize": lambda node: node.resize(64 << 20),
    }
    for name, operation in operations.items():
        image.file.write_bytes(before)
        node, log = open_recorded(image.file)
        old = state_of(node)
        operation(node)
        new = state_of(node)
        node.close()
        assert old != new
        seen = set()
        crashed = image.file.with_name("crashed.qcow2")
        for position in range(len(log.events) + 1):
            for attempt in range(8):
                state = log.crashed(position, chosen)[image.file] if attempt else log.state(position)[image.file]
                crashed.write_bytes(state)
                soundness.check(state)
                found = state_of(open_image(str(crashed)))
                assert found in (old, new), name
                seen.add(found == new)
                if attempt in (0, 1) or position > len(log.events) - 4:
                    # Not even a leak: QEMU says 0, where it would say 3 for that.
                    assert qemu_img("check", crashed, check=False).returncode == 0
        assert seen == {False, True}
        assert any(isinstance(event, Write) and event.offset == 24 for event in log.events)


def state_of(node: object) -> tuple[object, ...]:
    """The disk and all snapshots, by name."""
    from qcow2snap.block.qcow2.driver import Qcow2Node

    assert isinstance(node, Qcow2Node)
    snapshots = {
        snapshot.name: SnapshotAccessNode(node, f"id={snapshot.id}").pread(0, snapshot.size).rstrip(b"\0")
        for snapshot in node.snapshots()
    }
    state = node.size, node.pread(0, min(node.size, 1 << 20)), tuple(sorted(snapshots.items()))
    if not isinstance(node, WritableQcow2Node):
        node.close()
    return state


# What is told of a snapshot


def test_a_snapshot_is_told_as_qemu_tells_its_own(new_image: NewImage) -> None:
    image = new_image("1M").write(0, 65536).snapshot("theirs")
    node = open_writable(str(image.path))
    made = node.create_snapshot("ours", date_ns=1_234_567_890_123_456_789)
    node.close()
    assert (made.id, made.name, made.size, made.vm_state_size) == ("2", "ours", 1 << 20, 0)
    theirs, ours = read_table(image.path)
    assert (ours.date_sec, ours.date_nsec, ours.vm_clock_nsec) == (1_234_567_890, 123_456_789, 0)
    assert (ours.disk_size, ours.full_vm_state_size, ours.l1_size) == (theirs.disk_size, 0, theirs.l1_size)
    assert len(ours.extra) == len(theirs.extra) == 24
    image.delete("theirs")
    node = open_writable(str(image.path))
    assert node.create_snapshot("third").id == "3"
    node.close()


@pytest.mark.parametrize("bits", [1, 2])
def test_refcounts_that_are_full_refuse_a_snapshot_and_nothing_happens(new_image: NewImage, bits: int) -> None:
    image = new_image("1M", cluster_size=4096, refcount_bits=bits).write(0, 100_000)
    node = open_writable(str(image.path))
    made = [node.create_snapshot(f"s{number}") for number in range((1 << bits) - 2)]
    with pytest.raises(NotSupported, match="refcount"):
        node.create_snapshot("one too many")
    assert [snapshot.id for snapshot in node.snapshots()] == [snapshot.id for snapshot in made]
    node.pwritev(0, [bytearray(b"x" * 8192)])
    node.close()
    qemu_img("check", image.path)
    node = open_writable(str(image.path))
    for snapshot in made:
        node.apply_snapshot(snapshot)
        node.delete_snapshot(snapshot)
    node.close()
    qemu_img("check", image.path)


@pytest.mark.parametrize("name", ["", "taken", "n" * 256, "a\0b"])
def test_names_that_cannot_be_are_refused(new_image: NewImage, name: str) -> None:
    image = new_image("1M").snapshot("taken").snapshot("other")
    node = open_writable(str(image.path))
    with pytest.raises(NotSupported, match="name"):
        node.create_snapshot(name)
    with pytest.raises(NotSupported, match="name"):
        node.rename_snapshot(node.find_snapshot("other"), name)
    node.rename_snapshot(node.find_snapshot("taken"), "taken")
    node.close()
    assert [entry.name for entry in read_table(image.path)] == [b"taken", b"other"]


def test_the_larger_half_of_a_snapshot_is_not_lost(new_image: NewImage) -> None:
    """Grown, kept, and reverted to a smaller one: QEMU's tools read the larger with the size of the smaller."""
    image = new_image("1M").write(0, 65536, 1).snapshot("small").resize("2M").write(1 << 20, 1 << 20, 7).snapshot("big")
    node = open_writable(str(image.path))
    node.apply_snapshot(node.find_snapshot("small"))
    assert node.size == 1 << 20
    assert SnapshotAccessNode(node, "big").pread(1 << 20, 1 << 20) == b"\7" * (1 << 20)
    node.apply_snapshot(node.find_snapshot("big"))
    assert node.pread(1 << 20, 1 << 20) == b"\7" * (1 << 20)
    node.close()
    qemu_img("check", image.path)
    qemu_io(image.path, "read -P 7 1M 1M", "read -P 1 0 64k")


def test_version_2_does_not_resize_a_disk_that_has_snapshots(new_image: NewImage) -> None:
    image = new_image("1M", compat="0.10").snapshot("s")
    node = open_writable(str(image.path))
    with pytest.raises(NotSupported, match="version 2"):
        node.resize(2 << 20)
    node.close()
    assert qemu_img("resize", "-f", "qcow2", image.path, "2M", check=False).returncode == 1


def test_a_vm_state_does_not_become_a_part_of_a_disk_that_grows(new_image: NewImage) -> None:
    image = new_image("1M", cluster_size=512).write(0, 65536).savevm("running").revert("running")
    node = open_writable(str(image.path))
    node.resize(4 << 20)
    assert node.pread(1 << 20, 3 << 20) == bytes(3 << 20)
    node.close()
    qemu_img("check", image.path)
    assert image.vm_state("running")


def test_what_lies_behind_the_end_does_not_appear_when_the_disk_grows(new_image: NewImage) -> None:
    base = new_image("4M", name="base.qcow2").write(0, 4 << 20, 5)
    image = new_image("1M", backing=base).write(0, 1 << 20, 6).resize(1_000_448)
    node = open_writable(str(image.path))
    node.resize(3 << 20)
    assert node.pread(0, 1_000_448) == b"\6" * 1_000_448
    assert node.pread(1_000_448, (3 << 20) - 1_000_448).strip(b"\0") == b""
    node.close()
    qemu_img("check", image.path)


def test_zeros_at_the_end_of_a_disk_that_ends_within_a_subcluster(new_image: NewImage) -> None:
    image = new_image((1 << 20) + 1536, extended_l2=True).write(0, (1 << 20) + 1536, 1)
    node = open_writable(str(image.path))
    node.pwrite_zeroes((1 << 20) + 512, 1024)
    assert node.pread(1 << 20, 1536) == b"\1" * 512 + bytes(1024)
    node.close()
    qemu_img("check", image.path)


# While it is used


def test_a_snapshot_that_is_read_is_deleted_by_force_only_and_its_reader_hears_of_it(new_image: NewImage) -> None:
    image = new_image("1M", cluster_size=4096).write(0, 1 << 20, 1).snapshot("gone").write(0, 1 << 20, 2)
    node = open_writable(str(image.path))
    reader, other = SnapshotAccessNode(node, "gone"), SnapshotAccessNode(node, "gone")
    assert reader.pread(0, 4096) == b"\1" * 4096
    snapshot = node.find_snapshot("gone")
    other.close()
    for refused in (node.delete_snapshot, lambda each: node.rename_snapshot(each, "other")):
        with pytest.raises(NodeInUse, match="1 reader;"):
            refused(snapshot)
    assert reader.pread(4096, 4096) == b"\1" * 4096
    node.delete_snapshot(snapshot, force=True)
    node.create_snapshot("gone")
    with pytest.raises(SnapshotGone):
        reader.pread(0, 4096)
    reader.close()
    node.delete_snapshot(node.find_snapshot("gone"))
    node.close()
    qemu_img("check", image.path)


def test_each_write_is_in_a_snapshot_whole_or_not_at_all(new_image: NewImage) -> None:
    """Four guests write their parts over and over, each time in one write of many clusters, others read meanwhile."""
    part, guests = 96 << 10, 4
    image = new_image(guests * part, cluster_size=4096)
    node = open_writable(str(image.path))
    stop = threading.Event()
    failures: list[BaseException] = []

    def run(work: Callable[[int], None]) -> None:
        try:
            number = 0
            while not stop.is_set():
                number += 1
                work(number)
        except BaseException as error:
            failures.append(error)

    def guest(place: int) -> Callable[[int], None]:
        return lambda number: node.pwritev(place * part, [bytearray(number.to_bytes(2, "big") * (part // 2))])

    def reader(_number: int) -> None:
        for snapshot in node.snapshots():
            with contextlib.suppress(SnapshotGone):
                held = SnapshotAccessNode(node, snapshot).pread(0, guests * part)
                assert contents.setdefault(snapshot.id, held) == held

    contents: dict[str, bytes] = {}
    work = [*(guest(place) for place in range(guests)), reader, lambda _number: node.flush()]
    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    try:
        for number in range(25):
            node.create_snapshot(f"s{number}")
            if number % 3 == 2:
                node.delete_snapshot(node.find_snapshot(f"name=s{number - 1}"), force=True)
    finally:
        stop.set()
        for thread in threads:
            thread.join(TIME_LIMIT)
    assert not failures
    kept = {snapshot.name: SnapshotAccessNode(node, snapshot).pread(0, guests * part) for snapshot in node.snapshots()}
    node.close()
    for held in kept.values():
        for place in range(guests):
            written = held[place * part : (place + 1) * part]
            assert written == written[:2] * (part // 2)
    assert qemu_img("check", image.path).returncode == 0
    assert contents_by_qemu(image.path)[1] == kept
