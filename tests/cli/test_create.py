"""`qcow2snap create` makes what `qemu-img create` makes, and refuses what it refuses."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import complaint, contents
from tests.conftest import NewImage
from tests.support import Result, qemu_img, qemu_info, qemu_io, qemu_map
from tests.support.qmp import RunningQemu, file_node
from tests.support.tools import TIME_LIMIT, require

MIB = 1 << 20
Run = Callable[..., Result]

# Size and -o options of images without anything allocated: each is the same to the last byte.
EMPTY = [
    ("0", ""),
    ("1", ""),
    ("1000", "cluster_size=512"),
    ("1.5M", ""),
    ("1G", "compat=1.1"),
    ("1G", "compat=0.10"),
    ("10T", "cluster_size=2M"),
    ("1T", "cluster_size=64k,lazy_refcounts=on"),
    ("1G", "cluster_size=4k,refcount_bits=1"),
    ("1G", "cluster_size=8k,refcount_bits=64"),
    ("3G", "extended_l2=on,compression_type=zstd,refcount_bits=8"),
    ("16k", "extended_l2=on,cluster_size=16k"),
    ("1M", "data_file=disk.data"),
    ("1M", "backing_file=nothing,,at all,backing_fmt=raw"),
    ("1M", "backing_file=caf\udce9,backing_fmt=raw"),
    ("1M", f"cluster_size=512,backing_file={'n' * 340},backing_fmt=raw"),
]

# Those whose layout is ours, but as large and as sound as QEMU's.
FULL = [
    ("1G", "cluster_size=512"),  # the L1 table needs a second refcount block
    ("1000", "preallocation=metadata"),
    ("100M", "preallocation=metadata"),
    ("3G", "preallocation=metadata"),  # more than one refcount block
    ("64M", "preallocation=metadata,cluster_size=4k,refcount_bits=64"),
    ("10M", "preallocation=falloc,extended_l2=on"),
    ("10M", "preallocation=full"),
    ("1M", "data_file=disk.data,data_file_raw=on"),
    ("1M", "data_file=disk.data,preallocation=falloc"),
    ("1M", "backing_file=base.raw,backing_fmt=raw,extended_l2=on,preallocation=metadata"),
]


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Any:
    """The same image made twice, by qemu-img and by us, each in a directory of its own."""

    def make(size: str, options: str) -> tuple[Path, Path]:
        made = []
        for who in ("theirs", "ours"):
            directory = tmp_path / who
            directory.mkdir()
            (directory / "base.raw").write_bytes(bytes(4096))
            monkeypatch.chdir(directory)
            words = ["-u", "-f", "qcow2", *(["-o", options] if options else []), "disk.qcow2", size]
            if who == "theirs":
                qemu_img("create", "-q", *words[:-2], directory / words[-2], size)
            else:
                assert run("create", *words).returncode == 0
            made.append(directory / "disk.qcow2")
        return made[0], made[1]

    return make


@pytest.mark.parametrize(("size", "options"), EMPTY)
def test_an_empty_image_is_qemus_to_the_last_byte(two: Any, size: str, options: str) -> None:
    theirs, ours = two(size, options)
    assert ours.read_bytes() == theirs.read_bytes()
    assert contents(ours.parent) == contents(theirs.parent)


@pytest.mark.parametrize(("size", "options"), FULL)
def test_an_image_is_described_and_checked_as_qemus(
    two: Any, monkeypatch: pytest.MonkeyPatch, size: str, options: str
) -> None:
    theirs, ours = two(size, options)
    answers = []
    for image in (theirs, ours):
        monkeypatch.chdir(image.parent)
        info = qemu_info(image) | {"filename": "", "full-backing-filename": ""}
        space = info.pop("actual-size")
        check = qemu_img("check", "--output=json", image).json() | {"filename": ""}
        entries = [{key: entry[key] for key in ("present", "zero", "data")} for entry in qemu_map(image)]
        answers.append((info, check, entries[:1]))
        assert space <= qemu_info(theirs)["actual-size"] + 65536
    # QEMU preallocates a cluster that is the disk's last and not whole with data in the file, we with a hole.
    if size == "1000":
        answers = [answer[:2] for answer in answers]
    assert answers[1] == answers[0]
    if "data_file" in options:
        assert (ours.parent / "disk.data").stat().st_size == (theirs.parent / "disk.data").stat().st_size


def test_a_backing_format_need_not_be_text(run: Run, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    assert run("create", "-q", "-u", "-b", "base", "-F", "r\udce9w", image, "1M").returncode == 0
    assert b"r\xe9w\0" in image.read_bytes()


def test_qemu_writes_what_we_made(run: Run, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    for options in ("extended_l2=on", "preallocation=metadata,cluster_size=4k", "refcount_bits=1,compat=1.1"):
        run("create", "--force", "-q", "-o", options, image, "20M")
        qemu_io(image, "write -P 5 1M 3M", "write -P 6 10000 1000", "flush")
        assert "No errors" in qemu_img("check", image).stdout
        assert qemu_io(image, "read -P 5 1M 3M", "read -P 6 10000 1000", "read -P 0 4M 16M").returncode == 0


def test_it_says_what_it_makes_as_qemu_img_does(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["-f", "qcow2", "-o", "compat=v3,lazy_refcounts=yes,preallocation=metadata", "disk.qcow2", "1M"]
    said = run("create", *words).stdout
    theirs = subprocess.run([require("qemu-img"), "create", *words], capture_output=True, text=True, timeout=TIME_LIMIT)
    shown = theirs.stdout.replace("lazy_refcounts=yes", "lazy_refcounts=on")
    assert sorted(said.split()) == sorted(word for word in shown.split() if not word.startswith("compat="))
    assert run("create", "--force", "-q", *words).stdout == ""


def test_over_a_backing_file_the_size_is_its(new_image: NewImage, run: Run, tmp_path: Path) -> None:
    new_image("3M", name="base.qcow2")
    raw = tmp_path / "base.raw"
    raw.write_bytes(b"x" * 1000)
    for name, image_format, size in (("base.qcow2", "qcow2", 3 * MIB), ("base.raw", "raw", 1024)):
        image = tmp_path / f"over-{image_format}.qcow2"
        assert run("create", "-b", name, "-F", image_format, image).returncode == 0
        info = qemu_info(image)
        assert (info["virtual-size"], info["backing-filename"], info["backing-filename-format"]) == (
            size, name, image_format
        )  # fmt: skip
    assert qemu_io(tmp_path / "over-qcow2.qcow2", "read -P 0 64k 64k").returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ["-o", "cluster_size=1000", "IMAGE", "1M"],
        ["-o", "cluster_size=256", "IMAGE", "1M"],
        ["-o", "cluster_size=4M", "IMAGE", "1M"],
        ["-o", "cluster_size=8k,extended_l2=on", "IMAGE", "1M"],
        ["-o", "compat=0.10,extended_l2=on", "IMAGE", "1M"],
        ["-o", "compat=0.10,lazy_refcounts=on", "IMAGE", "1M"],
        ["-o", "compat=0.10,compression_type=zstd", "IMAGE", "1M"],
        ["-o", "compat=0.10,refcount_bits=8", "IMAGE", "1M"],
        ["-o", "compat=0.10,data_file=disk.data", "IMAGE", "1M"],
        ["-o", "compat=2", "IMAGE", "1M"],
        ["-o", "compression_type=lz4", "IMAGE", "1M"],
        ["-o", "refcount_bits=7", "IMAGE", "1M"],
        ["-o", "refcount_bits=128", "IMAGE", "1M"],
        ["-o", "refcount_bits=0", "IMAGE", "1M"],
        ["-o", "data_file_raw=on", "IMAGE", "1M"],
        ["-o", "data_file=disk.data,data_file_raw=on", "-b", "base.raw", "-F", "raw", "IMAGE", "1M"],
        ["-o", "preallocation=metadata", "-b", "base.raw", "-F", "raw", "IMAGE", "1M"],
        ["-o", "preallocation=some", "IMAGE", "1M"],
        ["-o", "lazy_refcounts=1", "IMAGE", "1M"],
        ["-o", "colour=red", "IMAGE", "1M"],
        ["-o", "size=1M", "IMAGE", "1M"],
        ["-o", "cluster_size=512", "IMAGE", "1T"],
        ["IMAGE", "8E"],
        ["IMAGE"],
        ["-F", "raw", "IMAGE", "1M"],
        ["-b", "base.raw", "IMAGE", "1M"],
        ["-b", "absent", "-F", "raw", "IMAGE", "1M"],
        ["-b", "absent", "-F", "raw", "IMAGE"],
        ["-u", "-b", "base.raw", "-F", "raw", "IMAGE"],
        ["-b", "base.raw", "-F", "qcow2", "IMAGE"],
        ["-b", "", "-F", "qcow2", "IMAGE", "1M"],
        ["-u", "-o", "cluster_size=512", "-b", "n" * 600, "-F", "raw", "IMAGE", "1M"],
        ["-u", "-b", "n" * 1024, "-F", "raw", "IMAGE", "1M"],
    ],
    ids=" ".join,
)
def test_what_qemu_img_refuses_is_refused_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.raw").write_bytes(bytes(4096))
    words = ["disk.qcow2" if word == "IMAGE" else word for word in words]
    theirs = subprocess.run(
        [require("qemu-img"), "create", "-f", "qcow2", *words], capture_output=True, timeout=TIME_LIMIT, cwd=tmp_path
    )
    assert theirs.returncode == 1
    for name in contents(tmp_path):
        if name != "base.raw":
            os.unlink(name)
    complaint(run("create", *words))
    assert contents(tmp_path) == ["base.raw"]


def test_what_is_there_is_replaced_by_force_only(run: Run, tmp_path: Path) -> None:
    image, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    for there in (image, data):
        there.write_text("precious")
        said = complaint(run("create", "-o", f"data_file={data}", image, "1M"))
        assert str(there) in said
        assert "--force" in said
        assert there.read_text() == "precious"
        assert contents(tmp_path) == [there.name]
        there.unlink()
    image.write_text("precious")
    assert run("create", "--force", "-q", "-o", f"data_file={data}", image, "1M").returncode == 0
    assert qemu_info(image)["virtual-size"] == MIB


def test_an_image_in_use_is_not_replaced(new_image: NewImage, run: Run) -> None:
    image = new_image("1M").path
    before = image.read_bytes()
    with RunningQemu(file_node(image)):
        assert "in use" in complaint(run("create", "--force", image, "2M"))
        assert image.stat().st_size == len(before)


def test_a_relative_data_file_that_we_and_qemu_would_look_for_in_two_places_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    complaint(run("create", "-o", "data_file=disk.data", "sub/disk.qcow2", "1M"))
    assert contents(tmp_path) == ["sub"]
    assert contents(tmp_path / "sub") == []
