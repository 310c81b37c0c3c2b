"""`qcow2snap info`: all that qemu-img says of an image under the same names, and what only we say."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import finish, here, start
from tests.support import FixtureImage, Library, Result, qemu_img, qemu_info

Run = Callable[..., Result]

LIBRARY = Library(Path())  # for the names of the tests
SECTOR = 512
QEMU_NAME_LIMIT = 255  # bytes; qemu-img cuts longer names


def lacking(theirs: Any, ours: Any, where: str = "") -> list[str]:
    """The keys at which we do not say what qemu-img says."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [line for key in theirs for line in lacking(theirs[key], ours.get(key), f"{where}/{key}")]
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = enumerate(zip(theirs, ours, strict=True))
        return [line for index, (their, our) in pairs for line in lacking(their, our, f"{where}/{index}")]
    return [] if type(theirs) is type(ours) and theirs == ours else [f"{where}: {theirs!r}, not {ours!r}"]


def settled(path: Path) -> Path:
    """An image whose space on the disk is allocated, so that all who ask are told the same."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def qemu_says(path: Path, snapshots: FixtureImage | None = None) -> Any:
    theirs = qemu_info(path)
    theirs.pop("children", None)  # QEMU 8.1 and later: the files below; ours are in "backing-chain"
    if snapshots is not None and snapshots.active.size % SECTOR:  # QEMU drops the end of the disk
        assert theirs.pop("virtual-size") == snapshots.active.size // SECTOR * SECTOR
    for entry, snapshot in zip(theirs.get("snapshots", []), snapshots.snapshots if snapshots else [], strict=False):
        for key, stored in (("id", snapshot.id), ("name", snapshot.name)):
            if len(stored) > QEMU_NAME_LIMIT or not stored.isascii():  # QEMU cuts and mutilates these; see `list`
                del entry[key]
    return theirs


@pytest.mark.parametrize("image", LIBRARY.images.values(), ids=str)
def test_json_has_every_key_of_qemu_img_with_its_value(library: Library, image: FixtureImage) -> None:
    path = settled(library.path(image.name))
    assert lacking(qemu_says(path, image), here("info", "--json", path).json()) == []


@pytest.mark.parametrize("image", LIBRARY.images.values(), ids=str)
def test_the_text_has_every_line_of_qemu_img(library: Library, image: FixtureImage) -> None:
    """But for the table of snapshots, which has a column more."""
    path = settled(library.path(image.name))
    theirs = qemu_img("info", path).stdout.split("Child node")[0].splitlines()
    if "Snapshot list:" in theirs:
        start, end = theirs.index("Snapshot list:"), theirs.index("Format specific information:")
        theirs[start + 1 : end] = []
    ours = here("info", path).stdout.splitlines()
    if image.active.size % SECTOR:  # QEMU drops the end of the disk
        theirs = [line for line in theirs if not line.startswith("virtual size:")]
    assert [line for line in theirs if line not in ours] == []


def test_a_name_given_relative_stays_relative(library: Library) -> None:
    path = library.path("backing-qcow2")
    said = finish(start("info", "--json", path.name, cwd=path.parent)).json()
    assert said["filename"] == path.name
    assert said["full-backing-filename"] == "backing-qcow2.base.qcow2"


def test_a_name_with_a_directory_shows_where_the_backing_file_is_looked_for(library: Library) -> None:
    path = library.path("backing-qcow2")
    name = f"{path.parent.name}/{path.name}"
    ours = finish(start("info", "--json", name, cwd=path.parent.parent)).json()
    assert ours["full-backing-filename"] == f"{path.parent.name}/backing-qcow2.base.qcow2"


def test_each_snapshot_has_its_disk_size(library: Library, run: Run) -> None:
    said = run("info", "--json", library.path("demo")).json()
    assert [entry["disk-size"] for entry in said["snapshots"]] == [1 << 20, 3 << 20, 2 << 20]


def test_a_missing_backing_file_is_told_and_no_error(library: Library, run: Run, tmp_path: Path) -> None:
    alone = shutil.copyfile(library.path("backing-chain"), tmp_path / "alone.qcow2")
    result = run("info", "--json", alone)
    assert result.stderr == ""
    (link,) = result.json()["backing-chain"]
    assert "No such file" in link["error"]
    human = run("info", alone)
    assert human.returncode == 0
    assert any("backing-chain.2.qcow2" in line and "No such file" in line for line in human.stdout.splitlines())


def test_a_missing_data_file_is_no_error(library: Library, run: Run, tmp_path: Path) -> None:
    alone = shutil.copyfile(library.path("data-file"), tmp_path / "alone.qcow2")
    result = run("info", "--json", alone)
    assert result.json()["format-specific"]["data"]["data-file"] == "data-file.data"


def test_the_whole_chain_is_shown_with_formats_and_sizes(library: Library, run: Run) -> None:
    path = library.path("backing-chain")
    ours = run("info", "--json", path).json()["backing-chain"]
    theirs = qemu_img("info", "--backing-chain", "--output=json", path).json()[1:]
    keys = ("format", "virtual-size")
    assert [[link[key] for key in keys] for link in ours] == [[link[key] for key in keys] for link in theirs]
    assert [Path(link["filename"]).name for link in ours] == [Path(link["filename"]).name for link in theirs]


@pytest.mark.parametrize("damaged", ["backing-absolute", "backing-device", "backing-protocol", "backing-loop"])
def test_a_refused_backing_file_is_told_and_no_error(library: Library, run: Run, damaged: str) -> None:
    said = run("info", "--json", library.path(damaged)).json()
    assert said["backing-chain"][-1]["error"]


def test_feature_bits_are_named(library: Library, run: Run) -> None:
    assert run("info", "--json", library.path("dirty")).json()["features"]["incompatible"] == ["dirty"]
    assert run("info", "--json", library.path("corrupt")).json()["features"]["incompatible"] == ["corrupt"]
    assert (
        "extended-l2-entries"
        in run("info", "--json", library.path("extended-l2-16k")).json()["features"]["incompatible"]
    )


def test_header_extensions_are_shown(library: Library, run: Run) -> None:
    for image, name in (
        ("bitmaps", "bitmaps"),
        ("cluster-16k", "feature-name-table"),
        ("data-file", "external-data-file"),
    ):
        said = run("info", "--json", library.path(image)).json()["extensions"]
        assert name in [extension["name"] for extension in said]


def test_of_a_damaged_snapshot_table_the_rest_is_told(library: Library, run: Run) -> None:
    result = run("info", "--json", library.path("cut-in-table"))
    assert result.returncode == 1
    assert "from entry 2 on" in result.stderr
    said = result._replace(returncode=0).json()
    assert said["virtual-size"] == library.images["sound"].active.size
    assert [entry["id"] for entry in said["snapshots"]] == ["1"]


def test_encrypted_images_are_described(library: Library, run: Run) -> None:
    for name in ("luks", "aes"):
        said = run("info", "--json", library.path(name)).json()
        assert said["encrypted"] is True
        assert said["format-specific"]["data"]["encrypt"]["format"] == name
