"""`qcow2snap check` on the command line: exit codes and fields of qemu-img check, and what it tells besides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NewImage
from tests.support import Result, qemu_img
from tests.support.table import cluster_size, field, patch, read_table, write_table

Run = Callable[..., Result]


def fields(result: Result) -> Any:
    """The JSON that was printed, whatever the exit code."""
    return json.loads(result.stdout)


@pytest.fixture
def image(new_image: NewImage) -> Path:
    """An image with two snapshots, in which all kinds of entries are."""
    made = new_image("2M", cluster_size=4096).write(0, 65536).write(1 << 20, 8192, compressed=True).snapshot("monday")
    return made.write(4096, 8192).snapshot("tuesday").write(0, 4096).path


def test_the_fields_of_qemu_img_check_are_there_with_its_meanings(run: Run, image: Path) -> None:
    theirs = qemu_img("check", "--output=json", image).json()
    for option in ("--json", "--output=json", "--format=json"):
        done = run("check", option, image)
        assert done.returncode == 0
        assert done.json().items() >= {**theirs, "filename": str(image)}.items()


def test_exit_codes_are_those_of_qemu_img_check(run: Run, image: Path, tmp_path: Path) -> None:
    def both(path: Path) -> int:
        code = qemu_img("check", path, check=False).returncode
        assert run("check", path).returncode == code
        return code

    raw = tmp_path / "raw"
    raw.write_bytes(bytes(65536))
    assert both(image) == 0
    assert both(raw) == 63
    assert both(tmp_path / "absent") == 1
    refcounts, end = field(image, field(image, 48)), -(-image.stat().st_size // 4096)
    patch(image, 4096 * end, bytes(4096))
    patch(image, refcounts + 2 * end, b"\0\x01")  # a cluster that nothing refers to
    assert both(image) == 3
    patch(image, refcounts, b"\0\0")  # the header
    assert both(image) == 2
    patch(image, 96, b"\0\0\0\x07")
    assert both(image) == 1


def test_a_finding_says_which_snapshots_it_touches_and_where(run: Run, image: Path) -> None:
    entry = read_table(image)[0]
    table = field(image, entry.l1_table_offset) & ~(0xFF << 56)
    patch(image, table + 8 * 3, (1 << 56 | field(image, table + 8 * 3)).to_bytes(8, "big"))  # a reserved bit
    done = run("check", "--json", image)
    (finding,) = fields(done)["findings"]
    assert (finding["rule"], finding["host-offset"], finding["guest-offset"]) == ("QCOW2-L2-006", table + 24, 3 * 4096)
    assert [snapshot["name"] for snapshot in finding["snapshots"]] == ["monday"]
    assert not finding["active-disk"]
    assert "snapshot monday, guest offset 0x3000" in run("check", image).stdout
    assert run("check", "-s", "monday", image).returncode == 2
    assert run("check", "-s", "tuesday", image).returncode == 0


def test_findings_are_limited_and_their_numbers_are_not(run: Run, image: Path) -> None:
    patch(image, field(image, 48), bytes(8))  # no refcount block at all
    whole = fields(run("check", "--json", image))
    assert len(whole["findings"]) > 10
    few = fields(run("check", "--json", "--max-findings=3", image))
    assert few == whole | {"findings": whole["findings"][:3]}
    told = run("check", image).stdout
    assert f"The first 10 of {sum(rule['count'] for rule in whole['rules'].values())}:" in told


def test_a_cut_snapshot_table_is_not_to_be_repaired(run: Run, new_image: NewImage) -> None:
    made = new_image("2M", cluster_size=4096).write(0, 65536).snapshot("monday").write(0, 8192).snapshot("tuesday")
    image = made.path
    before = {entry.name for entry in read_table(image)}
    offset = field(image, 64)
    assert offset + cluster_size(image) >= image.stat().st_size, "the table has to be the last structure"
    with image.open("r+b") as file:
        file.truncate(offset)
    done = run("check", image)
    assert done.returncode == qemu_img("check", image, check=False).returncode == 2
    assert "Do not run qemu-img check -r" in done.stdout
    told = fields(run("check", "--json", image))
    assert told["snapshots-lost"] == len(before)
    assert str(told["leaks"]) in str(told["warning"])
    copy = image.with_name("repaired.qcow2")
    shutil.copy(image, copy)
    qemu_img("check", "-r", "all", copy, check=False)
    assert not before & {entry.name for entry in read_table(copy)}  # what the warning is about


def test_what_qemu_img_passes_in_silence_is_found(run: Run, image: Path) -> None:
    entries = read_table(image)
    entries[1].id, entries[0].disk_size = entries[0].id, 1 << 50
    entries[1].extra = (1 << 40).to_bytes(8, "big") + entries[1].extra[8:]
    write_table(image, entries)
    patch(image, 105, b"\1")
    assert "QCOW2" not in qemu_img("check", image, check=False).stdout
    rules = fields(run("check", "--json", image))["rules"]
    assert {"QCOW2-SNAP-007", "QCOW2-SNAP-005", "QCOW2-HDR-016"} <= set(rules)


def test_what_is_allowed_is_not_reported(run: Run, image: Path) -> None:
    entry = read_table(image)[0]
    patch(image, 80, (1 << 40).to_bytes(8, "big"))  # a compatible feature that nobody knows
    first = field(image, entry.l1_table_offset)
    patch(image, entry.l1_table_offset, (first ^ 1 << 63).to_bytes(8, "big"))  # COPIED, in an inactive L1 table
    done = run("check", "--json", image)
    assert done.json()["findings"] == []


def test_quick_reads_no_l2_table(run: Run, image: Path) -> None:
    entry = read_table(image)[0]
    table = field(image, entry.l1_table_offset) & ~(0xFF << 56)
    patch(image, table, b"\xff" * 8)
    assert run("check", "--quick", image).returncode == 0
    patch(image, entry.l1_table_offset, b"\xff")
    assert run("check", "--quick", image).returncode == 2
    assert "total-clusters" not in fields(run("check", "--quick", "--json", image))


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_deep_finds_what_does_not_decompress(run: Run, new_image: NewImage, compression: str) -> None:
    made = new_image("2M", compression_type=compression).write(0, 65536, compressed=True).snapshot("monday")
    image = made.write(0, 65536).path
    assert run("check", "--deep", image).returncode == 0
    l2 = field(image, read_table(image)[0].l1_table_offset) & ~(0xFF << 56)
    patch(image, field(image, l2) & 0xFFFFFFFF, b"\xff" * 16)
    assert qemu_img("check", image).returncode == 0
    assert run("check", image).returncode == 0
    done = run("check", "--deep", "--json", image)
    assert done.returncode == 2
    (finding,) = fields(done)["findings"]
    assert finding["rule"] == "QCOW2-CMP-001"
    assert [snapshot["name"] for snapshot in finding["snapshots"]] == ["monday"]


def test_the_image_is_not_written(run: Run, image: Path) -> None:
    patch(image, field(image, 48), bytes(8))
    before = image.read_bytes(), image.stat().st_mtime_ns
    run("check", "--deep", image)
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


def test_the_rules_are_listed(run: Run) -> None:
    listed = run("check", "--rules", "--json").json()
    lines = run("check", "--rules").stdout.splitlines()
    assert len(lines) == len(listed) + 1
    for rule, line in zip(listed, lines[1:], strict=True):
        assert line.split()[:2] == [rule["id"], rule["severity"]]
