"""Any bytes at all give a result or one error, soon and in little memory. What fuzzing found stands here by name."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from formats.qcow2 import Header
from qcow2snap.block.graph import open_image
from qcow2snap.block.node import ImageFormatError
from tests.fuzz.exercise import damaged, exercise
from tests.support import Library
from tests.support.memory import memory_limit

SECONDS = 5.0
MEMORY = 256 << 20  # bytes
SMALL = 600_000  # bytes: larger images take long to copy and hold no other structures


def within_limits(path: Path) -> str:
    started = time.process_time()
    with memory_limit(MEMORY):
        outcome = exercise(str(path))
    assert time.process_time() - started < SECONDS
    return outcome


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_a_real_image_is_stood(seed: int, library: Library, tmp_path: Path) -> None:
    choose = random.Random(seed)
    originals = [
        library.path(name).read_bytes() for name in library.images if library.path(name).stat().st_size < SMALL
    ]
    outcomes = set()
    for _ in range(400):
        path = tmp_path / "damaged.qcow2"
        path.write_bytes(damaged(choose.choice(originals), choose))
        outcomes.add(within_limits(path))
    assert outcomes == {"read", "described", "refused"}


@pytest.mark.parametrize("seed", range(2))
def test_a_header_with_any_values_before_any_bytes_is_stood(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    path = tmp_path / "hostile.qcow2"
    for _ in range(300):
        header = bytearray(choose.randbytes(112))
        header[0:8] = b"QFI\xfb\0\0\0" + bytes([choose.choice([2, 3])])
        header[20:24] = choose.choice([9, 12, 14, 16, 21]).to_bytes(4, "big")
        for at, width in ((8, 8), (36, 4), (40, 8), (48, 8), (60, 4), (64, 8), (72, 8), (100, 4)):
            limit = choose.choice([0, 1, 3, 200, 4096, 65536])
            header[at : at + width] = (limit * choose.choice([1, 512])).to_bytes(width, "big")
        header[24:32] = choose.getrandbits(choose.choice([10, 20, 40, 63])).to_bytes(8, "big")
        header[32:36], header[96:104] = bytes(4), (4).to_bytes(4, "big") + (104).to_bytes(4, "big")
        body = b"".join(choose.randrange(1 << 16).to_bytes(8, "big") for _ in range(4096))
        path.write_bytes(bytes(header) + body)
        within_limits(path)


def test_a_file_cut_at_any_cluster_still_gives_what_is_left(library: Library, tmp_path: Path) -> None:
    whole = library.path("demo").read_bytes()
    cluster = 1 << Header.parse(whole).cluster_bits
    for end in range(0, len(whole), cluster):
        path = tmp_path / "cut.qcow2"
        path.write_bytes(whole[:end])
        within_limits(path)


def hostile_header(path: Path, body: bytes = b"", **fields: int) -> Path:
    """A version 3 image of 64 KiB clusters and nothing, with these fields of its header changed."""
    values = {
        "version": 3,
        "backing_file_offset": 0,
        "backing_file_size": 0,
        "cluster_bits": 16,
        "size": 1 << 20,
        "crypt_method": 0,
        "l1_size": 1,
        "l1_table_offset": 65536,
        "refcount_table_offset": 131072,
        "refcount_table_clusters": 1,
        "nb_snapshots": 0,
        "snapshots_offset": 0,
        "incompatible_features": 0,
        "compatible_features": 0,
        "autoclear_features": 0,
        "refcount_order": 4,
        "header_length": 104,
        "compression_type": 0,
        "padding": b"",
    }
    path.write_bytes(Header.build(values | fields).ljust(65536, b"\0") + body)
    return path


def test_65536_snapshots_of_zeros_are_none(tmp_path: Path) -> None:
    path = hostile_header(tmp_path / "many.qcow2", bytes(65536), nb_snapshots=65536, snapshots_offset=65536)
    with path.open("r+b") as file:
        file.truncate(4 << 20)
    within_limits(path)
    node = open_image(str(path))
    assert not node.snapshots()
    node.close()


def test_a_million_l1_entries_that_name_one_table_are_stood(tmp_path: Path) -> None:
    table = (0x10000).to_bytes(8, "big") * 8192
    path = hostile_header(tmp_path / "one-table.qcow2", table, l1_size=8192, size=8192 << 29)
    within_limits(path)


def test_an_l1_table_that_the_file_does_not_hold_is_not_allocated(tmp_path: Path) -> None:
    path = hostile_header(tmp_path / "long-l1.qcow2", bytes(65536), l1_size=4 << 20)
    node = open_image(str(path))
    with pytest.raises(ImageFormatError, match="beyond the end of the file"):
        node.pread(0, 512)
    node.close()


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"version": 4}, "QCOW2-HDR-003"),
        ({"cluster_bits": 8}, "QCOW2-HDR-004"),
        ({"cluster_bits": 63}, "QCOW2-HDR-004"),
        ({"header_length": 103}, "QCOW2-HDR-005"),
        ({"refcount_order": 7}, "QCOW2-HDR-008"),
        ({"backing_file_offset": 65530, "backing_file_size": 100}, "QCOW2-HDR-009"),
        ({"backing_file_offset": 200, "backing_file_size": 1024}, "QCOW2-HDR-009"),
        ({"crypt_method": 3}, "QCOW2-HDR-012"),
        ({"incompatible_features": 1 << 3}, "QCOW2-HDR-007"),
        ({"autoclear_features": 1 << 1}, "QCOW2-HDR-015"),
        ({"incompatible_features": 1 << 4, "cluster_bits": 12}, "QCOW2-HDR-004"),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused_by_its_name(tmp_path: Path, fields: dict[str, int], rule: str) -> None:
    path = hostile_header(tmp_path / "bad.qcow2", bytes(65536), **fields)
    with pytest.raises(ImageFormatError) as caught:
        open_image(str(path))
    assert caught.value.rule == rule
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"l1_size": 0}, "QCOW2-HDR-010"),
        ({"l1_size": 0xFFFFFFFF}, "QCOW2-HDR-010"),
        ({"l1_table_offset": 65537}, "QCOW2-HDR-011"),
    ],
)
def test_a_bad_active_l1_table_costs_the_active_disk_only(tmp_path: Path, fields: dict[str, int], rule: str) -> None:
    node = open_image(str(hostile_header(tmp_path / "bad.qcow2", bytes(65536), **fields)))
    with pytest.raises(ImageFormatError) as caught:
        node.pread(0, 512)
    assert caught.value.rule == rule
    node.close()


@pytest.mark.parametrize("fields", [{"nb_snapshots": 65537}, {"nb_snapshots": 0xFFFFFFFF}, {"snapshots_offset": 7}])
def test_a_bad_snapshot_table_costs_the_snapshots_only(tmp_path: Path, fields: dict[str, int]) -> None:
    node = open_image(str(hostile_header(tmp_path / "bad.qcow2", bytes(65536), **{"nb_snapshots": 1} | fields)))
    assert node.snapshot_table.damage is not None
    assert node.pread(0, 512) == bytes(512)
    node.close()
