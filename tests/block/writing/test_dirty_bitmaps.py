"""Dirty bitmaps while we write: at the end they hold what QEMU's would, and after a crash nobody believes them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qcow2snap.block.graph import open_writable
from qcow2snap.block.node import FileError, NoSpace, NotSupported
from qcow2snap.block.qcow2.bitmaps import read_bitmap_directory
from qcow2snap.block.qcow2.writing import dirty_bitmaps
from qcow2snap.block.qcow2.writing.node import WritableQcow2Node
from qcow2snap.block.qcow2.writing.recording_bitmap import RecordingBitmap
from tests.block.writing.recorded import Flush, RecordedFile, Write, open_recorded
from tests.block.writing.test_twins import OPERATIONS, Operation, Twins
from tests.conftest import NewImage
from tests.support import qemu_img, qemu_info, qemu_io
from tests.support.qemu_nbd import dirty_by_qemu

MIB = 1 << 20


def flags_of(path: Path, *options: str) -> dict[str, list[str]]:
    """By name, as qemu-img info says; `-U`: of an image that is open."""
    info = qemu_img("info", "--output=json", *options, path).json()
    return {each["name"]: each["flags"] for each in info["format-specific"]["data"].get("bitmaps", [])}


def add_bitmaps(path: Path, **granularities: str) -> None:
    for name, granularity in granularities.items():
        qemu_img("bitmap", "--add", "-g", granularity, path, name)


def test_what_is_written_zeroed_and_discarded_is_dirty(new_image: NewImage) -> None:
    path = new_image("8M", cluster_size=4096).path
    add_bitmaps(path, fine="512", coarse="64k", rests="4k")
    qemu_io(path, "write 0 1000")
    qemu_img("bitmap", "--disable", path, "rests")
    node = open_writable(str(path))
    node.pwritev(MIB, [memoryview(b"x" * 1000)])
    node.pwrite_zeroes(2 * MIB + 100, 5)
    node.pdiscard(3 * MIB, 8192)
    fine = [(0, 1024), (MIB, 1024), (2 * MIB, 512), (3 * MIB, 8192)]
    coarse = [(0, 65536), *((start, 65536) for start, _ in fine[1:])]
    assert list(node.dirty_bitmaps()) == ["fine", "coarse", "rests"]  # live, though the file says that they are in use
    assert list(node.dirty_extents("fine", 0, 8 * MIB)) == fine
    assert list(node.dirty_extents("coarse", 0, 8 * MIB)) == coarse
    assert list(node.dirty_extents("rests", 0, 8 * MIB)) == [(0, 4096)]
    assert list(node.dirty_extents("fine", 100, MIB)) == [(100, 924), (MIB, 100)]
    assert flags_of(path, "-U") == {"fine": ["in-use", "auto"], "coarse": ["in-use", "auto"], "rests": []}
    node.close()
    assert flags_of(path) == {"fine": ["auto"], "coarse": ["auto"], "rests": []}
    assert [dirty_by_qemu(path, name) for name in ("fine", "coarse", "rests")] == [fine, coarse, [(0, 4096)]]
    qemu_img("check", path)


def test_a_bitmap_is_marked_before_anything_else_is_written(new_image: NewImage) -> None:
    path = new_image("1M").path
    add_bitmaps(path, b="64k")
    node, log = open_recorded(path)
    node.pwritev(0, [memoryview(b"x")])
    mark, flush = log.events[:2]
    assert isinstance(mark, Write)
    assert mark.data == b"\0\0\0\3"
    assert isinstance(flush, Flush)
    node.close()
    assert flags_of(path) == {"b": ["auto"]}


def test_an_image_whose_disk_is_only_read_keeps_its_bitmaps_as_they_are(new_image: NewImage) -> None:
    path = new_image("1M").path
    add_bitmaps(path, b="64k")
    qemu_io(path, "write 0 64k")
    before = path.read_bytes()
    node = open_writable(str(path))
    assert list(node.dirty_extents("b", 0, MIB)) == [(0, 65536)]
    node.close()
    assert path.read_bytes() == before


def test_a_bitmap_that_was_in_use_stays_so(new_image: NewImage) -> None:
    """Whoever left it has not recorded all; what is written now is recorded in the others."""
    image = new_image("1M")
    add_bitmaps(image.path, lost="64k", kept="64k")
    node = open_writable(str(image.path))
    where = read_bitmap_directory(node.file, node.header)[0].host_offset
    node.close()
    image.patch(where + 12, b"\0\0\0\3")
    node = open_writable(str(image.path))
    node.pwritev(0, [memoryview(b"x")])
    assert list(node.dirty_bitmaps()) == ["kept"]
    node.close()
    assert flags_of(image.path) == {"lost": ["in-use", "auto"], "kept": ["auto"]}
    assert dirty_by_qemu(image.path, "kept") == [(0, 65536)]


def test_storing_again_and_again_takes_no_more_space(new_image: NewImage) -> None:
    path = new_image("64M", cluster_size=512).path
    add_bitmaps(path, b="512")
    sizes = []
    for number in range(6):
        node = open_writable(str(path))
        node.pwritev(number * 512, [memoryview(b"x" * 512)])
        node.close()
        sizes.append(path.stat().st_size)
        qemu_img("check", "-q", path)
    assert sizes[-1] <= sizes[1] + 5 * 512
    assert dirty_by_qemu(path, "b") == [(0, 6 * 512)]


def test_a_disk_that_is_full_at_the_end_loses_the_bitmaps_and_nothing_else(
    new_image: NewImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = new_image("1M").path
    add_bitmaps(path, b="64k")
    node, _ = open_recorded(path)
    node.pwritev(0, [memoryview(b"x" * 512)])
    node.flush()
    size, pwritev = path.stat().st_size, RecordedFile.pwritev

    def full(file: RecordedFile, offset: int, buffers: Sequence[memoryview]) -> None:
        if offset >= size:
            raise NoSpace("No space left on device")
        pwritev(file, offset, buffers)

    monkeypatch.setattr(RecordedFile, "pwritev", full)
    with pytest.raises(FileError, match="not all could be written when it was closed: No space left"):
        node.close()
    qemu_img("check", path)
    assert flags_of(path) == {"b": ["in-use", "auto"]}
    qemu_io(path, "read -P 120 0 512")


def test_bitmaps_that_would_take_too_much_memory_stay_marked(
    new_image: NewImage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = new_image("64M").path
    add_bitmaps(path, coarse="64k", fine="512")
    monkeypatch.setattr(dirty_bitmaps, "MAX_MEMORY", 8192)
    node = open_writable(str(path))
    node.pwritev(0, [memoryview(b"x")])
    assert list(node.dirty_bitmaps()) == ["coarse"]
    node.close()
    assert "dirty bitmap 'fine' is not kept up" in caplog.text
    assert flags_of(path) == {"coarse": ["auto"], "fine": ["in-use", "auto"]}


# Other changes of the image


def test_bitmaps_grow_with_the_disk_also_those_that_do_not_record(new_image: NewImage) -> None:
    paths = [new_image("1000k", name=name, cluster_size=512).path for name in ("a.qcow2", "b.qcow2")]
    for path in paths:
        add_bitmaps(path, fine="512", coarse="64k", rests="512")
        qemu_io(path, "write 999k 1k")
        qemu_img("bitmap", "--disable", path, "rests")
    node = open_writable(str(paths[0]))
    node.resize(5 * MIB)
    assert list(node.dirty_extents("rests", 0, 5 * MIB)) == [(999 << 10, 1024)]
    node.pwritev(4 * MIB, [memoryview(b"x" * 512)])
    node.close()
    qemu_img("resize", "-q", paths[1], "5M")
    qemu_io(paths[1], f"write {4 * MIB} 512")
    assert flags_of(paths[0]) == flags_of(paths[1]) == {"fine": ["auto"], "coarse": ["auto"], "rests": []}
    for name in ("fine", "coarse", "rests"):
        assert dirty_by_qemu(paths[0], name) == dirty_by_qemu(paths[1], name)
    qemu_img("check", paths[0])


def test_a_bitmap_that_is_in_use_forbids_another_size_as_in_qemu(new_image: NewImage) -> None:
    image = new_image("1M")
    add_bitmaps(image.path, b="64k")
    node = open_writable(str(image.path))
    image.patch(read_bitmap_directory(node.file, node.header)[0].host_offset + 12, b"\0\0\0\3")
    node.close()
    assert "inconsistent" in qemu_img("resize", image.path, "2M", check=False).stderr
    node = open_writable(str(image.path))
    with pytest.raises(NotSupported, match=r"dirty bitmap 'b' cannot: it is marked in use.*remove it first"):
        node.resize(2 * MIB)
    node.pwritev(0, [memoryview(b"x")])
    node.close()
    qemu_img("check", image.path)
    assert qemu_info(image.path)["virtual-size"] == MIB


def test_a_resize_that_fails_leaves_the_bitmaps_right(new_image: NewImage, monkeypatch: pytest.MonkeyPatch) -> None:
    path = new_image("1M").path
    add_bitmaps(path, b="64k")
    node = open_writable(str(path))
    node.pwritev(0, [memoryview(b"x")])

    def grow(_size: int) -> None:
        raise NoSpace("no room")

    with monkeypatch.context() as patched:
        patched.setattr(node._snapshots, "grow", grow)
        with pytest.raises(NoSpace):
            node.resize(64 * MIB)
    node.pwritev(512 << 10, [memoryview(b"x")])
    node.close()
    assert dirty_by_qemu(path, "b") == [(0, 65536), (512 << 10, 65536)]
    qemu_img("check", path)


def test_snapshots_come_and_go_beside_bitmaps_but_none_is_applied_as_in_qemu(new_image: NewImage) -> None:
    image = new_image("1M").write(0, 65536)
    add_bitmaps(image.path, b="64k")
    node = open_writable(str(image.path))
    snapshot = node.create_snapshot("s")
    node.pwritev(0, [memoryview(b"x")])
    with pytest.raises(NotSupported, match="bitmap"):
        node.apply_snapshot(snapshot)
    node.close()
    assert "dirty bitmaps" in qemu_img("snapshot", "-a", "s", image.path, check=False).stderr
    node = open_writable(str(image.path))
    node.delete_snapshot(node.find_snapshot("s"))
    node.close()
    qemu_img("check", image.path)
    assert dirty_by_qemu(image.path, "b") == [(0, 65536)]


@pytest.mark.parametrize("is_raw", [False, True])
def test_an_external_data_file_grows_with_the_disk(new_image: NewImage, tmp_path: Path, is_raw: bool) -> None:
    data = tmp_path / "data.raw"
    path = new_image("1000k", data_file=data, data_file_raw=is_raw).write(0, 1000 << 10, 7).path
    add_bitmaps(path, b="64k")
    if is_raw:
        with data.open("ab") as file:
            file.write(b"z" * 100_000)  # what a disk of this size does not have
    node = open_writable(str(path))
    node.resize(3 * MIB)
    assert node.pread(1000 << 10, (3 * MIB) - (1000 << 10)) == bytes((3 * MIB) - (1000 << 10))
    node.pwritev(2 * MIB, [memoryview(b"x" * 512)])
    node.close()
    assert data.stat().st_size == 3 * MIB
    qemu_img("check", path)
    qemu_io(path, "read -P 7 0 1000k", f"read -P 0 1000k {MIB}", "read -P 120 2M 512")
    if is_raw:
        qemu_img("compare", "-f", "qcow2", "-F", "raw", path, data)
    assert qemu_info(path)["virtual-size"] == 3 * MIB


# Turn by turn with QEMU

GROWTH = 70_144  # bytes; no multiple of a cluster
LAYOUTS = {
    "4k": "cluster_size=4k",
    "512": "cluster_size=512",
    "64k": "",
    "extended L2": "cluster_size=16k,extended_l2=on",
    "data file": "cluster_size=4k,data_file={name}.data",
}
BITMAPS = {"fine": "512", "usual": "64k", "off": "4k"}
CHANGES = st.sampled_from(["none", "snapshot", "delete", "resize", "disable", "enable"])
SESSIONS = st.lists(st.tuples(CHANGES, st.lists(OPERATIONS, min_size=1, max_size=6)), min_size=2, max_size=4)


class TwinsWithBitmaps(Twins):
    """Of which the bitmaps are equal as well. Snapshots and sizes change within a session, by whoever has it."""

    def __init__(self, folder: Path, layout: str) -> None:
        super().__init__(folder, LAYOUTS[layout])
        self.has_data_file = "data_file" in LAYOUTS[layout]
        self.size = int(qemu_info(self.paths[0])["virtual-size"])
        self.count = 0
        for path in self.paths:
            add_bitmaps(path, **BITMAPS)
            qemu_img("bitmap", "--disable", path, "off")

    def session(self, number: int, change: str, operations: list[Operation]) -> None:
        ours, theirs = self.paths[number % 2], self.paths[1 - number % 2]
        if change in ("disable", "enable"):
            for path in self.paths:
                qemu_img("bitmap", f"--{change}", path, "usual")
        if (change == "snapshot" and self.has_data_file) or (change == "delete" and not self.count):
            change = "none"
        self.count += {"snapshot": 1}.get(change, 0)
        self.size += GROWTH if change == "resize" else 0
        self._change_by_qemu(change, theirs)
        qemu_io(theirs, *(operation.by_qemu() for operation in operations))
        node = open_writable(str(ours))
        try:
            self._change_by_us(change, node)
            for operation in operations:
                self.by_us(node, operation)
            live = {name: list(node.dirty_extents(name, 0, node.size)) for name in node.dirty_bitmaps()}
        finally:
            node.close()
        self.count -= {"delete": 1}.get(change, 0)
        self.are_equal()
        assert flags_of(ours) == flags_of(theirs)
        assert live == {name: dirty_by_qemu(theirs, name) for name in BITMAPS}
        assert live == {name: dirty_by_qemu(ours, name) for name in BITMAPS}

    def _change_by_qemu(self, change: str, path: Path) -> None:
        if change == "snapshot":
            qemu_img("snapshot", "-c", f"s{self.count}", path)
        elif change == "delete":
            qemu_img("snapshot", "-d", f"s{self.count}", path)
        elif change == "resize":
            qemu_img("resize", "-q", "-f", "qcow2", path, str(self.size))

    def _change_by_us(self, change: str, node: WritableQcow2Node) -> None:
        if change == "snapshot":
            node.create_snapshot(f"s{self.count}")
        elif change == "delete":
            node.delete_snapshot(node.find_snapshot(f"s{self.count}"))
        elif change == "resize":
            node.resize(self.size)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(
    max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(sessions=SESSIONS)
def test_bitmaps_of_twins_stay_equal(layout: str, sessions: list[tuple[str, list[Operation]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        twins = TwinsWithBitmaps(Path(folder), layout)
        for number, (change, operations) in enumerate(sessions):
            twins.session(number, change, operations)


# In memory


def test_each_bit_is_what_a_set_of_units_would_say() -> None:
    chosen = random.Random(5)
    for _ in range(60):
        size, granularity = chosen.randrange(1, 40_000), chosen.choice([512, 1024, 4096])
        bitmap, units = RecordingBitmap(size, granularity), set()
        for _ in range(chosen.randrange(12)):
            offset = chosen.randrange(size)
            length = min(chosen.choice([0, 1, 512, 5000, 30_000]), size - offset)
            bitmap.set(offset, length)
            units |= set(range(offset // granularity, (offset + length - 1) // granularity + 1)) if length else set()
            if chosen.random() < 0.1:
                size += chosen.randrange(9000)
                bitmap.resize(size)
        expected = {unit * granularity for unit in units}
        found = list(bitmap.dirty(0, size))
        starts = {at for start, length in found for at in range(start, start + length, granularity)}
        assert starts == expected
        assert all(start + length <= size for start, length in found)
        again = RecordingBitmap(size, granularity)
        for index, part in enumerate(bitmap.clusters(16)):
            if part:
                again.load(index, part)
        assert list(again.dirty(0, size)) == found
