"""What differs between two states: tables compared entry by entry, and the states of real images as QEMU wrote them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcow2snap
from qcow2snap import Change, ImageFormatError, OutOfRange
from qcow2snap.block.file import FileNode
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.l2 import Kind
from qcow2snap.block.qcow2.l2_changes import Cell, TableChanges, compare
from tests.block.plain import Unit, plain_units
from tests.block.test_l2 import HEADERS, plausible_entries
from tests.conftest import NewImage
from tests.support import Library

COPIED = 1 << 63
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
Changes = list[tuple[int, int, str]]

# Two tables

CELLS = {
    Kind.UNALLOCATED: Cell.UNALLOCATED,
    Kind.UNALLOCATED_ALLOC: Cell.UNALLOCATED,
    Kind.ZERO_PLAIN: Cell.ZERO,
    Kind.ZERO_ALLOC: Cell.ZERO,
    Kind.NORMAL: Cell.DATA,
    Kind.COMPRESSED: Cell.DATA,
    Kind.INVALID: Cell.INVALID,
}


def successor(entries: bytes, image: ImageHeader, seed: int) -> bytes:
    """A table as it may look some writes later: some entries are others, some have another COPIED bit."""
    choose = random.Random(seed)
    size = image.l2_entry_size
    others = plausible_entries(image, len(entries) // size, seed)
    result = bytearray(entries)
    for start in range(0, len(entries), size):
        if choose.random() < 0.3:
            result[start : start + size] = others[start : start + size]
        elif not image.has_data_file and choose.random() < 0.3:
            result[start] ^= 0x80
    return bytes(result)


def meaning(unit: Unit) -> tuple[Cell, object]:
    """What counts of a unit: the cell, and for what is stored somewhere, where."""
    kind, host = unit
    cell = CELLS[Kind(kind)]
    place = (kind, host if kind == Kind.NORMAL else host & ~COPIED) if cell in (Cell.DATA, Cell.INVALID) else None
    return cell, place


def cells_of(table: TableChanges, image: ImageHeader, end: int) -> list[tuple[int, int] | None]:
    """For each unit the two cells, None where the tables say the same."""
    unit = image.subcluster_size
    result: list[tuple[int, int] | None] = [None] * (end // unit)
    for run in table.runs(0, end):
        for index in range(run.start // unit, run.end // unit):
            assert result[index] is None
            result[index] = run.was, run.now
    return result


@pytest.mark.parametrize("name", [name for name in HEADERS if "2M" not in name and "64k" not in name])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_two_tables_differ_where_their_entries_say_different_things(name: str, seed: int) -> None:
    image = HEADERS[name]
    old = plausible_entries(image, 64, seed)
    new = successor(old, image, seed + 1)
    found = cells_of(
        compare(old.ljust(image.cluster_size, b"\0"), new.ljust(image.cluster_size, b"\0"), image),
        image,
        64 * image.cluster_size,
    )
    pairs = zip(map(meaning, plain_units(old, image)), map(meaning, plain_units(new, image)), strict=True)
    assert found == [None if was == now else (was[0], now[0]) for was, now in pairs]


def test_a_part_of_what_differs_is_cut_to_what_was_asked_for() -> None:
    image = HEADERS["64k clusters"]
    entries = b"".join((index << 16).to_bytes(8, "big") for index in range(1, 9)).ljust(image.cluster_size, b"\0")
    table = compare(bytes(image.cluster_size), entries, image)
    assert list(table.runs(0, image.l2_coverage)) == [(0, 8 << 16, Cell.UNALLOCATED, Cell.DATA)]
    assert list(table.runs(100, 300)) == [(100, 300, Cell.UNALLOCATED, Cell.DATA)]
    assert list(table.runs(8 << 16, image.l2_coverage)) == []


# Two states of an image


def changes(path: Path, since: str | None, state: str | None, *part: int) -> Changes:
    """What our node says of two states; None is the active disk."""
    with qcow2snap.open(path) as image:
        states = [None if ref is None else image.node.find_snapshot(ref) for ref in (since, state)]
        return [(offset, length, change.value) for offset, length, change in image.node.changes(*states, *part)]


def test_a_write_a_discard_and_a_first_write_are_told_apart(new_image: NewImage) -> None:
    image = new_image("16M").write(0, MIB).snapshot("then").write(64 * KIB, 128 * KIB).discard(512 * KIB, 64 * KIB)
    image.write(8 * MIB, 64 * KIB)
    assert changes(image.path, "then", None) == [
        (64 * KIB, 128 * KIB, "data"),
        (512 * KIB, 64 * KIB, "became-zero"),
        (8 * MIB, 64 * KIB, "was-zero"),
    ]
    assert [change for _, _, change in changes(image.path, None, "then")] == ["data", "was-zero", "became-zero"]


def test_a_snapshot_taken_again_without_a_write_between_is_the_same(new_image: NewImage) -> None:
    image = new_image("4M").write(0, MIB).snapshot("one").snapshot("two").write(0, 512)
    assert changes(image.path, "one", "two") == []


def test_zeros_that_were_written_over_nothing_are_no_change(new_image: NewImage) -> None:
    image = new_image("4M").snapshot("then").write_zeroes(0, MIB)
    assert changes(image.path, "then", None) == []


def test_zeros_over_nothing_hide_what_the_backing_file_has_as_far_as_it_reaches(new_image: NewImage) -> None:
    base = new_image("3M", name="base.qcow2").write(MIB, MIB)
    image = new_image("8M", backing=base).snapshot("then").write_zeroes(0, 8 * MIB)
    assert changes(image.path, "then", None) == [(MIB, MIB, "became-zero")]
    assert changes(image.path, None, "then") == [(MIB, MIB, "was-zero")]


def test_what_was_first_written_over_a_backing_file_is_data_where_that_had_some(new_image: NewImage) -> None:
    base = new_image("3M", name="base.qcow2").write(MIB, MIB)
    image = new_image("8M", backing=base).snapshot("then").write(0, 8 * MIB)
    assert changes(image.path, "then", None) == [
        (0, MIB, "was-zero"),
        (MIB, MIB, "data"),
        (2 * MIB, 6 * MIB, "was-zero"),
    ]


@pytest.mark.parametrize(("size", "active"), [("1M", "3M"), ("3M", "1M")])
def test_beyond_the_shorter_of_two_states_the_size_differs(new_image: NewImage, size: str, active: str) -> None:
    image = new_image(size).write(0, 64 * KIB).snapshot("then").resize(active).write(0, 512)
    assert changes(image.path, "then", None) == [(0, 64 * KIB, "data"), (MIB, 2 * MIB, "size")]
    assert changes(image.path, "then", None, 2 * MIB) == [(2 * MIB, MIB, "size")]
    assert changes(image.path, "then", None, 512, 512) == [(512, 512, "data")]
    assert changes(image.path, "then", None, 3 * MIB, 0) == []
    with pytest.raises(OutOfRange):
        changes(image.path, "then", None, 0, 3 * MIB + 1)


def test_subclusters_differ_by_themselves(new_image: NewImage) -> None:
    image = new_image("1M", cluster_size=64 * KIB, extended_l2=True).write(0, 64 * KIB).write(128 * KIB, 2 * KIB)
    image.snapshot("then").write(130 * KIB, 4 * KIB).write_zeroes(4 * KIB, 2 * KIB)
    assert changes(image.path, "then", None) == [
        (4 * KIB, 2 * KIB, "became-zero"),
        (128 * KIB, 2 * KIB, "data"),  # copied, with its cluster: the tables cannot tell
        (130 * KIB, 4 * KIB, "was-zero"),
    ]


def test_compressed_clusters_are_the_same_while_their_descriptor_is(new_image: NewImage) -> None:
    image = new_image("1M").write(0, 256 * KIB, compressed=True).snapshot("then").write(64 * KIB, 512)
    assert changes(image.path, "then", None) == [(64 * KIB, 64 * KIB, "data")]


# Cost


def reads_of_a_comparison(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many clusters of the file are read to compare two states, once the image is open."""
    places = []
    plain = FileNode.pread_available

    def counting(self: FileNode, offset: int, length: int) -> bytes:
        places.append(offset)
        return plain(self, offset, length)

    with qcow2snap.open(path) as image:
        states = image.node.find_snapshot("then"), None
        with monkeypatch.context() as patch:
            patch.setattr(FileNode, "pread_available", counting)
            assert len(list(image.node.changes(*states))) == 3
            first = len(places)
            list(image.node.changes(*states, 0, 1 << 20))
            assert len(places) == first  # asked again, as a client does, nothing is read again
    return first


def test_tables_are_read_only_where_they_differ_however_large_the_disk(
    new_image: NewImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for size in (64 * GIB, 4 * TIB):
        image = new_image(size)
        for offset in range(0, 32 * GIB, GIB):
            image.write(offset, 64 * KIB)
        image.snapshot("then").write(0, 512).write(10 * GIB, 512).write(20 * GIB, 512)
        counts.append(reads_of_a_comparison(image.path, monkeypatch))
    assert counts == [2 + 3 * 2] * 2  # two L1 tables, and two L2 tables for each of the changes


# Damage


def damaged_copies(new_image: NewImage) -> Iterator[tuple[str, Path]]:
    """An image of two states, the active one damaged in ways that each break one rule."""
    image = new_image("4M", cluster_size=4 * KIB).write(0, MIB).snapshot("then").write(0, 512)
    with qcow2snap.open(image.path) as opened:
        l1, l2 = opened.node.header.l1_table_offset, opened.node.l1_table(None).offsets[0]
    for rule, where, value in (
        ("QCOW2-L1-002", l1, (COPIED | l2 + 512)),
        ("QCOW2-L2-001", l1, (COPIED | 1 << 40)),
        ("QCOW2-L2-003", l2, (COPIED | 0x123200)),
    ):
        copy = image.copy(f"{rule}.qcow2")
        with copy.open("r+b") as file:
            file.seek(where)
            file.write(value.to_bytes(8, "big"))
        yield rule, copy


def test_damage_that_the_comparison_meets_is_told_by_its_rule(new_image: NewImage) -> None:
    for rule, path in damaged_copies(new_image):
        with pytest.raises(ImageFormatError) as caught:
            changes(path, "then", None)
        assert caught.value.rule == rule
        assert caught.value.filename == str(path)
        assert changes(path, "then", "then") == []


def test_what_differs_before_the_damage_is_told_before_it(new_image: NewImage) -> None:
    image = new_image("8M", cluster_size=4 * KIB).write(0, 8 * MIB).snapshot("then").write(0, 512).write(4 * MIB, 512)
    with qcow2snap.open(image.path) as opened:
        table = opened.node.l1_table(None).offsets[2]  # 2 MiB each
    image.patch(table, (COPIED | 0x123200).to_bytes(8, "big"))
    with qcow2snap.open(image.path) as opened:
        extents = opened.diff("then")
        assert next(extents) == (0, 4 * KIB, Change.DATA)
        with pytest.raises(ImageFormatError):
            next(extents)


@pytest.mark.parametrize(
    ("damaged", "rule"),
    [
        ("header-l1-empty", "QCOW2-HDR-010"),
        ("snapshot-l1-huge", "QCOW2-SNAP-004"),
        ("snapshot-l1-beyond-end", "QCOW2-L1-001"),
        ("snapshot-l1-empty", "QCOW2-SNAP-005"),
        ("subcluster-both", "QCOW2-L2-005"),
    ],
)
def test_damage_of_the_shipped_images_is_told_by_its_rule(library: Library, damaged: str, rule: str) -> None:
    broken = []
    with qcow2snap.open(library.path(damaged)) as image:
        for snapshot in image.snapshots:
            try:
                list(image.node.changes(snapshot.info, None))
            except ImageFormatError as error:
                broken.append(error)
        assert {(error.rule, error.filename) for error in broken} == {(rule, image.node.filename)}
