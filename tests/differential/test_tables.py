"""Where tables end and begin: borders of L2 tables, gaps in L1 tables, and disks that need many of them."""

from __future__ import annotations

import os

import pytest

import qcow2snap
from tests.conftest import NewImage
from tests.differential import judge
from tests.support import Image, Reference, qemu_map

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40


def allocated_parts_hold(disk: qcow2snap.Disk, reference: Reference) -> None:
    """For disks too large to read in full: all that is data in either of the two is the same in both."""
    assert disk.size == reference.size
    with disk.open() as ours, reference.raw.open("rb") as theirs:
        data = [(extent.offset, extent.length) for extent in disk.extents() if extent.must_read]
        position = 0
        while position < disk.size:
            try:
                start = os.lseek(theirs.fileno(), position, os.SEEK_DATA)
            except OSError:  # no more data
                break
            position = os.lseek(theirs.fileno(), start, os.SEEK_HOLE)
            data.append((start, position - start))
        assert data
        for start, length in data:
            ours.seek(start)
            assert ours.read(length) == os.pread(theirs.fileno(), length, start)


def agrees(image: Image) -> None:
    judge.maps_agree(image.path)
    assert judge.snapshot_maps_agree(image.path) == []
    with qcow2snap.open(image.path) as opened:
        allocated_parts_hold(opened.active, image.active)
        for snapshot, reference in zip(opened.snapshots, image.references, strict=True):
            allocated_parts_hold(snapshot, reference)


@pytest.mark.parametrize("cluster", [512, 4 * KIB], ids="cluster={}".format)
def test_data_across_the_border_of_two_l2_tables(new_image: NewImage, cluster: int) -> None:
    covers = cluster * cluster // 8
    image = new_image(4 * covers, cluster_size=cluster)
    image.write(covers - 4 * cluster, 8 * cluster).snapshot("in one piece")
    image.write(2 * covers, 2 * cluster).write(2 * covers - 2 * cluster, 2 * cluster).snapshot("the other way round")
    image.write_zeroes(covers - cluster, 2 * cluster).discard(2 * covers - cluster, 2 * cluster)
    agrees(image)


@pytest.mark.parametrize("extended", [False, True], ids=["standard", "extended"])
def test_a_table_of_thousands_of_entries(new_image: NewImage, extended: bool) -> None:
    """Neighbours all over the table whose clusters follow each other in the file, or do not."""
    image = new_image("160M", cluster_size=64 * KIB, extended_l2=extended)
    for middle in (32 * MIB, 64 * MIB, 128 * MIB):
        image.write(middle, 64 * KIB).write(middle - 64 * KIB, 64 * KIB)
    image.snapshot("apart").write_zeroes(64 * MIB - 64 * KIB, 128 * KIB)
    for middle in (32 * MIB, 128 * MIB):
        image.discard(middle - 64 * KIB, 128 * KIB)
    image.snapshot("none")
    for middle in (32 * MIB, 64 * MIB, 128 * MIB):
        image.write(middle - 256 * KIB, 512 * KIB)
    agrees(image.snapshot("together").write(128 * MIB, 4 * KIB))


def test_a_disk_of_a_tebibyte_with_data_at_both_ends(new_image: NewImage) -> None:
    image = new_image(TIB, cluster_size=2 * MIB).write(0, 64 * KIB).write(TIB - 64 * KIB, 64 * KIB).snapshot("ends")
    agrees(image.write((1 << 32) - 4 * KIB, 8 * KIB).write(TIB // 2, 512).resize(TIB + 512))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64], ids="refcounts of {} bits".format)
def test_allocated_holes_are_told_from_data_where_metadata_was_preallocated(new_image: NewImage, bits: int) -> None:
    """QEMU looks for holes only if the refcounts say that there are many."""
    image = new_image("16M", cluster_size=4 * KIB, preallocation="metadata", refcount_bits=bits)
    image.write(MIB, 64 * KIB)
    if bits > 1:  # a refcount of two
        image.snapshot("first").write(5 * MIB, 4 * KIB)
    assert any(entry["zero"] and entry["data"] for entry in qemu_map(image.path))
    agrees(image)


def test_allocated_holes_are_data_where_they_are_few(new_image: NewImage) -> None:
    image = new_image("1M", cluster_size=4 * KIB, preallocation="metadata").write(0, MIB - 4 * KIB)
    assert not any(entry["zero"] for entry in qemu_map(image.path))
    agrees(image)
