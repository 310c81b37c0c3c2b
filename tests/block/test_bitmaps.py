"""Contents of dirty bitmaps: bit by bit, and refused where nobody knows. nbd/test_contexts.py asks qemu-nbd too."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.qcow2 import AutoclearFeature, BitmapTableEntry
from qcow2snap.block.file import FileNode, Locking
from qcow2snap.block.graph import open_image
from qcow2snap.block.node import BitmapNotFound, ImageFormatError, OutOfRange
from qcow2snap.block.qcow2.bitmaps import BitmapInfo, DirtyBitmap
from qcow2snap.block.qcow2.driver import Qcow2Node
from tests.block.test_l2 import header
from tests.conftest import NewImage
from tests.support import Image, Library, qemu_img
from tests.support.table import patch

CLUSTER = 512
GRANULARITY = 1024
MIB = 1 << 20


def runs_of(bits: list[int], offset: int, end: int) -> list[tuple[int, int]]:
    """The dirty runs in a range, byte by byte of the disk, which is what the specification says in one sentence."""
    dirty = [bits[byte // GRANULARITY] for byte in range(offset, end)]
    result = []
    for is_dirty, group in itertools.groupby(range(offset, end), key=lambda byte: dirty[byte - offset]):
        members = list(group)
        if is_dirty:
            result.append((members[0], len(members)))
    return result


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bitmaps") / "bitmap"


@settings(max_examples=60)
@given(data=st.data())
def test_each_bit_stands_for_its_bytes(stored: Path, data: st.DataObject) -> None:
    """A table of clusters of zeros, of ones, and of bits, at the end of which the disk ends within a bit."""
    kinds = data.draw(st.lists(st.sampled_from(["zeros", "ones", "bits"]), min_size=1, max_size=3))
    coverage = CLUSTER * 8 * GRANULARITY
    size = (len(kinds) - 1) * coverage + data.draw(st.integers(1, 20 * GRANULARITY))
    file, table, bits = bytearray(CLUSTER), b"", []
    for kind in kinds:
        if kind == "bits":
            start, some = data.draw(st.integers(0, 400)), data.draw(st.binary(min_size=1, max_size=12))
            cluster = some.rjust(start, b"\0").ljust(CLUSTER, data.draw(st.sampled_from([b"\0", b"\xff"])))[:CLUSTER]
            table += BitmapTableEntry.build(BitmapTableEntry.parse(len(file).to_bytes(8, "big")))
            file += cluster
            bits += [byte >> bit & 1 for byte in cluster for bit in range(8)]
        else:
            table += (kind == "ones").to_bytes(8, "big")
            bits += [int(kind == "ones")] * (8 * CLUSTER)
    file[: len(table)] = table
    stored.write_bytes(file)
    node = FileNode(str(stored), locking=Locking.NONE)
    try:
        image = header(9)._replace(size=size, autoclear_features=AutoclearFeature.BITMAPS)
        bitmap = DirtyBitmap(node, image, BitmapInfo("b", GRANULARITY, 0, table_size=len(kinds)))
        offset = data.draw(st.integers(max(0, size - 40 * GRANULARITY), size - 1))
        end = data.draw(st.integers(offset, size))
        assert list(bitmap.dirty(offset, end - offset)) == runs_of(bits, offset, end)
    finally:
        node.close()


# Of an image that qemu-img made


@pytest.fixture
def image(new_image: NewImage) -> Image:
    made = new_image("8M", cluster_size=CLUSTER)
    qemu_img("bitmap", "--add", "-g", "1k", made.path, "b")
    return made.write(0, 512).write(2 * MIB, 3 * MIB)


def opened(image: Image) -> Qcow2Node:
    return open_image(str(image.path))


def place(image: Image) -> BitmapInfo:
    """The entry of the directory, for what is to be damaged."""
    node = opened(image)
    try:
        return node._bitmaps()["b"]
    finally:
        node.close()


def refusal(image: Image) -> Exception:
    """What reading all of the bitmap comes to."""
    node = opened(image)
    try:
        with pytest.raises((ImageFormatError, BitmapNotFound)) as caught:
            list(node.dirty_extents("b", 0, node.size))
        assert str(image.path) in str(caught.value)
        return caught.value
    finally:
        node.close()


def test_what_was_written_is_dirty(image: Image) -> None:
    node = opened(image)
    assert node.dirty_bitmaps() == ["b"]
    assert list(node.dirty_extents("b", 0, node.size)) == [(0, 1024), (2 * MIB, 3 * MIB)]
    assert list(node.dirty_extents("b", 3 * MIB, 4096)) == [(3 * MIB, 4096)]
    assert list(node.dirty_extents("b", 512, 100)) == [(512, 100)]
    with pytest.raises(OutOfRange):
        node.dirty_extents("b", 0, node.size + 1)
    with pytest.raises(BitmapNotFound):
        node.dirty_extents("c", 0, 1)
    node.close()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (12, (1).to_bytes(4, "big"), "in use"),
        (12, (1 << 5).to_bytes(4, "big"), "flags or extra data"),
        (16, b"\2", "type 2"),
    ],
)
def test_contents_that_nobody_knows_are_refused(image: Image, field: int, value: bytes, reason: str) -> None:
    patch(image.path, place(image).host_offset + field, value)
    assert reason in str(refusal(image))
    node = opened(image)
    assert node.dirty_bitmaps() == []
    node.close()


def test_a_program_that_knew_no_bitmaps_has_made_them_worthless(image: Image) -> None:
    patch(image.path, 88, bytes(8))  # autoclear features
    assert "a program that does not know bitmaps" in str(refusal(image))


@pytest.mark.parametrize(
    ("where", "value", "rule"),
    [
        ("entry", b"\0" * 7 + b"\x80", "QCOW2-BMP-002"),  # the table's offset
        ("entry+8", (1).to_bytes(4, "big"), "QCOW2-BMP-002"),  # and size
        ("entry", (1 << 40).to_bytes(8, "big"), "QCOW2-BMP-002"),
        ("table", (2).to_bytes(8, "big"), "QCOW2-BMP-003"),
        ("table", (1 << 56).to_bytes(8, "big"), "QCOW2-BMP-003"),
        ("table", (CLUSTER + 1).to_bytes(8, "big"), "QCOW2-BMP-003"),
        ("table", (1 << 40).to_bytes(8, "big"), "QCOW2-BMP-003"),
    ],
)
def test_a_damaged_table_is_told_by_its_rule(image: Image, where: str, value: bytes, rule: str) -> None:
    info = place(image)
    patch(
        image.path,
        {"entry": info.host_offset, "entry+8": info.host_offset + 8, "table": info.table_offset}[where],
        value,
    )
    error = refusal(image)
    assert isinstance(error, ImageFormatError)
    assert error.rule == rule
    assert "'b'" in str(error)


def test_a_table_that_the_end_of_the_file_cuts_is_told_by_its_rule(image: Image) -> None:
    end = -(-image.path.stat().st_size // 65536) * 65536
    patch(image.path, place(image).host_offset, end.to_bytes(8, "big"))
    with image.path.open("rb+") as file:
        file.truncate(end + 3)
    assert "has a table that reaches beyond the end of the file (QCOW2-BMP-002" in str(refusal(image))


def test_a_cluster_of_bits_that_is_no_cluster_is_told_by_its_rule(new_image: NewImage) -> None:
    made = new_image("8M")
    qemu_img("bitmap", "--add", "-g", "64k", made.path, "b")
    made.write(0, 512)
    patch(made.path, place(made).table_offset, (0x1200).to_bytes(8, "big"))
    error = refusal(made)
    assert "not a cluster boundary" in str(error)
    assert isinstance(error, ImageFormatError)
    assert error.guest_range == (0, 8 * MIB)


def test_the_shipped_bitmaps(library: Library) -> None:
    node = open_image(str(library.path("bitmaps")))
    assert node.dirty_bitmaps() == ["since-sunday", "off"]
    node.close()
