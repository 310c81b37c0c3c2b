"""`qcow2snap list`: every snapshot with its own size, whatever its name is made of."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.support import complaint, finish, start
from tests.conftest import NewImage
from tests.support import Library, Result, qemu_info, read_table
from tests.support.table import write_table

Run = Callable[..., Result]

DEMO = """\
ID  TAG              VM SIZE  DISK SIZE                 DATE      VM CLOCK  ICOUNT
1   monday               0 B      1 MiB  2026-11-16 09:00:00  00:00:00.000       0
2   tuesday              0 B      3 MiB  2026-11-17 09:00:00  00:00:00.000       0
3   before-upgrade  61.2 KiB      2 MiB  2026-11-18 09:00:00  00:00:00.000      --
"""


def tags(result: Result) -> list[str]:
    """The column TAG of a table, for names without spaces at their ends."""
    heading, *rows = result.stdout.splitlines()
    start, end = heading.index("TAG"), heading.index("VM SIZE")
    return [row[start:end].rstrip().removesuffix("0 B").rstrip() for row in rows]


# What is told


def test_the_table_shows_each_snapshot_with_its_own_size(library: Library) -> None:
    result = finish(start("list", library.path("demo")))
    assert result == Result(DEMO, "", 0)


@pytest.mark.parametrize("name", ["demo", "compat-0.10", "extra-data", "many", "shrunk-by-revert", "vm-state"])
def test_json_is_what_qemu_img_says_and_the_disk_size(library: Library, run: Run, name: str) -> None:
    path = library.path(name)
    ours = run("list", "--json", path).json()
    assert [entry.pop("disk-size") for entry in ours] == [entry.disk_size for entry in read_table(path)]
    assert ours == qemu_info(path)["snapshots"]


def test_without_a_size_of_its_own_a_snapshot_has_that_of_the_disk(library: Library, run: Run) -> None:
    path = library.path("no-extra-data")
    sizes = [entry["disk-size"] for entry in run("list", "--json", path).json()]
    assert sizes == [qemu_info(path)["virtual-size"]] * 2


def test_clocks_and_instruction_counts_are_those_of_qemu_img(new_image: NewImage, run: Run) -> None:
    path = new_image("64k").snapshot("ran for a day").snapshot("counted").path
    first, second = read_table(path)
    first.vm_clock_nsec = 93_784_000_000_005  # 26 hours, 3 minutes, 4 seconds and a little
    first.date_nsec = 999_999_999
    second.extra = second.extra[:16] + struct.pack(">Q", 123_456_789_012)
    write_table(path, [first, second])
    ours = run("list", "--json", path).json()
    assert [entry.pop("disk-size") for entry in ours] == [65536, 65536]
    assert ours == qemu_info(path)["snapshots"]
    lines = run("list", path).stdout.splitlines()
    assert "26:03:04.000" in lines[1]
    assert lines[2].endswith(" 123456789012")


@pytest.mark.parametrize("flags", [["--json"], ["--output=json"], ["--output", "json"]], ids=" ".join)
def test_json_may_be_asked_for_as_from_qemu_img(library: Library, run: Run, flags: list[str]) -> None:
    assert len(run("list", *flags, library.path("demo")).json()) == 3


def test_an_image_without_snapshots_is_no_error(new_image: NewImage, run: Run) -> None:
    path = new_image("64k").path
    assert run("list", "--json", path).json() == []
    result = run("list", path)
    assert (result.stdout, result.returncode) == ("", 0)
    assert "has no snapshots" in result.stderr


@pytest.mark.parametrize("name", ["backing-chain", "backing-raw-longer", "data-file"])
def test_neither_backing_nor_data_file_is_needed(library: Library, run: Run, tmp_path: Path, name: str) -> None:
    whole = library.path(name)
    alone = shutil.copyfile(whole, tmp_path / "alone.qcow2")
    result = run("list", "--json", alone)
    assert result.stderr == ""
    assert result.json() == run("list", "--json", whole).json()


# Names


def test_every_snapshot_is_one_line_whatever_its_name(library: Library, run: Run) -> None:
    shown = tags(run("list", library.path("names")))
    assert len(shown) == len(library.images["names"].snapshots)
    assert shown[1] == ""
    assert r"\xff\xfe latin" in shown
    assert r"line\nbreak" in shown
    assert "Übersicht 概要" in shown


def test_a_name_that_is_not_utf8_is_escaped_and_found_escaped_and_as_it_is(library: Library, run: Run) -> None:
    path = library.path("names")
    assert r"\xff\xfe latin" in [entry["name"] for entry in run("list", "--json", path).json()]
    for ref in (rb"\xff\xfe latin", b"\xff\xfe latin", rb"name=\xff\xfe latin", b"name=\xff\xfe latin"):
        assert hashed(run, path, ref) == "3"


@pytest.mark.parametrize(
    ("ref", "id_"),
    [
        ("", "2"),
        ("name=", "2"),
        ("Übersicht 概要", "6"),
        ("name=id=1", "7"),
        ("a,b=c", "8"),
        ("with space", "9"),
        ("line\nbreak", "10"),
        ("id=5", "5"),
        ("id=5,name=dup", "5"),
        ("name=dup,id=4", "4"),
        ("snapshot.id=4,snapshot.name=dup", "4"),
    ],
)
def test_any_name_can_be_referred_to(library: Library, run: Run, ref: str, id_: str) -> None:
    assert hashed(run, library.path("names"), ref) == id_


def test_names_of_65535_bytes_are_told_whole_and_found(library: Library, run: Run) -> None:
    path = library.path("names-long")
    names = [snapshot.name.decode() for snapshot in library.images["names-long"].snapshots]
    assert max(map(len, names)) == 65535
    assert [entry["name"] for entry in run("list", "--json", path).json()] == names
    assert tags(run("list", path)) == names
    assert hashed(run, path, names[-1]) == str(len(names))


def test_two_of_one_name_are_both_shown_and_neither_is_guessed(library: Library, run: Run) -> None:
    path = library.path("names")
    assert tags(run("list", path)).count("dup") == 2
    said = complaint(run("map", "-s", "dup", path))
    assert '2 snapshots fit "dup"' in said
    assert 'id=4 "dup"' in said
    assert 'id=5 "dup"' in said


def test_a_name_that_is_the_id_of_another_is_ambiguous_and_both_are_shown(library: Library, run: Run) -> None:
    path = library.path("name-equals-id")  # 1 is called 2, and 2 is called 1
    assert complaint(run("map", "-s", "2", path)) == (
        '"2" is the id of snapshot "1" and the name of the snapshot with id 1: say id=2 or name=2'
    )
    assert hashed(run, path, "id=2") == "2"
    assert hashed(run, path, "name=2") == "1"
    assert hashed(run, path, "9") == "3"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_a_name_gets_it_escaped(library: Library, run: Run, encoding: str) -> None:
    result = run("list", library.path("names"), env={"PYTHONIOENCODING": encoding})
    assert result.stderr == ""
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 1 + len(library.images["names"].snapshots)


def hashed(run: Run, path: Path, ref: str | bytes) -> str:
    """The id of the snapshot that a reference leads to, as `digest` tells it."""
    (entry,) = run("digest", "--json", "-a", "crc32c", "-s", ref, path).json()["entries"]
    assert isinstance(entry["id"], str)
    return entry["id"]


# Damage


@pytest.mark.parametrize(
    ("damaged", "readable", "said"),
    [
        ("cut-in-table", ["1"], "1 of 2 snapshots cannot be read, from entry 2 on: "),
        ("cut-before-table", [], "2 of 2 snapshots cannot be read, from entry 1 on: "),
        ("table-name-long", ["1"], "1 of 2 snapshots cannot be read, from entry 2 on: "),
        ("header-snapshots-beyond-end", [], "2 of 2 snapshots cannot be read, from entry 1 on: "),
    ],
)
def test_of_a_damaged_table_what_can_be_read_is_listed(
    library: Library, run: Run, damaged: str, readable: list[str], said: str
) -> None:
    path = library.path(damaged)
    result = run("list", path)
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == readable
    assert said in complaint(result)
    assert "(QCOW2-SNAP-" in complaint(result)


def test_a_damaged_table_does_not_spoil_the_json(library: Library, run: Run) -> None:
    result = run("list", "--json", library.path("cut-in-table"))
    assert result.returncode == 1
    assert [entry["name"] for entry in result._replace(returncode=0).json()] == ["first"]


def test_a_table_without_a_readable_entry_is_not_said_to_be_empty(library: Library, run: Run) -> None:
    result = run("list", library.path("cut-before-table"))
    assert "has no snapshots" not in result.stderr
