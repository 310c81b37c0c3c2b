"""`qcow2snap extract --skip-damaged`: all that can be read, and an honest list of what could not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import complaint, contents, finish, here, start
from tests.support import Library, Result, qemu_img

Run = Callable[..., Result]

CLUSTER = 4096  # of the image that was damaged
L2_COVERAGE = CLUSTER // 8 * CLUSTER
SIZE = 3 * L2_COVERAGE


@pytest.fixture(scope="module")
def sound(library: Library, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The active disk before the damage, by qemu-img."""
    raw = tmp_path_factory.mktemp("sound") / "raw"
    qemu_img("convert", "-O", "raw", library.path("sound"), raw)
    return raw.read_bytes()


def salvage(image: Path, out: Path, *flags: str) -> list[dict[str, Any]]:
    """Extract what can be read; returns the list of holes that lies beside the output."""
    result = here("extract", "--skip-damaged", *flags, image, out)
    assert result.returncode == 0, result.stderr
    holes = json.loads(out.with_name(f"{out.name}.holes.json").read_text())
    assert isinstance(holes, list)
    return holes


def without(data: bytes, holes: list[dict[str, Any]], start_at: int = 0) -> bytes:
    """The same with zeros where there are holes."""
    result = bytearray(data)
    for hole in holes:
        place = hole["offset"] - start_at
        result[place : place + hole["length"]] = bytes(hole["length"])
    return bytes(result)


@pytest.mark.parametrize(
    ("damaged", "rule", "offset", "length"),
    [
        ("l2-beyond-end", "QCOW2-L2-002", 0, CLUSTER),
        ("l2-unaligned", "QCOW2-L2-003", 0, CLUSTER),
        ("l2-compressed-beyond-end", "QCOW2-CMP-002", 16 * CLUSTER, CLUSTER),
        ("compressed-garbage", "QCOW2-CMP-001", 16 * CLUSTER, CLUSTER),
        ("compressed-short", "QCOW2-CMP-001", 16 * CLUSTER, CLUSTER),
        ("l1-unaligned", "QCOW2-L1-002", 0, L2_COVERAGE),
        ("l1-beyond-end", "QCOW2-L2-001", L2_COVERAGE, L2_COVERAGE),
        ("header-l1-beyond-end", "QCOW2-L1-001", 0, SIZE),
    ],
)
def test_just_what_is_damaged_is_a_hole(
    library: Library, sound: bytes, tmp_path: Path, damaged: str, rule: str, offset: int, length: int
) -> None:
    (hole,) = salvage(library.path(damaged), tmp_path / "out")
    assert (hole["rule"], hole["offset"], hole["length"]) == (rule, offset, length)
    assert rule in hole["message"]
    assert (tmp_path / "out").read_bytes() == without(sound, [hole])


@pytest.mark.parametrize("damaged", ["cut-in-half", "cut-last-cluster"])
def test_of_a_truncated_file_the_rest_comes_out(library: Library, sound: bytes, tmp_path: Path, damaged: str) -> None:
    holes = salvage(library.path(damaged), tmp_path / "out")
    data = (tmp_path / "out").read_bytes()
    assert holes
    assert data == without(sound, holes)
    assert data.count(0) < len(data) or damaged == "cut-in-half"


def test_without_it_the_first_damage_is_the_error(library: Library, run: Run, tmp_path: Path) -> None:
    path = library.path("l2-unaligned")
    said = complaint(run("extract", path, tmp_path / "out"))
    assert said.startswith(f"{path}: ")
    assert "QCOW2-L2-003, at byte 0xf000" in said
    assert contents(tmp_path) == []


def test_how_much_is_missing_is_told(library: Library, run: Run, tmp_path: Path) -> None:
    result = run("extract", "--skip-damaged", library.path("l2-unaligned"), tmp_path / "out")
    assert result.stderr == "qcow2snap: 4096 bytes in one hole could not be read\n"


def test_a_sound_image_has_an_empty_list(library: Library, sound: bytes, tmp_path: Path) -> None:
    assert salvage(library.path("sound"), tmp_path / "out") == []
    assert (tmp_path / "out").read_bytes() == sound


@pytest.mark.parametrize("damaged", ["snapshot-l1-unaligned", "snapshot-l1-beyond-end", "snapshot-l1-huge"])
def test_a_damaged_l1_table_of_one_snapshot_leaves_the_others(
    library: Library, run: Run, tmp_path: Path, damaged: str
) -> None:
    path, second = library.path(damaged), library.images["sound"].snapshots[1].content
    assert here("extract", "-s", "second", path, tmp_path / "second").returncode == 0
    assert here("extract", path, tmp_path / "active").returncode == 0
    digest = here("digest", "--json", "-s", "second", path).json()["entries"][0]["digests"]["sha256"]
    assert digest == second.sha256
    assert "QCOW2-" in complaint(run("extract", "-s", "first", path, tmp_path / "first"))
    assert contents(tmp_path) == ["active", "second"]
    (hole,) = salvage(path, tmp_path / "first", "-s", "first")
    assert (hole["offset"], hole["length"]) == (0, SIZE)


def test_holes_of_a_range_are_told_in_offsets_of_the_disk(library: Library, sound: bytes, tmp_path: Path) -> None:
    start_at = 16 * CLUSTER - 100
    (hole,) = salvage(library.path("compressed-garbage"), tmp_path / "out", "--range", f"{start_at}:2k")
    assert (hole["offset"], hole["length"]) == (16 * CLUSTER, 2048 - 100)
    assert (tmp_path / "out").read_bytes() == without(sound[start_at : start_at + 2048], [hole], start_at)


def test_a_range_beside_the_damage_has_no_holes(library: Library, sound: bytes, tmp_path: Path) -> None:
    assert salvage(library.path("compressed-garbage"), tmp_path / "out", "--range", "0:64k") == []
    assert (tmp_path / "out").read_bytes() == sound[:65536]


def test_on_a_pipe_zeros_stand_for_holes_which_are_told_on_stderr(library: Library, sound: bytes) -> None:
    process = start("extract", "--skip-damaged", library.path("compressed-garbage"), "-")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == without(sound, [{"offset": 16 * CLUSTER, "length": CLUSTER}])
    assert b"hole: 4096 bytes at 65536: " in err


def test_the_list_of_holes_of_another_extract_is_not_overwritten(library: Library, run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.holes.json").write_text("precious")
    said = complaint(run("extract", "--skip-damaged", library.path("sound"), tmp_path / "out"))
    assert "out.holes.json" in said
    assert (tmp_path / "out.holes.json").read_text() == "precious"
    assert contents(tmp_path) == ["out.holes.json"]


def test_a_list_of_holes_that_cannot_be_written_leaves_nothing(library: Library, tmp_path: Path) -> None:
    """An output with holes that nobody is told of would be taken for whole."""
    (tmp_path / "out.holes.json").mkdir()
    result = finish(start("extract", "--force", "--skip-damaged", library.path("l2-unaligned"), tmp_path / "out"))
    assert result.returncode == 1
    assert contents(tmp_path) == ["out.holes.json"]
