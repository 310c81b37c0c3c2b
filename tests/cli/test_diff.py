"""`qcow2snap diff`: what differs, as a table, as JSON and as an exit code that scripts can trust."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.support import here
from tests.conftest import NewImage
from tests.support import Library, Result
from tests.support import run as in_a_process

Run = Callable[..., Result]

SAME, DIFFERENT, COULD_NOT = 0, 1, 2
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def image(new_image: NewImage) -> Path:
    """Two snapshots and an active disk that is larger than they were."""
    made = new_image("4M").write(0, MIB).snapshot("monday").write(64 * KIB, 64 * KIB).write(2 * MIB, 64 * KIB)
    return made.snapshot("tuesday").resize("6M").discard(0, 64 * KIB).path


def differences(result: Result) -> list[tuple[int, int, str]]:
    """What --json said, where it said that there are differences."""
    assert result.returncode == DIFFERENT, result.stderr
    return [(entry["start"], entry["length"], entry["change"]) for entry in json.loads(result.stdout)]


def test_what_differs_between_two_snapshots(run: Run, image: Path) -> None:
    result = run("diff", image, "monday", "tuesday", "--json")
    assert differences(result) == [(64 * KIB, 64 * KIB, "data"), (2 * MIB, 64 * KIB, "was-zero")]


def test_without_a_second_snapshot_the_active_disk_is_meant(run: Run, image: Path) -> None:
    result = run("diff", "--json", image, "id=2")
    assert differences(result) == [(0, 64 * KIB, "became-zero"), (4 * MIB, 2 * MIB, "size")]


def test_the_same_is_exit_code_0(run: Run, image: Path) -> None:
    assert run("diff", image, "monday", "id=1") == ("", "", SAME)
    assert run("diff", image, "monday", "name=monday", "--json") == ("[]\n", "", SAME)


def test_the_table_for_people(run: Run, image: Path) -> None:
    result = run("diff", image, "monday", "tuesday")
    assert result.returncode == DIFFERENT
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["Offset", "Length", "Change"],
        ["0x10000", "0x10000", "data"],
        ["0x200000", "0x10000", "was-zero"],
    ]


def test_a_part_of_the_disk(run: Run, image: Path) -> None:
    part = ("--json", "--start-offset", "96k", "--max-length", "1M")
    assert differences(run("diff", image, "monday", "tuesday", *part)) == [(96 * KIB, 32 * KIB, "data")]
    assert run("diff", image, "monday", "tuesday", "--start-offset", "3M").returncode == SAME


def test_what_was_written_again_with_the_same_bytes_is_no_difference_when_verified(
    run: Run, new_image: NewImage
) -> None:
    made = new_image("8M").write(0, 4 * MIB, 7).snapshot("then").write(0, 3 * MIB, 7).write(MIB, 512)
    made.write_zeroes(5 * MIB, MIB)
    assert differences(run("diff", "--json", made.path, "then")) == [(0, 3 * MIB, "data")]
    assert differences(run("diff", "--json", "--verify", made.path, "then")) == [(MIB, 64 * KIB, "data")]
    same = new_image("8M").write(0, 4 * MIB, 7).snapshot("then").write(0, 3 * MIB, 7)
    assert run("diff", same.path, "then").returncode == DIFFERENT
    assert run("diff", "--verify", same.path, "then") == ("", "", SAME)


def test_verified_differences_of_many_pieces_stay_in_order(run: Run, new_image: NewImage) -> None:
    made = new_image("48M").write(0, 48 * MIB, 7).snapshot("then").write(0, 48 * MIB, 7)
    written = [(offset, 64 * KIB, "data") for offset in range(0, 48 * MIB, 3 * MIB)]
    for offset, _, _ in written:
        made.write(offset + 512, 512)
    assert differences(run("diff", "--json", "--verify", made.path, "then")) == written


# What cannot be compared is never taken for a difference


@pytest.mark.parametrize(
    "words",
    [
        ["nothing.qcow2", "monday"],
        ["{image}"],
        ["{image}", "friday"],
        ["{image}", "monday", "friday"],
        ["{image}", "monday", "tuesday", "wednesday"],
        ["{image}", "monday", "--no-such-option"],
        ["{image}", "monday", "--start-offset", "1T"],
        ["{image}", "monday", "--start-offset", "much"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_exit_code_2(run: Run, image: Path, words: list[str]) -> None:
    result = run("diff", *(word.format(image=image) for word in words))
    assert result.returncode == COULD_NOT
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr


def test_damage_is_exit_code_2_after_what_was_found_before_it(library: Library) -> None:
    result = here("diff", library.path("subcluster-both"), "id=1")
    assert result.returncode == COULD_NOT
    assert "QCOW2-L2-005" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_bad_option_before_the_command_is_a_usage_error() -> None:
    assert in_a_process("--no-such-option", "diff").returncode == 2


def test_verifying_an_encrypted_image_says_why_it_cannot(library: Library) -> None:
    path = library.path("aes")
    ids = [snapshot.id.decode() for snapshot in library.images["aes"].snapshots]
    assert here("diff", path, f"id={ids[0]}").returncode == DIFFERENT
    result = here("diff", "--verify", path, f"id={ids[0]}")
    assert result.returncode == COULD_NOT
    assert "encrypted" in result.stderr
