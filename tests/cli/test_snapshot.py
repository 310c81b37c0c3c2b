"""`qcow2snap snapshot` and `resize` change what qemu-img would, and leave alone what somebody has open."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2snap
from tests.cli.support import complaint, finish, start
from tests.conftest import NewImage
from tests.support import Library, Result, qemu_img, qemu_info, qemu_io
from tests.support.qmp import RunningQemu, file_node
from tests.support.table import read_table
from tests.support.tools import REPOSITORY, TIME_LIMIT

Run = Callable[..., Result]


def names(run: Run, image: Path) -> list[tuple[str, str, int]]:
    listed = run("snapshot", "list", "--json", image).json()
    return [(entry["id"], entry["name"], entry["disk-size"]) for entry in listed]


def test_a_snapshot_is_made_renamed_applied_and_deleted(new_image: NewImage, run: Run) -> None:
    image = new_image("1M").write(0, 65536, 1)
    assert run("snapshot", "create", image.path, "one") == Result("", "", 0)
    image.write(0, 131072, 2)
    made = run("snapshot", "create", "--json", image.path, "two").json()
    assert (made["id"], made["name"], made["vm-state-size"], made["disk-size"]) == ("2", "two", 0, 1 << 20)
    assert run("resize", image.path, "+1M") == Result("", "", 0)
    assert qemu_info(image.path)["virtual-size"] == 2 << 20
    assert run("snapshot", "rename", image.path, "one", "first") == Result("", "", 0)
    assert names(run, image.path) == [("1", "first", 1 << 20), ("2", "two", 1 << 20)]
    assert run("snapshot", "apply", image.path, "id=1") == Result("", "", 0)
    assert qemu_info(image.path)["virtual-size"] == 1 << 20
    qemu_io(image.path, "read -P 1 0 64k", "read -P 0 64k 64k")
    assert run("snapshot", "apply", image.path, "name=two") == Result("", "", 0)
    qemu_io(image.path, "read -P 2 0 128k")
    assert run("snapshot", "delete", image.path, "two") == Result("", "", 0)
    assert run("snapshot", "delete", image.path, "first") == Result("", "", 0)
    assert names(run, image.path) == []
    qemu_img("check", image.path)
    qemu_io(image.path, "read -P 2 0 128k")


def test_space_that_only_the_snapshot_had_is_given_back(new_image: NewImage, run: Run) -> None:
    image = new_image("64M").write(0, 32 << 20).snapshot("full").write_zeroes(0, 32 << 20, unmap=True)
    before = image.path.stat().st_blocks * 512
    assert run("snapshot", "delete", image.path, "full").returncode == 0
    assert image.path.stat().st_blocks * 512 < before - (31 << 20)
    qemu_img("check", image.path)


@pytest.mark.parametrize(
    "words",
    [["create", "new"], ["delete", "frozen"], ["apply", "frozen"], ["rename", "frozen", "x"], ["resize"]],
    ids=lambda words: words[0],
)
def test_an_image_in_use_is_left_alone_and_it_is_told_what_to_do(
    new_image: NewImage, run: Run, words: list[str]
) -> None:
    image = new_image("1M").snapshot("frozen")
    command = ["resize", image.path, "2M"] if words[0] == "resize" else ["snapshot", words[0], image.path, *words[1:]]
    with RunningQemu(file_node(image.path)):
        said = complaint(run(*command))
    assert "in use" in said
    assert words[0] == "resize" or "blockdev-snapshot-internal-sync" in said
    assert names(run, image.path) == [("1", "frozen", 1 << 20)]


@pytest.mark.parametrize(
    "words",
    [
        ["snapshot", "delete", "IMAGE", "absent"],
        ["snapshot", "apply", "IMAGE", "id=9"],
        ["snapshot", "rename", "IMAGE", "absent", "x"],
        ["snapshot", "rename", "IMAGE", "frozen", "other"],
        ["snapshot", "create", "IMAGE", "frozen"],
        ["snapshot", "create", "IMAGE", ""],
        ["resize", "IMAGE", "512k"],
        ["resize", "IMAGE", "8E"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_changes_nothing(new_image: NewImage, run: Run, words: list[str]) -> None:
    image = new_image("1M").write(0, 65536).snapshot("frozen").snapshot("other")
    before = image.path.read_bytes()
    complaint(run(*[str(image.path) if word == "IMAGE" else word for word in words]))
    assert image.path.read_bytes() == before


@pytest.mark.parametrize("name", ["data-file", "corrupt", "aes", "l1-beyond-end"])
def test_images_that_must_not_be_written_are_refused(library: Library, run: Run, tmp_path: Path, name: str) -> None:
    library.path(name)
    files = {path.name: path.read_bytes() for path in library.directory.iterdir() if path.name.startswith(name)}
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    complaint(run("snapshot", "create", tmp_path / library.path(name).name, "new"))
    assert {file: (tmp_path / file).read_bytes() for file in files} == files


def test_sizes_that_are_none_are_usage_errors(new_image: NewImage, run: Run) -> None:
    image = new_image("1M")
    assert run("resize", image.path, "big").returncode == 2
    assert run("snapshot", "create", image.path).returncode == 2
    assert run("snapshot", "destroy", image.path).returncode == 2


def test_a_full_disk_refuses_a_snapshot_and_leaves_the_image_as_it_was(new_image: NewImage) -> None:
    image = new_image("8M", cluster_size=4096).write(0, 6 << 20, 1).snapshot("before").write(0, 65536, 2)
    size = image.path.stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4096, size + 4096))

    said = complaint(finish(start("snapshot", "create", image.path, "new", preexec_fn=limit)))
    assert "File too large" in said
    assert [entry.name for entry in read_table(image.path)] == [b"before"]
    assert qemu_img("check", image.path).returncode == 0
    qemu_io(image.path, "read -P 2 0 64k", "read -P 1 64k 5M")


@pytest.mark.slow
def test_who_is_killed_in_the_middle_leaves_an_image_that_is_sound(new_image: NewImage) -> None:
    """Snapshots made and deleted over and over by a process that is killed, again and again at another moment."""
    program = """
import sys
from qcow2snap.block.graph import open_writable
node = open_writable(sys.argv[1])
print("begun", flush=True)
for number in range(1000):
    snapshot = node.create_snapshot(f"s{number}-{sys.argv[2]}")
    node.pwritev(number % 64 * 8192, [bytearray(b"x" * 65536)])
    if number % 4:
        node.delete_snapshot(snapshot)
"""
    image = new_image("1M", cluster_size=4096).write(0, 1 << 20, 1).snapshot("kept")
    expected = image.reference("kept").read()
    for turn in range(12):
        command = [sys.executable, "-c", program, image.path, str(turn)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.005 + 0.037 * turn)
        process.kill()
        process.communicate(timeout=TIME_LIMIT)
        assert qemu_img("check", image.path, check=False).returncode in (0, 3)  # 3: a write was under way, which leaks
        with qcow2snap.open(image.path) as opened:
            assert opened.snapshot("kept").open().read() == expected
