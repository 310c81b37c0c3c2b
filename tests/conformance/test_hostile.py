"""Images made to wear a checker out: it ends soon, in little memory, and says what it left out."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from qcow2snap.block.file import FileNode
from qcow2snap.block.qcow2 import rules
from qcow2snap.conformance.check import Options, Report, check
from tests.conftest import NewImage
from tests.support.memory import memory_limit
from tests.support.table import Entry, field, patch, write_table

SECONDS = 5
MEMORY = 256 << 20


def checked(image: Path, *, deep: bool = False) -> Report:
    file = FileNode(str(image))
    start = time.process_time()
    with memory_limit(MEMORY):
        report = check(file, Options(deep=deep))
    file.close()
    assert time.process_time() - start < SECONDS
    return report


def snapshot(number: int, l1_table_offset: int, l1_size: int) -> Entry:
    extra = struct.pack(">QQ", 0, 1 << 20)
    return Entry(l1_table_offset, l1_size, 0, 0, 0, 0, extra, str(number).encode(), b"")


@pytest.mark.parametrize("shift", [0, 512])
def test_many_snapshots_with_large_l1_tables(new_image: NewImage, shift: int) -> None:
    image = new_image("1M", cluster_size=512).write(0, 512).path
    l1, size = 1 << 20, 4 << 20  # 32 MiB, and nothing but pointers to one L2 table
    patch(image, l1, field(image, field(image, 40)).to_bytes(8, "big") * size)
    write_table(image, [snapshot(number, l1 + shift * number, size) for number in range(1000)])
    report = checked(image)
    assert any("too much for one check" in problem for problem in report.problems)
    assert report.exit_code == 1


@pytest.mark.parametrize("value", [b"\xff" * 8, b"\x80" + bytes(5) + b"\x02\0", b"\x40" + bytes(7)])
def test_an_l2_table_full_of_what_cannot_be(new_image: NewImage, value: bytes) -> None:
    image = new_image("16G", cluster_size="2M").write(0, 512).path
    l2 = field(image, field(image, 40)) & ~(1 << 63)
    patch(image, l2, value * (1 << 18))
    patch(image, field(image, 40), struct.pack(">Q", l2) * 3)
    report = checked(image)
    assert report.exit_code == 2
    assert len(report.findings) <= 1000 * len(report.numbers)
    assert report.figures is not None
    assert report.figures.allocated_clusters == 1 << 18


def test_l1_entries_that_point_to_every_sector(new_image: NewImage) -> None:
    image = new_image("16T", cluster_size=65536, preallocation="off").write(0, 65536).path
    l1 = field(image, 40)
    patch(image, l1, b"".join(struct.pack(">Q", 512 * number) for number in range(4096)))
    assert checked(image).numbers[rules.L1_ENTRY_ALIGNED] > 3000


def test_a_file_of_too_many_clusters_is_not_counted(new_image: NewImage) -> None:
    image = new_image("1M", cluster_size=512).write(0, 65536).path
    with image.open("r+b") as file:
        file.truncate((1 << 40) + 512)
    assert checked(image).exit_code == 1


def test_a_large_sparse_file_takes_a_byte_for_each_cluster_at_most(new_image: NewImage) -> None:
    image = new_image("1M", cluster_size=512).write(0, 65536).path
    with image.open("r+b") as file:
        file.truncate(1 << 36)  # 128 Mi clusters
    report = checked(image)
    assert (report.exit_code, report.findings) == (0, ())
