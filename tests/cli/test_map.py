"""`qcow2snap map`: entry for entry what qemu-img says of the active disk, and the same of any snapshot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import complaint, here
from tests.conftest import NewImage
from tests.support import Library, Result, qemu_img, qemu_map

Run = Callable[..., Result]

# One of each kind of mapping that there is.
IMAGES = ["demo", "backing-chain", "backing-raw-shorter", "compressed-mixed", "data-file", "data-file-raw", "discards"]
IMAGES += ["empty", "extended-l2-backed", "grown-over-backing", "preallocation-metadata", "sound", "zero-clusters"]
PARTS = [("0", "64k"), ("1", "511"), ("4095", "4098"), ("32k", "1G"), ("0x1000", "1"), ("100k", "3k"), ("0", "0")]


def qemu_part(path: Path, start: str, length: str) -> Any:
    flags = [f"--start-offset={start}", f"--max-length={length}"]
    return qemu_img("map", "--output=json", *flags, path).json()


@pytest.mark.parametrize("name", IMAGES)
def test_json_is_that_of_qemu_img_entry_for_entry(library: Library, run: Run, name: str) -> None:
    path = library.path(name)
    assert run("map", "--json", path).json() == qemu_map(path)


@pytest.mark.parametrize("name", ["demo", "sound", "backing-chain"])
def test_json_is_that_of_qemu_img_to_the_byte(library: Library, run: Run, name: str) -> None:
    path = library.path(name)
    assert run("map", "--json", path).stdout == qemu_img("map", "--output=json", path).stdout


@pytest.mark.parametrize(("start", "length"), PARTS)
@pytest.mark.parametrize("name", ["sound", "backing-chain", "extended-l2-backed", "zero-clusters"])
def test_a_part_of_the_disk_is_that_of_qemu_img(library: Library, name: str, start: str, length: str) -> None:
    path = library.path(name)
    ours = here("map", "--json", "--start-offset", start, "--max-length", length, path).json()
    assert ours == [entry for entry in qemu_part(path, start, length) if entry["length"]]


def test_a_start_beyond_the_end_is_told(library: Library, run: Run) -> None:
    assert "beyond the end" in complaint(run("map", "--start-offset", "1T", library.path("demo")))


@pytest.mark.parametrize("name", ["backing-format-absent", "discards", "extended-l2-backed", "grown", "zero-clusters"])
def test_the_table_for_people_has_the_rows_of_qemu_img(library: Library, name: str) -> None:
    path = library.path(name)
    assert rows(here("map", path).stdout) == rows(qemu_img("map", path).stdout)


def test_compressed_clusters_are_in_the_table_though_they_lie_nowhere_verbatim(library: Library, run: Run) -> None:
    path = library.path("compressed-mixed")
    assert qemu_img("map", path, check=False).returncode == 1  # "external, encrypted or compressed clusters"
    assert any("compressed" in line for line in run("map", path).stdout.splitlines())


def rows(text: str) -> list[tuple[int, int, int, str]]:
    """Offset, length, place and file name; a run that is cut in two is put together again."""
    result: list[tuple[int, int, int, str]] = []
    for line in text.splitlines()[1:]:
        offset, length, place = (int(word, 16) for word in line.split()[:3])
        name = Path(line.split()[3]).name
        if result and result[-1][3] == name and (sum(result[-1][:2]), result[-1][1] + result[-1][2]) == (offset, place):
            offset, place, length = result[-1][0], result[-1][2], result[-1][1] + length
            result.pop()
        result.append((offset, length, place, name))
    return result


# Snapshots


def test_a_snapshot_is_mapped_as_the_disk_was_that_it_froze(new_image: NewImage, run: Run) -> None:
    image = new_image("1M", cluster_size=4096).write(0, 65536).write_zeroes(131072, 8192).snapshot("then")
    before = qemu_map(image.path)
    image.resize("2M").write(0, 4096).write(1 << 20, 65536).discard(32768, 4096)
    assert run("map", "--json", "-s", "then", image.path).json() == before
    assert run("map", "--json", "--snapshot", "id=1", image.path).json() == before
    assert run("map", "--json", image.path).json() == qemu_map(image.path)


def test_a_part_of_a_snapshot_ends_with_the_snapshot(new_image: NewImage, run: Run) -> None:
    image = new_image("1M").write(0, 65536).snapshot("small").resize("8M").write(0, 8 << 20)
    part = run("map", "--json", "-s", "small", "--start-offset", "32k", "--max-length", "4M", image.path).json()
    assert part[0]["start"] == 32768
    assert part[-1]["start"] + part[-1]["length"] == 1 << 20


def test_a_snapshot_of_no_bytes_has_an_empty_map(library: Library, run: Run) -> None:
    assert run("map", "--json", "-s", "nothing", library.path("size-zero")).json() == []


def test_a_map_of_the_vm_state_covers_just_that(library: Library, run: Run) -> None:
    entries = run("map", "--json", "--vm-state", "-s", "before-upgrade", library.path("demo")).json()
    (snapshot,) = (s for s in library.images["demo"].snapshots if s.vm_state_size)
    assert entries[0]["start"] == 0
    assert sum(entry["length"] for entry in entries) == snapshot.vm_state_size


def test_what_is_known_before_damage_is_shown_before_the_error(library: Library, run: Run) -> None:
    result = run("map", "--json", library.path("l1-beyond-end"))  # the second L2 table
    assert result.returncode == 1
    assert "QCOW2-L2-001" in result.stderr
    entries = json.loads(result.stdout.rstrip().rstrip(",]") + "]")
    assert sum(entry["length"] for entry in entries) == 2 << 20
