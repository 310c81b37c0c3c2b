"""What the walk counts is what QEMU counted when it wrote the refcounts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import qcow2snap.block.graph as graph
from formats.qcow2 import HeaderExtensionType
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.conformance.references import ACTIVE, L1_OFFSET, References, references
from tests.conformance.refcounts import refcounts
from tests.conftest import NewImage
from tests.support import Library, qemu_img
from tests.support.table import patch

# Sound images without bitmaps, encryption or a damaged table: what they hold besides what the walk counts is counted
# below.
IMAGES = [
    "demo", "sound", "sound-zstd", "compressed-mixed", "cluster-512", "cluster-2M", "compat-0.10", "discards",
    "extended-l2-16k", "extended-l2-backed", "grown", "shrunk-by-revert", "many", "preallocation-metadata",
    "refcount-2", "refcount-8", "refcount-64", "unaligned", "vm-state", "zero-clusters", "zlib-512", "data-file",
]  # fmt: skip


def walk(path: Path) -> tuple[Qcow2Node, References]:
    node = graph.open_image(str(path), with_children=False)
    return node, references(node.file, node.header, node.snapshot_table.entries)


def counted(found: References) -> Counter[int]:
    """References to L1 tables, L2 tables and data clusters, by host cluster."""
    size, result = found.header.cluster_size, Counter[int]()
    for state in found.states:
        start = state.l1_table_offset // size
        result.update(range(start, start + -(-state.l1_length // size)))
    for offset, count in zip(found.tables.offsets.tolist(), found.tables.counts.tolist(), strict=True):
        result[offset // size] += count
    for batch in found.batches():
        rows, firsts = batch.runs
        for row, first in zip(rows.tolist(), firsts.tolist(), strict=True):
            for cluster in range(first, first + batch.entries.shape[1]):
                result[cluster] += int(batch.tables.counts[row])
        for row, cluster in zip(*(column.tolist() for column in batch.others.references()), strict=True):
            result[cluster] += int(batch.others.tables.counts[row])
    return result


def others(path: Path, node: Qcow2Node) -> Counter[int]:
    """Header, snapshot table, refcount table and blocks."""
    header, size = node.header, node.header.cluster_size
    result = Counter([0])
    entries = node.snapshot_table.entries
    if entries:
        length = sum(len(entry.raw) for entry in entries)
        start = header.snapshots_offset // size
        result.update(range(start, start + -(-length // size)))
    start = header.refcount_table_offset // size
    result.update(range(start, start + header.refcount_table_clusters))
    table = node.file.pread(header.refcount_table_offset, header.refcount_table_clusters * size)
    offsets = [int.from_bytes(table[i : i + 8], "big") for i in range(0, len(table), 8)]
    result.update(offset // size for offset in offsets if offset)
    return result


@pytest.mark.parametrize("name", IMAGES)
def test_every_cluster_has_as_many_references_as_its_refcount(library: Library, name: str) -> None:
    path = library.path(name)
    node, found = walk(path)
    assert node.header.extension(HeaderExtensionType.BITMAPS) is None
    assert counted(found) + others(path, node) == refcounts(path)


def test_a_table_knows_the_only_state_that_refers_to_it(new_image: NewImage) -> None:
    image = new_image("1M", cluster_size=512).write(0, 65536).snapshot("first").write(0, 512).snapshot("second")
    image.write(65536, 512)
    node, found = walk(image.path)
    l1_tables = [state.read_l1(node.file) & L1_OFFSET for state in found.states]
    tables = found.tables
    alone = tables.first_states == tables.last_states
    assert alone.any()
    assert not alone.all()
    for offset, first, last, count in zip(
        tables.offsets.tolist(), tables.first_states.tolist(), tables.last_states.tolist(), tables.counts.tolist(),
        strict=True,
    ):  # fmt: skip
        states = [number for number, offsets in enumerate(l1_tables) if offset in offsets.tolist()]
        assert (states[0], states[-1], len(states)) == (first, last, count)
    assert set(tables.first_states[alone].tolist()) >= {ACTIVE}


def test_what_leaves_the_file_is_no_reference(new_image: NewImage) -> None:
    image = new_image("4M", cluster_size=4096).write(0, 4096).path
    node, found = walk(image)
    (offset,) = found.tables.offsets.tolist()
    patch(image, offset, (1 << 63 | 1 << 40).to_bytes(8, "big"))  # the first entry: a terabyte on
    patch(image, node.header.l1_table_offset + 8, (1 << 63 | 1 << 41).to_bytes(8, "big"))
    _, found = walk(image)
    assert [len(batch.references()[0]) for batch in found.batches()] == [0]
    assert found.outside.offsets.tolist() == [1 << 41]
    assert qemu_img("check", image, check=False).returncode == 2
