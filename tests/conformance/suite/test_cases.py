"""The cases themselves: the same bytes each time, and real QEMU finds in them what the builder says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcow2snap.conformance.suite import SUITE_VERSION
from qcow2snap.conformance.suite.judge import judge_content, judge_map
from qcow2snap.conformance.suite.manifest import PATH, read_manifest, record
from qcow2snap.conformance.suite.registry import all_cases
from qcow2snap.conformance.suite.values import Built, Case, Disk, Section
from tests.cli.support import here
from tests.support.files import copy_with_holes
from tests.support.tools import Result, qemu_img

CASES = {case.name: case for case in all_cases()}
SMALL = [case for case in CASES.values() if not case.large]

# Where QEMU does something else than the builder says, and why that is no fault of the builder's.
SECTORS = "QEMU counts in sectors of 512 bytes, and drops or fills up what is less"
QEMU_DEVIATES = {
    "size-part-of-sector": SECTORS,
    "backing-shorter-within-sector": SECTORS + " (its map only)",
    "refuse-backing-loop": "QEMU opens the image again and again until it runs out of something, for up to a minute",
    "deflate-no-final-block": "QEMU lets zlib look for the next block: 'decompression stops' only if it ends there",
    "bitmap-extra-data": "QEMU refuses an image with a bitmap that has extra data, compatible or not",
    "refuse-snapshots-unaligned": "QEMU refuses the image, and not only its snapshots; a reader may do either",
    "refuse-snapshot-l1-short": "QEMU reads zeros where a snapshot's L1 table ends; of the active disk's it refuses it",
}
# What qemu-img cannot revert to, so that it is judged by `convert -l`, which takes the active disk's size (T1, T2).
NOT_REVERTED = {
    "snapshot-v2-size": "QEMU does not resize images of version 2 that have snapshots",
    "snapshot-size-part-of-sector": SECTORS,
    "bitmap-and-snapshot": "QEMU does not revert a disk with bitmaps",
}
# What `qemu-img check`, and ours, find in images that can be read.
NOT_CLEAN = {
    "feature-dirty": "its refcounts are zero, which is the point",
    "bitmap-inconsistent": "QEMU counts what bitmaps occupy as leaked once they are inconsistent",
    "bitmap-extra-data": "bitmaps with extra data are not checked, by neither",
    "snapshot-v3-no-extra": "the extra data is missing, which is the point",
}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_bytes_and_the_expectations_are_those_that_were_recorded(case: Case) -> None:
    assert record(case) == read_manifest()["cases"][case.name]


def test_the_manifest_is_of_this_version_and_has_each_case() -> None:
    manifest = json.loads(PATH.read_text())
    assert manifest["version"] == SUITE_VERSION
    assert [*manifest["cases"]] == [*CASES]


def test_every_section_has_cases_that_are_about_it() -> None:
    assert {case.sections[0] for case in CASES.values()} == set(Section)


def test_no_image_is_large() -> None:
    """By the one with the largest clusters."""
    largest = sum(file.size for file in CASES["cluster-bits-21"].build().files.values())
    assert largest < 24 << 20


@pytest.mark.parametrize(
    "case", [case for case in SMALL if case.name != "refuse-backing-loop"], ids=lambda case: case.name
)
def test_qemu_finds_what_the_builder_put_in(case: Case, tmp_path: Path) -> None:
    built = case.build()
    image = built.write(tmp_path)
    verdicts = [_judged_by_qemu(case.name, image, disk) for disk in built.disks]
    wrong = [verdict for verdict in verdicts if verdict is not None]
    assert bool(wrong) == (case.name in QEMU_DEVIATES), wrong
    if not any(disk.must_refuse for disk in built.disks):
        assert (here("check", image).returncode == 0) == (case.name not in NOT_CLEAN)
        if not wrong:
            is_clean = qemu_img("check", "-q", image, check=False).returncode == 0
            assert is_clean == (case.name not in NOT_CLEAN)


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CASES.values() if case.large])
def test_qemu_finds_what_is_beyond_4_gib(name: str, tmp_path: Path) -> None:
    built = CASES[name].build()
    assert _judged_by_qemu(name, built.write(tmp_path), built.disks[0]) is None
    assert record(CASES[name]) == read_manifest()["cases"][name]


def _judged_by_qemu(name: str, image: Path, disk: Disk) -> str | None:
    """What is wrong with a disk, if QEMU is right."""
    if disk.snapshot is None:
        return _judged(disk, image)
    copy = copy_with_holes(image, image.with_name("reverted.qcow2"))
    reverted = qemu_img("snapshot", "-a", disk.snapshot.id, copy, check=False)
    if reverted.returncode == 0:
        return _judged(disk, copy)
    if name in NOT_REVERTED:
        return _judged_by_prefix(disk, image)
    return None if disk.must_refuse or disk.may_refuse else reverted.stderr


def _judged(disk: Disk, image: Path) -> str | None:
    raw = image.with_name("disk.raw")
    done = qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw, check=False)
    if disk.must_refuse or done.returncode != 0:
        return None if disk.must_refuse == (done.returncode != 0) else done.stderr or "accepted"
    wrong = judge_content(disk, raw)
    raw.unlink()
    if wrong is None and disk.map is not None:
        wrong = judge_map(disk, _map(image))
    return wrong


def _map(image: Path) -> str:
    """Without the part of a sector that QEMU drops, and without its one empty entry for an empty disk."""
    listed: Result = qemu_img("map", "-f", "qcow2", "--output=json", image)
    return json.dumps([entry for entry in listed.json() if entry["length"]])


def _judged_by_prefix(disk: Disk, image: Path) -> str | None:
    """A snapshot by `convert -l`, as far as the active disk goes too."""
    assert disk.snapshot is not None
    assert disk.content is not None
    raw = image.with_name("disk.raw")
    qemu_img("convert", "-l", b"snapshot.id=" + disk.snapshot.id, "-O", "raw", image, raw)
    with raw.open("rb") as file:
        at = disk.content.first_difference(file)
    return None if at is None else f"differs at {at:#x}"


def test_the_builder_is_really_judged(tmp_path: Path) -> None:
    """The same comparison, of images and expectations that do not belong together."""
    one, other = CASES["mapping-full"].build(), CASES["mapping-reverse"].build()
    mixed = Built(one.files, other.disks, one.layout)
    assert _judged_by_qemu("mixed", mixed.write(tmp_path), mixed.disks[0])
