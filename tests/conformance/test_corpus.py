"""The corpus of damaged images: what is in it, and that real QEMU takes it for what it is meant to be."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fixtures import corpus
from fixtures.corpus import Specimen
from formats import qcow2 as layout
from tests.conformance.crashes import CRASHES, Crash
from tests.conformance.verdict import by_qemu
from tests.conftest import NewImage
from tests.support import qemu_img, read_table

DECLARED = {
    "header": layout.Header,
    "snapshots.0": layout.SnapshotTableEntry,
    "bitmaps.0": layout.BitmapDirectoryEntry,
    "extensions.bitmaps.data": layout.BitmapsExtension,
    "extensions.full_disk_encryption.data": layout.FullDiskEncryptionExtension,
    "extensions.feature_name_table.data.0": layout.FeatureName,
    "extensions.feature_name_table": layout.HeaderExtension,
}
RANGES = {
    "l1.copied": layout.L1TableEntry,
    "snapshots.0.l1.copied": layout.L1TableEntry,
    "l2.copied": layout.StandardL2Entry,
    "l2.zero_plain": layout.StandardL2Entry,
    "l2.compressed": layout.compressed_l2_entry(12),
    "snapshots.0.l2.shared": layout.StandardL2Entry,
    "l2.copied_partly.subclusters": layout.SubclusterBitmap,
    "refcount_table.used": layout.RefcountTableEntry,
    "bitmaps.0.table.data": layout.BitmapTableEntry,
}


@pytest.fixture(scope="module")
def specimens() -> list[Specimen]:
    return list(corpus.specimens())


def test_the_corpus_is_large_and_the_same_each_time(specimens: list[Specimen]) -> None:
    assert len(specimens) >= 300
    assert len({each.name for each in specimens}) == len(specimens)
    assert specimens == list(corpus.specimens())


def test_every_field_of_every_structure_is_damaged(specimens: list[Specimen]) -> None:
    paths = {re.sub(r"=[^=]*$", "", each.name).partition(".")[2] for each in specimens if each.faults}
    # No shipped image has extra data that nobody knows, or a padding that the data before leaves no room for.
    absent = {"unknown_extra_data", "extra_data", "padding"}
    for prefix, declared in DECLARED.items():
        for member in declared.subcons:
            assert member.name in absent or f"{prefix}.{member.name}" in paths
    for prefix, entry in RANGES.items():
        for name in entry.ranges:
            assert f"{prefix}.{name}" in paths


def test_what_is_damaged_differs_from_what_is_sound(specimens: list[Specimen]) -> None:
    for each in specimens:
        assert (each.build() == corpus.original(each.of)) == (not each.faults), each.name


def test_qemu_sees_all_kinds_of_faults_in_it_and_none_in_what_is_sound(
    specimens: list[Specimen], tmp_path: Path
) -> None:
    corpus.lay_out(tmp_path)

    def state(specimen: Specimen) -> str:
        path = specimen.write(tmp_path)
        try:
            return by_qemu(path).state
        finally:
            path.unlink()

    with ThreadPoolExecutor(2) as pool:
        some = [each for each in specimens if not each.faults] + specimens[::10]
        states = dict(zip(some, pool.map(state, some), strict=True))
    seen = Counter(states.values())
    assert min(seen[name] for name in ("clean", "leaks", "corruptions", "stops")) >= 10, seen
    assert {each.name for each, word in states.items() if not each.faults and word != "clean"} <= {"dirty"}


@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: crash.name)
def test_a_killed_writer_leaves_an_image_that_opens(crash: Crash, tmp_path: Path) -> None:
    states = [by_qemu(path).state for path in crash.images(tmp_path)]
    assert len(states) >= crash.writes // 2
    assert set(states) <= {"clean", "leaks", "corruptions"}


def test_qemus_repair_of_a_sound_image_with_a_bitmap_loses_its_snapshots(new_image: NewImage) -> None:
    """What docs/checking.md warns of. Once this fails, QEMU is mended, and the warning can name its version."""
    image = new_image("1M").write(0, 65536).snapshot("monday")
    qemu_img("bitmap", "--add", image.path, "dirty")
    assert by_qemu(image.path).state == "clean"
    qemu_img("check", "-q", "-r", "leaks", image.path, check=False)
    assert read_table(image.path) == []
