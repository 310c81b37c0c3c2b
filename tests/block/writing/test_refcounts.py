"""Allocation and refcounts, judged by qemu-img check: what is allocated and not referred to is a leak."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from qcow2snap.block.node import NoSpace, NotSupported
from qcow2snap.block.qcow2.header import read_header
from qcow2snap.block.qcow2.writing.image_file import ImageFile
from qcow2snap.block.qcow2.writing.metadata import Metadata
from qcow2snap.block.qcow2.writing.tree import tree_references
from tests.conftest import NewImage
from tests.support import qemu_img


@contextmanager
def metadata_of(path: Path) -> Iterator[Metadata]:
    file = ImageFile(str(path))
    try:
        yield Metadata(file, read_header(file))
    finally:
        file.close()


def check(path: Path) -> dict[str, int]:
    """Leaks and corruptions that qemu-img finds."""
    report = json.loads(qemu_img("check", "-U", "--output=json", path, check=False).stdout)
    return {key: report[key] for key in ("leaks", "corruptions", "check-errors") if report.get(key)}


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_what_is_allocated_and_used_by_nobody_is_a_leak_until_it_is_released(
    new_image: NewImage, refcount_bits: int
) -> None:
    image = new_image("1M", refcount_bits=refcount_bits, cluster_size=512).write(0, 65536)
    chosen = random.Random(refcount_bits)
    with metadata_of(image.path) as metadata:
        with metadata.lock:
            counts = [chosen.randrange(1, 40) for _ in range(20)]
            ranges = [(metadata.allocate(count * 512), count * 512) for count in counts]
        metadata.file.pwritev(sum(ranges[-1]) - 1, [memoryview(b"x")])  # beyond the end of the file, nothing leaks
        metadata.commit()
    assert check(image.path) == {"leaks": sum(counts)}
    with metadata_of(image.path) as metadata:
        with metadata.lock:
            for offset, length in ranges:
                metadata.release(offset, length)
        metadata.commit()
        metadata.commit()  # which writes what the first one made free
    assert check(image.path) == {}


def test_no_two_allocations_overlap_nor_what_is_there(new_image: NewImage) -> None:
    image = new_image("1M", cluster_size=512).write(0, 300_000)
    used = image.path.stat().st_size // 512
    with metadata_of(image.path) as metadata:
        seen: set[int] = set()
        with metadata.lock:
            for count in (1, 5, 1, 100, 7):
                first = metadata.allocate(count * 512) // 512
                assert first >= used - 1
                assert seen.isdisjoint(range(first, first + count))
                seen.update(range(first, first + count))


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
def test_the_refcount_table_grows_and_describes_itself(new_image: NewImage, refcount_bits: int) -> None:
    image = new_image("1M", refcount_bits=refcount_bits, cluster_size=512).write(0, 4096)
    per_table = 64 * 512 * 8 // refcount_bits  # clusters that a table of one cluster describes
    count = 2 * per_table + 3
    with metadata_of(image.path) as metadata:
        before = metadata.refcounts.table_offset
        allocated = 0
        with metadata.lock:
            while allocated < count:
                metadata.allocate(512 * 4000)
                allocated += 4000
        metadata.commit()
        assert metadata.refcounts.table_offset != before
        metadata.commit()
    assert check(image.path) == {"leaks": allocated}


def test_one_allocation_may_be_larger_than_all_that_the_table_describes(new_image: NewImage) -> None:
    image = new_image("1M", refcount_bits=64, cluster_size=512)
    with metadata_of(image.path) as metadata:
        with metadata.lock:
            metadata.allocate(512 * 100_000)
        metadata.commit()
        metadata.commit()
    assert check(image.path) == {"leaks": 100_000}


def test_no_cluster_is_given_out_where_no_entry_could_say_it_is(new_image: NewImage) -> None:
    """A host offset has 56 bits."""
    image = new_image("1M", refcount_bits=1, cluster_size=2 << 20)
    with metadata_of(image.path) as metadata, metadata.lock:
        metadata.refcounts.look_from((1 << 56 - 21) - 1)
        with pytest.raises(NoSpace):
            metadata.allocate(2 << 21)


def test_what_is_released_is_not_given_out_before_a_commit(new_image: NewImage) -> None:
    image = new_image("1M", cluster_size=4096).write(0, 4096)
    with metadata_of(image.path) as metadata:
        with metadata.lock:
            first = metadata.allocate(4096)
            metadata.release(first, 4096)
            assert metadata.allocate(4096) != first
        metadata.commit()
        with metadata.lock:
            assert metadata.allocate(4096) == first


def test_what_is_released_is_not_given_out_while_somebody_uses_it(new_image: NewImage) -> None:
    image = new_image("1M", cluster_size=4096).write(0, 4096)
    with metadata_of(image.path) as metadata:
        with metadata.lock:
            first = metadata.allocate(4096)
        user = metadata.users.begin()
        with metadata.lock:
            metadata.release(first, 4096)
        metadata.commit()
        with metadata.lock:
            assert metadata.allocate(4096) != first
        metadata.users.end(user)
        metadata.commit()
        with metadata.lock:
            assert metadata.allocate(4096) == first


def test_a_refcount_that_would_be_too_large_changes_nothing(new_image: NewImage) -> None:
    image = new_image("1M", refcount_bits=2, cluster_size=4096).write(0, 65536)
    with metadata_of(image.path) as metadata, metadata.lock:
        clusters = np.arange(3, 9, dtype=np.uint64)
        before = metadata.refcounts.many(clusters).tolist()
        assert set(before) == {1}
        addends = np.array([1, 1, 2, 3, 1, 1], dtype=np.int64)
        with pytest.raises(NotSupported, match="refcount of 2 bits"):
            metadata.refcounts.add_many(clusters, addends)
        assert metadata.refcounts.many(clusters).tolist() == before
        addends[3] = 2
        metadata.refcounts.add_many(clusters, addends)
        assert metadata.refcounts.many(clusters).tolist() == [2, 2, 3, 3, 2, 2]


def test_references_are_counted_as_qemu_counts_them(new_image: NewImage) -> None:
    """Of L2 tables, data, and compressed clusters that share clusters of the file and lie across two."""
    image = new_image("4M", cluster_size=4096)
    for start in range(0, 1 << 18, 4096):
        image.write(start, 4096, compressed=True)
    image.write(2 << 20, 100_000).write_zeroes(3 << 20, 8192)
    with metadata_of(image.path) as metadata, metadata.lock:
        counted: Counter[int] = Counter()
        for clusters, counts in tree_references(metadata.file, metadata.header, metadata.tables.l1):
            counted.update(dict(zip(clusters.tolist(), counts.tolist(), strict=True)))
        assert max(counted.values()) > 2
        assert {cluster: metadata.refcounts.get(cluster) for cluster in counted} == counted
