"""Which images are written, and what happens to one before and after: header marks, bitmaps, refcounts, locks."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2snap.block.graph import open_image, open_writable
from qcow2snap.block.node import ImageFormatError, ImageInUse, OutOfRange, UnsupportedFeature
from qcow2snap.block.qcow2.bitmaps import read_bitmap_directory
from qcow2snap.block.qcow2.writing.node import WritableQcow2Node
from tests.conftest import NewImage
from tests.support import qemu_img, qemu_info, qemu_io, table

DIRTY, CORRUPT = 1, 2
INCOMPATIBLE, AUTOCLEAR = 72, 88  # in the header


@contextmanager
def writing(path: Path) -> Iterator[WritableQcow2Node]:
    node = open_writable(str(path))
    try:
        yield node
    finally:
        node.close()


def is_sound(path: Path) -> bool:
    return qemu_img("check", "-q", path, check=False).returncode == 0


def test_an_image_that_is_only_opened_is_not_changed(new_image: NewImage) -> None:
    path = new_image("1M").write(0, 100_000).snapshot("s").patch(AUTOCLEAR, struct.pack(">Q", 1 << 40)).path
    before = path.read_bytes()
    with writing(path) as node:
        assert node.pread(0, 512) != bytes(512)
        node.flush()
    assert path.read_bytes() == before


def test_unknown_autoclear_bits_are_cleared_by_the_first_write(new_image: NewImage) -> None:
    path = new_image("1M").patch(AUTOCLEAR, struct.pack(">Q", 1 << 40)).path
    with writing(path) as node:
        node.pwritev(0, [memoryview(b"x")])
        assert table.field(path, AUTOCLEAR) == 0
    assert is_sound(path)


@pytest.mark.parametrize("change", ["snapshot", "resize", "repair"])
def test_so_they_are_by_any_other_change(new_image: NewImage, change: str) -> None:
    image = new_image("1M").patch(AUTOCLEAR, struct.pack(">Q", 1 << 40))
    if change == "repair":
        image.patch(INCOMPATIBLE, struct.pack(">Q", DIRTY))
    with writing(image.path) as node:
        if change == "snapshot":
            node.create_snapshot("s")
        elif change == "resize":
            node.resize(2 << 20)
    assert table.field(image.path, AUTOCLEAR) == 0
    assert is_sound(image.path)


@pytest.mark.parametrize("layout", [{}, {"cluster_size": 512, "refcount_bits": 1}, {"extended_l2": True}])
def test_a_dirty_image_gets_its_refcounts_back(new_image: NewImage, layout: dict[str, object]) -> None:
    image = new_image("4M", lazy_refcounts=True, **layout)
    if "refcount_bits" not in layout:
        image.write(0, 300_000).snapshot("s")
    path = image.path
    qemu_io(path, "write -P 5 100000 2000000", "flush", "abort", check=False)
    assert table.field(path, INCOMPATIBLE) & DIRTY
    with writing(path) as node:
        assert node.pread(100_000, 2_000_000) == b"\5" * 2_000_000
        node.pwritev(3_000_000, [memoryview(b"x" * 100_000)])
    assert not table.field(path, INCOMPATIBLE) & DIRTY
    assert is_sound(path)


def test_a_dirty_image_whose_snapshot_lost_its_l1_table_is_refused(new_image: NewImage) -> None:
    image = new_image("1M", lazy_refcounts=True).write(0, 65536).snapshot("s")
    path = image.path
    end = -(-path.stat().st_size // 65536) * 65536
    image.patch(table.field(path, 64), struct.pack(">Q", end))  # the snapshot's l1_table_offset
    image.patch(INCOMPATIBLE, struct.pack(">Q", DIRTY))
    with path.open("rb+") as file:
        file.truncate(end + 3)
    with pytest.raises(ImageFormatError, match=f"{path.name}: the L1 table at {end:#x} reaches beyond the end"):
        open_writable(str(path))


def test_a_dirty_image_whose_bitmap_lost_its_table_is_refused(new_image: NewImage) -> None:
    image = new_image("1M", lazy_refcounts=True)
    path = image.path
    qemu_img("bitmap", "--add", path, "b")
    end = -(-path.stat().st_size // 65536) * 65536
    with writing(path) as node:
        (info,) = read_bitmap_directory(node.file, node.header)
    image.patch(info.host_offset, struct.pack(">Q", end))
    image.patch(INCOMPATIBLE, struct.pack(">Q", DIRTY))
    with path.open("rb+") as file:
        file.truncate(end + 3)
    with pytest.raises(ImageFormatError, match=f"{path.name}: dirty bitmap 'b' has a table that reaches beyond"):
        open_writable(str(path))


def test_a_dirty_image_whose_bitmap_has_a_table_of_an_impossible_size_is_refused(new_image: NewImage) -> None:
    image = new_image("1M", lazy_refcounts=True)
    qemu_img("bitmap", "--add", image.path, "b")
    with writing(image.path) as node:
        (info,) = read_bitmap_directory(node.file, node.header)
    image.patch(info.host_offset + 8, b"\xff" * 4)  # bitmap_table_size: 32 GiB of entries
    image.patch(INCOMPATIBLE, struct.pack(">Q", DIRTY))
    with pytest.raises(UnsupportedFeature, match=f"{image.path.name}: .* 'b' take more than 512 MiB"):
        open_writable(str(image.path))


def test_a_dirty_image_that_refers_to_the_cluster_behind_the_end_of_the_file_is_refused(new_image: NewImage) -> None:
    """A file ends within its last cluster at the earliest; qemu-img check says the same of these two."""
    for beyond in (0, 1):
        image = new_image("1M", name=f"{beyond}.qcow2", lazy_refcounts=True).write(0, 65536).write(65536, 65536)
        path = image.path
        last = -(-path.stat().st_size // 65536) - 1
        with path.open("rb+") as file:
            file.truncate((last << 16) + 3)
        image.patch(_l2_entry(path), struct.pack(">Q", 1 << 63 | last + beyond << 16))
        image.patch(_l2_entry(path) + 8, bytes(8)).patch(INCOMPATIBLE, struct.pack(">Q", DIRTY))
        judged = json.loads(qemu_img("check", "--output=json", image.copy("judged.qcow2"), check=False).stdout)
        assert (judged.get("corruptions", 0) > 0) == bool(beyond)
        if beyond:
            with pytest.raises(ImageFormatError, match=f"cluster {last + 1} is referred to, beyond the end"):
                open_writable(str(path))
        else:
            open_writable(str(path)).close()
            assert is_sound(path)


def test_a_dirty_image_is_not_repaired_by_a_reader(new_image: NewImage) -> None:
    path = new_image("1M", lazy_refcounts=True).path
    qemu_io(path, "write 0 65536", "flush", "abort", check=False)
    before = path.read_bytes()
    open_image(str(path)).close()
    assert path.read_bytes() == before


def test_an_image_that_is_marked_corrupt_is_refused(new_image: NewImage) -> None:
    path = new_image("1M").patch(INCOMPATIBLE, struct.pack(">Q", CORRUPT)).path
    with pytest.raises(UnsupportedFeature, match="marked corrupt and cannot be written"):
        open_writable(str(path))
    open_image(str(path)).close()


def test_an_encrypted_image_is_refused(new_image: NewImage) -> None:
    path = new_image("1M").patch(32, struct.pack(">I", 1)).path
    with pytest.raises(UnsupportedFeature, match="encrypted"):
        open_writable(str(path))


def test_a_damaged_snapshot_table_is_refused(new_image: NewImage) -> None:
    image = new_image("1M").snapshot("s")
    image.patch(60, struct.pack(">I", 2))
    with pytest.raises(UnsupportedFeature, match="snapshot table is damaged"):
        open_writable(str(image.path))


@pytest.mark.parametrize(
    ("offset", "what"),
    [(48, struct.pack(">Q", 0x10001)), (56, struct.pack(">I", 0)), (56, struct.pack(">I", 1 << 30))],
    ids=["not aligned", "empty", "too large"],
)
def test_a_refcount_table_that_cannot_be_right_is_refused(new_image: NewImage, offset: int, what: bytes) -> None:
    image = new_image("1M").patch(offset, what)
    with pytest.raises(ImageFormatError, match="refcount table"):
        open_writable(str(image.path))


def _l2_entry(path: Path) -> int:
    """Where the first L2 entry is."""
    return table.field(path, table.field(path, 40)) & 0x00FFFFFFFFFFFE00


@pytest.mark.parametrize("where", ["header", "refcount table", "refcount block", "active L1 table", "active L2 table"])
def test_a_write_that_would_overwrite_metadata_is_refused_and_the_image_marked(new_image: NewImage, where: str) -> None:
    image = new_image("1M").write(0, 65536).write(65536, 65536)
    path = image.path
    entry = _l2_entry(path)
    target = {
        "header": 0,
        "refcount table": table.field(path, 48),
        "refcount block": table.field(path, table.field(path, 48)),
        "active L1 table": table.field(path, 40),
        "active L2 table": entry,
    }[where]
    image.patch(entry, struct.pack(">Q", target | 1 << 63))
    with writing(path) as node:
        before = path.read_bytes()
        with pytest.raises(ImageFormatError, match=where):
            node.pwritev(0, [memoryview(b"x" * 512)])
        with pytest.raises(ImageFormatError, match=where):  # nor anything else from then on
            node.pwritev(500_000, [memoryview(b"x" * 512)])
    after = path.read_bytes()
    assert before[:72] == after[:72]
    assert before[80:] == after[80:]
    assert qemu_info(path)["format-specific"]["data"]["corrupt"] is True


@pytest.mark.parametrize("layout", [{}, {"extended_l2": True}], ids=["standard", "subclusters"])
@pytest.mark.parametrize("change", ["write", "zeroes", "discard"])
def test_an_entry_that_cannot_be_right_is_named_by_its_place(
    new_image: NewImage, change: str, layout: dict[str, bool]
) -> None:
    image = new_image("1M", **layout).write(0, 1 << 20)
    path = image.path
    where = _l2_entry(path) + 3 * (16 if layout else 8)
    image.patch(where, struct.pack(">Q", 1 << 63 | 0x50200))
    with writing(path) as node:
        do = {
            "write": lambda: node.pwritev(3 << 16, [memoryview(b"x" * 512)]),
            "zeroes": lambda: node.pwrite_zeroes(0, 1 << 20),
            "discard": lambda: node.pdiscard(0, 1 << 20),
        }[change]
        with pytest.raises(ImageFormatError, match=f"none that the disk can have.*{where:#x}"):
            do()
    assert qemu_info(path)["format-specific"]["data"]["corrupt"] is True


@pytest.mark.parametrize("change", ["write", "write elsewhere", "zeroes", "discard"])
def test_a_subcluster_that_is_both_data_and_zeros_is_refused_as_by_a_read(new_image: NewImage, change: str) -> None:
    image = new_image("1M", extended_l2=True).write(0, 65536)
    path = image.path
    where = _l2_entry(path)
    image.patch(where + 8, struct.pack(">Q", 1 << 32 + 3 | 0xFFFFFFFF))
    reader = open_image(str(path))
    with pytest.raises(ImageFormatError):
        reader.pread(0, 512)
    reader.close()
    with writing(path) as node:
        do = {
            "write": lambda: node.pwritev(3 << 11, [memoryview(b"x" * 512)]),
            "write elsewhere": lambda: node.pwritev(9 << 11, [memoryview(b"x" * 512)]),
            "zeroes": lambda: node.pwrite_zeroes(9 << 11, 2048),
            "discard": lambda: node.pdiscard(0, 65536),
        }[change]
        with pytest.raises(ImageFormatError, match=f"none that the disk can have.*{where:#x}"):
            do()
    assert qemu_info(path)["format-specific"]["data"]["corrupt"] is True


def test_an_allocation_over_metadata_is_refused_and_the_image_marked(new_image: NewImage) -> None:
    """A refcount block that forgot the L2 table."""
    image = new_image("1M").write(0, 65536)
    path = image.path
    block = table.field(path, table.field(path, 48))
    image.patch(block + 2 * (_l2_entry(path) // 65536), bytes(2))
    with writing(path) as node, pytest.raises(ImageFormatError, match="active L2 table"):
        node.pwritev(500_000, [memoryview(b"x" * 512)])
    assert qemu_info(path)["format-specific"]["data"]["corrupt"] is True


def test_others_are_kept_out_while_it_is_written(new_image: NewImage) -> None:
    path = new_image("1M").write(0, 512).path
    with writing(path):
        for command in (["info", path], ["check", path], ["snapshot", "-c", "s", path]):
            result = qemu_img(*command, check=False)
            assert result.returncode != 0
            assert "lock" in result.stderr
        with pytest.raises(ImageInUse):
            open_writable(str(path))
        with pytest.raises(ImageInUse):
            open_image(str(path))
        qemu_img("info", "-U", path)
    qemu_img("info", path)


def test_an_image_that_somebody_reads_is_not_written(new_image: NewImage) -> None:
    path = new_image("1M").path
    reader = open_image(str(path))
    with pytest.raises(ImageInUse):
        open_writable(str(path))
    reader.close()


def test_what_lies_beyond_the_disk_is_out_of_range(new_image: NewImage) -> None:
    with writing(new_image("1M").path) as node:
        for change in (lambda: node.pwritev((1 << 20) - 1, [memoryview(b"xx")]), lambda: node.pdiscard(1 << 20, 1)):
            with pytest.raises(OutOfRange):
                change()


def test_space_that_is_discarded_goes_back_to_the_file_system(new_image: NewImage) -> None:
    path = new_image("32M").write(0, 32 << 20, 7).path
    with writing(path) as node:
        before = path.stat().st_blocks * 512
        node.pdiscard(0, 16 << 20)
        node.flush()
        assert before - path.stat().st_blocks * 512 > 15 << 20
        node.pwrite_zeroes(16 << 20, 8 << 20, may_unmap=True)
        node.flush()
        assert before - path.stat().st_blocks * 512 > 23 << 20
        allocated = path.stat().st_size
        node.pwritev(0, [memoryview(b"x" * (20 << 20))])
    assert path.stat().st_size < allocated + (2 << 20)  # what is free is used first
    assert is_sound(path)


def test_a_snapshot_is_read_unchanged_while_the_disk_is_written(new_image: NewImage) -> None:
    image = new_image("4M", cluster_size=4096).write(0, 4 << 20).snapshot("s")
    expected = image.reference("s").read()
    with writing(image.path) as node:
        info = node.find_snapshot("s")
        for round_number in range(3):
            for offset in range(0, 4 << 20, 100_000):
                node.pwritev(offset, [memoryview(bytes([round_number]) * 5000)])
                assert node.view(info).pread(offset, 5000) == expected[offset : offset + 5000]
            node.pdiscard(0, 1 << 20)
            node.flush()
        assert node.view(info).pread(0, 4 << 20) == expected
        changed = sum(change.length for change in node.changes(info, None))
        assert changed >= 1 << 20
    assert is_sound(image.path)
    assert json.loads(qemu_img("info", "--output=json", image.path).stdout)["snapshots"][0]["name"] == "s"
