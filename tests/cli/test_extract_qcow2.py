"""`qcow2snap extract -O qcow2`: sound images that hold what the snapshot held, by qemu-img's judgement."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2snap.block.graph import open_image
from qcow2snap.block.qcow2.creating.create_options import made
from qcow2snap.forensics.copy_qcow2 import Target, copy_qcow2
from tests.cli.support import complaint, contents, finish, here, start
from tests.conftest import NewImage
from tests.support import Image, Library, Result, qemu_img, qemu_info, qemu_map
from tests.support.tools import TIME_LIMIT, require

Run = Callable[..., Result]

MIB = 1 << 20

OPTIONS = [
    [],
    ["-c"],
    ["-o", "compat=0.10"],
    ["-c", "-o", "compression_type=zstd,cluster_size=4k"],
    ["-o", "cluster_size=512,refcount_bits=1"],
    ["-c", "-o", "cluster_size=512,refcount_bits=1"],
    ["-c", "-o", "cluster_size=2M,refcount_bits=64"],
    ["-o", "extended_l2=on,lazy_refcounts=on"],
    ["-c", "-o", "extended_l2=on,refcount_bits=2"],
    ["-o", "preallocation=metadata"],
    ["-o", "preallocation=full,cluster_size=2M"],
    ["-o", "data_file=DIRECTORY/out.data"],
    ["-o", "data_file=DIRECTORY/out.data,data_file_raw=on"],
]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_clean(image: Path) -> bool:
    check = qemu_img("check", "--output=json", image).json()
    return check["check-errors"] == 0 and not {"corruptions", "leaks"} & set(check)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("demo", options) for options in OPTIONS),
        *((name, options) for name in ("unaligned", "backing-chain") for options in OPTIONS[:5]),
        *((name, ["-c"]) for name in ("compressed-mixed", "grown-over-backing", "extended-l2-backed")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "plain",
)
def test_every_state_is_in_the_copy(library: Library, tmp_path: Path, name: str, options: list[str]) -> None:
    image, out = library.images[name], tmp_path / "out.qcow2"
    options = [option.replace("DIRECTORY", str(tmp_path)) for option in options]
    refs = [[], *(["-s", snapshot.name.decode()] for snapshot in image.snapshots[:2])]
    for ref, expected in zip(refs, [image.active, *(s.content for s in image.snapshots)], strict=False):
        result = here("extract", "-f", "-O", "qcow2", *options, *ref, library.path(name), out)
        assert (result.stdout, result.returncode) == ("", 0)
        assert is_clean(out)
        assert here("extract", "-f", out, tmp_path / "raw") == Result("", "", 0)
        assert (tmp_path / "raw").stat().st_size == expected.size
        assert sha256(tmp_path / "raw") == expected.sha256
        whole = expected.size // 512 * 512
        os.truncate(tmp_path / "raw", whole)
        assert ("QEMU reads whole sectors" in result.stderr) == (whole != expected.size)
        qemu_img("convert", "-O", "raw", out, tmp_path / "theirs")
        assert (tmp_path / "theirs").read_bytes() == (tmp_path / "raw").read_bytes()
        if "data_file_raw=on" in " ".join(options):
            assert sha256(tmp_path / "out.data") == expected.sha256


def test_qemu_compares_them_as_identical(new_image: NewImage, tmp_path: Path) -> None:
    image = new_image("64M").write(0, 3 * MIB).write(20 * MIB + 1000, 5 * MIB, compressed=False).discard(MIB, MIB)
    image.write(40 * MIB, 4 * MIB, compressed=True)
    for options in ([], ["-c"], ["-c", "-o", "compression_type=zstd"]):
        out = tmp_path / "out.qcow2"
        assert here("extract", "-f", "-O", "qcow2", *options, image.path, out) == Result("", "", 0)
        assert "identical" in qemu_img("compare", image.path, out).stdout
        assert qemu_info(out)["format-specific"]["data"]["compression-type"] == ("zstd" if len(options) > 1 else "zlib")
        check = qemu_img("check", "--output=json", out).json()
        assert check["allocated-clusters"] == (48 + 81 + 64 - 16)
        assert check.get("compressed-clusters", 0) == (check["allocated-clusters"] if options else 0)


def test_zeros_get_no_cluster_also_where_they_were_written(new_image: NewImage, tmp_path: Path) -> None:
    image = new_image("16M").write(0, 4 * MIB, 0).write(8 * MIB, 65536, 7).write_zeroes(9 * MIB, MIB)
    for flag in ([], ["-c"]):
        assert here("extract", "-f", "-O", "qcow2", *flag, image.path, tmp_path / "out.qcow2") == Result("", "", 0)
        assert [entry["present"] for entry in qemu_map(tmp_path / "out.qcow2")] == [False, True, False]


def test_compressed_is_smaller(new_image: NewImage, tmp_path: Path) -> None:
    image = new_image("16M").write(0, 16 * MIB)
    sizes = []
    for number, flags in enumerate([[], ["-c"], ["-c", "-o", "compression_type=zstd"]]):
        here("extract", "-O", "qcow2", *flags, image.path, tmp_path / f"{number}")
        sizes.append((tmp_path / f"{number}").stat().st_size)
    assert sizes[0] > 16 * MIB
    assert max(sizes[1:]) < 4 * MIB


def test_what_does_not_compress_is_stored_as_it_is(new_image: NewImage, tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(MIB))
    image = new_image("4M").io(f"write -s {noise} 0 1M").write(2 * MIB, MIB).io(f"write -s {noise} 3M 1M")
    out = tmp_path / "out.qcow2"
    assert here("extract", "-O", "qcow2", "-c", image.path, out) == Result("", "", 0)
    assert is_clean(out)
    assert "identical" in qemu_img("compare", image.path, out).stdout
    check = qemu_img("check", "--output=json", out).json()
    assert (check["allocated-clusters"], check["compressed-clusters"]) == (48, 16)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_the_image_is_the_same_however_many_threads_make_it(
    new_image: NewImage, tmp_path: Path, compress: bool
) -> None:
    node = open_image(str(new_image("64M").write(0, 20 * MIB).write(30 * MIB, 9 * MIB, 3).path))
    written = set()
    for workers in (1, 2, 5):
        with (tmp_path / "out").open("wb+") as out:
            copy_qcow2(node, 0, node.size, Target(made(node.size), out.fileno()), compress=compress, workers=workers)
        written.add(sha256(tmp_path / "out"))
    node.close()
    assert len(written) == 1


@pytest.mark.parametrize("wanted", ["1000:70000", "1M:", "65535:2", "0:0", "3M:1M"])
@pytest.mark.parametrize("flags", [[], ["-c"]], ids=["plain", "compressed"])
def test_a_range_is_a_disk_of_its_own(new_image: NewImage, tmp_path: Path, wanted: str, flags: list[str]) -> None:
    image = new_image("4M").write(0, MIB).write(3 * MIB, 4096)
    out, raw = tmp_path / "out.qcow2", tmp_path / "raw"
    assert here("extract", "--range", wanted, "-O", "qcow2", *flags, image.path, out).returncode == 0
    assert here("extract", "--range", wanted, image.path, raw).returncode == 0
    assert is_clean(out)
    assert here("extract", out, tmp_path / "back") == Result("", "", 0)
    assert (tmp_path / "back").read_bytes() == raw.read_bytes()


def test_the_holes_of_damage_are_zeros_and_listed(library: Library, tmp_path: Path) -> None:
    out, raw = tmp_path / "out.qcow2", tmp_path / "raw"
    assert here("extract", "--skip-damaged", library.path("compressed-garbage"), raw).returncode == 0
    result = here("extract", "--skip-damaged", "-O", "qcow2", "-c", library.path("compressed-garbage"), out)
    assert result.returncode == 0
    assert json.loads(out.with_name("out.qcow2.holes.json").read_text()) == json.loads(
        raw.with_name("raw.holes.json").read_text()
    )
    assert "identical" in qemu_img("compare", "-F", "raw", out, raw).stdout
    complaint(here("extract", "-O", "qcow2", library.path("compressed-garbage"), tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("out", ["-", "/dev/null"])
def test_a_pipe_is_refused(library: Library, run: Run, out: str) -> None:
    assert "header is written last" in complaint(run("extract", "-O", "qcow2", library.path("demo"), out))


@pytest.mark.parametrize("words", [["-c"], ["-o", "cluster_size=4k"], ["-O", "vmdk"]], ids=" ".join)
def test_what_is_for_qcow2_only_is_a_usage_error_elsewhere(library: Library, run: Run, words: list[str]) -> None:
    assert run("extract", *words, library.path("demo"), "out").returncode == 2


@pytest.mark.parametrize(
    "words",
    [
        ["-o", "cluster_size=1000"],
        ["-o", "backing_file=x,backing_fmt=raw"],
        ["-c", "-o", "data_file=DIRECTORY/d"],
        ["-o", "data_file=DIRECTORY/there"],
        ["-o", "data_file=DIRECTORY/demo.qcow2", "-f"],
    ],
    ids=" ".join,
)
def test_options_that_cannot_be_are_refused_and_nothing_is_left(
    library: Library, run: Run, tmp_path: Path, words: list[str]
) -> None:
    image = tmp_path / "demo.qcow2"
    image.write_bytes(library.path("demo").read_bytes())
    (tmp_path / "there").write_text("precious")
    words = [word.replace("DIRECTORY", str(tmp_path)) for word in words]
    complaint(run("extract", "-O", "qcow2", *words, image, tmp_path / "out"))
    assert contents(tmp_path) == ["demo.qcow2", "there"]
    assert image.read_bytes() == library.path("demo").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_copy_that_is_killed_is_no_image(slow_image: Image, tmp_path: Path, number: signal.Signals) -> None:
    directory = tmp_path / "to"
    directory.mkdir()
    process = start("extract", "-O", "qcow2", "-c", "-o", "cluster_size=4k", slow_image.path, directory / "out")
    deadline = time.monotonic() + TIME_LIMIT
    while sum(e.stat().st_size for e in os.scandir(directory)) < MIB and time.monotonic() < deadline:
        assert process.poll() is None
    process.send_signal(number)
    finish(process)
    if number == signal.SIGTERM:
        assert contents(directory) == []
    else:  # a part is left, which nobody takes for an image
        (part,) = directory.iterdir()
        assert part.name.endswith(".part")
        opened = subprocess.run([require("qemu-img"), "check", "-f", "qcow2", part], capture_output=True)
        assert b"not in qcow2 format" in opened.stderr
