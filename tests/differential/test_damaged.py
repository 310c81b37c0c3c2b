"""Damaged images: what the damage does not touch stays readable, and the rest fails as an error that says where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qcow2snap
from tests.cli.support import here
from tests.differential import judge
from tests.support import Content, DamagedImage, Library

LIBRARY = Library(Path())
SECONDS = 5  # that any damaged image may take
MEBIBYTES = 256  # that any number of them may take

COMMANDS = [("list",), ("list", "--json"), ("info",), ("info", "--json"), ("map", "--json")]

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.timeout(SECONDS)]

each_damage = pytest.mark.parametrize("damage", LIBRARY.damaged.values(), ids=str)


def disks_of(library: Library, name: str) -> dict[str, Content]:
    """What the disks of a sound image hold, by the references that open them."""
    image = library.images[name]
    return {"active": image.active} | {f"id={s.id.decode()}": s.content for s in image.snapshots}


def disk(image: qcow2snap.Image, ref: str) -> qcow2snap.Disk:
    return image.active if ref == "active" else image.snapshot(ref)


@each_damage
def test_what_is_not_damaged_reads_as_before(damage: DamagedImage, library: Library) -> None:
    contents = disks_of(library, damage.of)
    for ref in damage.intact:
        with qcow2snap.open(library.path(damage.name)) as image:
            judge.disk_holds(disk(image, ref), contents[ref])


@each_damage
def test_what_is_damaged_fails_and_never_reads_as_something_else(damage: DamagedImage, library: Library) -> None:
    for ref in disks_of(library, damage.of).keys() - set(damage.intact):
        with pytest.raises(qcow2snap.Qcow2SnapError), qcow2snap.open(library.path(damage.name)) as image:
            judge.digest(disk(image, ref).open())


@each_damage
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_answers_or_says_in_one_line_why_not(
    damage: DamagedImage, command: tuple[str, ...], library: Library
) -> None:
    result = here(*command, library.path(damage.name))
    if result.returncode != 0:
        assert result.returncode == 1
        assert result.stderr.startswith("qcow2snap: ")
        assert damage.name in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("damage", [d for d in LIBRARY.damaged.values() if d.name.startswith("backing-")], ids=str)
def test_list_does_not_follow_references(damage: DamagedImage, library: Library) -> None:
    listed = here("list", "--json", library.path(damage.name)).json()
    assert [snapshot["id"] for snapshot in listed] == ["1", "2"]


@each_damage
def test_reading_gives_the_content_or_an_error_of_ours(damage: DamagedImage, library: Library) -> None:
    """Each disk is read in pieces, so that one error does not hide what comes after it."""
    try:
        image = qcow2snap.open(library.path(damage.name))
    except qcow2snap.Qcow2SnapError:
        return
    with image:
        for damaged in (image.active, *image.snapshots):
            with damaged.open() as file:
                for offset in range(0, min(damaged.size, 8 << 20), 64 << 10):
                    file.seek(offset)
                    try:
                        file.read(64 << 10)
                    except qcow2snap.Qcow2SnapError as error:
                        assert str(error)  # noqa: PT017  # there is no way to expect "perhaps"


@pytest.mark.timeout(60)
def test_all_of_them_together_stay_small(library: Library) -> None:
    """In a process of its own, whose peak of memory is measured."""
    paths = [str(library.path(name)) for name in library.damaged]
    program = """
import sys
from tests.cli.support import here
from tests.support.memory import memory_limit
with memory_limit(int(sys.argv[1])):
    for path in sys.argv[2:]:
        for command in ("list", "info", "map"):
            here(command, path)
"""
    command = [sys.executable, "-c", program, str(MEBIBYTES << 20), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
