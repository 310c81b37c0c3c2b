"""`qcow2snap extract`: a disk, a snapshot or a VM state as a raw file, whole or not there at all."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import complaint, contents, finish, here, raw_output, start
from tests.conftest import NewImage
from tests.support import Image, Library, Result
from tests.support.tools import REPOSITORY, TIME_LIMIT, require

Run = Callable[..., Result]

MIB = 1 << 20


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# What comes out


@pytest.mark.parametrize("name", ["demo", "backing-chain", "grown-over-backing", "shrunk-by-revert", "unaligned"])
def test_every_state_comes_out_as_qemu_img_read_it(library: Library, tmp_path: Path, name: str) -> None:
    image, out = library.images[name], tmp_path / "out"
    refs = [[], *(["-s", snapshot.name.decode()] for snapshot in image.snapshots)]
    for ref, expected in zip(refs, [image.active, *(s.content for s in image.snapshots)], strict=True):
        assert here("extract", "-f", *ref, library.path(name), out) == Result("", "", 0)
        assert out.stat().st_size == expected.size
        assert sha256(out.read_bytes()) == expected.sha256


@pytest.mark.parametrize("name", ["demo", "compressed-mixed", "unaligned"])
def test_a_pipe_gets_the_same_bytes(library: Library, name: str) -> None:
    image = library.images[name]
    assert sha256(raw_output("extract", library.path(name), "-")) == image.active.sha256
    ref = f"id={image.snapshots[0].id.decode()}"
    assert sha256(raw_output("extract", "-s", ref, library.path(name), "-")) == image.snapshots[0].content.sha256


@pytest.mark.parametrize("name", ["demo", "vm-state", "vm-state-grown", "vm-state-pc"])
def test_vm_states_come_out_as_qemu_saved_them(library: Library, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    states = [snapshot for snapshot in library.images[name].snapshots if snapshot.vm_state_size]
    for snapshot in states:
        ref = snapshot.name.decode()
        assert here("extract", "-f", "--vm-state", "-s", ref, library.path(name), out).returncode == 0
        assert out.stat().st_size == snapshot.vm_state_size
        assert sha256(out.read_bytes()) == snapshot.vm_state_sha256
    assert raw_output("extract", "--vm-state", "-s", ref, library.path(name), "-") == out.read_bytes()


def test_a_vm_state_is_what_qemu_io_reads_of_it(new_image: NewImage, run: Run, tmp_path: Path) -> None:
    image = new_image("1M").write(0, 65536).savevm("running", memory={0x8000: 0x5153_4E41_5053_484F})
    assert run("extract", "--vm-state", "-s", "running", image.path, tmp_path / "state").returncode == 0
    assert (tmp_path / "state").read_bytes() == image.vm_state("running")
    assert (0x5153_4E41_5053_484F).to_bytes(8, "little") in (tmp_path / "state").read_bytes()


@pytest.mark.parametrize(
    ("wanted", "start_at", "end_at"),
    [
        ("0:1", 0, 1),
        ("1:4096", 1, 4097),
        ("64k:64k", 65536, 131072),
        ("65535:2", 65535, 65537),
        (":100000", 0, 100_000),
        ("999999:", 999_999, MIB),
        ("0x10:0x20", 16, 48),
        ("1M:", MIB, MIB),
        ("0:0", 0, 0),
        ("0:1M", 0, MIB),
    ],
)
@pytest.mark.parametrize("is_compressed", [False, True], ids=["plain", "compressed"])
def test_a_range_is_that_part_and_no_more(
    new_image: NewImage, tmp_path: Path, wanted: str, start_at: int, end_at: int, is_compressed: bool
) -> None:
    image = new_image("1M").write(0, 3 * 65536, compressed=is_compressed).write(983_040, 65536, 7).snapshot("here")
    expected = image.reference("here").read()[start_at:end_at]
    image.resize("2M")
    assert here("extract", "-s", "here", "--range", wanted, image.path, tmp_path / "out") == Result("", "", 0)
    assert (tmp_path / "out").read_bytes() == expected
    assert raw_output("extract", "-s", "here", "--range", wanted, image.path, "-") == expected


@pytest.mark.parametrize("wanted", ["1M:1", "0:1048577", "2M:", "2M:0", "1T:1T"])
def test_a_range_beyond_the_end_of_the_snapshot_is_refused(
    new_image: NewImage, run: Run, tmp_path: Path, wanted: str
) -> None:
    image = new_image("1M").snapshot("small").resize("4M")
    said = complaint(run("extract", "-s", "small", "--range", wanted, image.path, tmp_path / "out"))
    assert "1048576" in said
    assert not (tmp_path / "out").exists()


def test_holes_stay_holes(new_image: NewImage, run: Run, tmp_path: Path) -> None:
    image = new_image("1G").write(512 * MIB, 65536).write_zeroes(256 * MIB, 65536).snapshot("sparse")
    assert run("extract", "-s", "sparse", image.path, tmp_path / "out").returncode == 0
    status = (tmp_path / "out").stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 < MIB
    with (tmp_path / "out").open("rb") as file:
        file.seek(512 * MIB)
        assert file.read(32) == b"000000000000000\n000000000000001\n"


def test_output_to_a_device_is_written_not_replaced(library: Library, run: Run) -> None:
    assert run("extract", library.path("demo"), "/dev/null") == Result("", "", 0)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_reader_that_has_seen_enough_is_no_error_worth_a_word(new_image: NewImage) -> None:
    process = start("extract", new_image("64M").write(0, 65536).path, "-")
    process.stdout.read(65536)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(TIME_LIMIT) == 128 + signal.SIGPIPE


# Where it goes


def test_what_exists_is_not_overwritten_without_force(library: Library, run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    said = complaint(run("extract", library.path("demo"), tmp_path / "out"))
    assert str(tmp_path / "out") in said
    assert "--force" in said
    assert (tmp_path / "out").read_text() == "precious"
    assert run("extract", "--force", library.path("demo"), tmp_path / "out").returncode == 0
    assert sha256((tmp_path / "out").read_bytes()) == library.images["demo"].active.sha256
    assert contents(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["disk.qcow2", "link", "../to/disk.qcow2"])
def test_the_image_itself_is_never_the_output(library: Library, run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "to").mkdir()
    image = Path(shutil.copyfile(library.path("demo"), tmp_path / "to" / "disk.qcow2"))
    image.with_name("link").symlink_to(image)
    before = image.read_bytes()
    result = run("extract", "--force", "-s", "monday", image, image.parent / name)
    assert image.read_bytes() == before
    complaint(result)


def test_nor_is_a_file_that_the_image_is_made_of(library: Library, run: Run, tmp_path: Path) -> None:
    library.path("backing-raw-shorter")
    for file in ("backing-raw-shorter.qcow2", "backing-raw-shorter.base.raw"):
        shutil.copyfile(library.directory / file, tmp_path / file)
    base = tmp_path / "backing-raw-shorter.base.raw"
    before = base.read_bytes()
    result = run("extract", "--force", tmp_path / "backing-raw-shorter.qcow2", base)
    assert base.read_bytes() == before
    complaint(result)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_it_is_up_to_the_umask(library: Library, tmp_path: Path, umask: int, mode: int) -> None:
    finish(start("extract", library.path("demo"), tmp_path / "out", umask=umask))
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_a_link_is_followed_and_stays_a_link(library: Library, run: Run, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "out").symlink_to("target")
    run("extract", "--force", library.path("demo"), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert sha256((tmp_path / "target").read_bytes()) == library.images["demo"].active.sha256


def test_a_name_as_long_as_a_name_may_be_will_do(library: Library, run: Run, tmp_path: Path) -> None:
    out = tmp_path / ("ü" * 127)  # 254 bytes
    assert run("extract", library.path("demo"), out) == Result("", "", 0)
    assert contents(tmp_path) == [out.name]


@pytest.mark.parametrize("out", [".", "none/out"])
def test_a_place_that_cannot_be_written_is_told(library: Library, run: Run, tmp_path: Path, out: str) -> None:
    assert str(tmp_path) in complaint(run("extract", library.path("demo"), tmp_path / out))


# All or nothing


def test_a_limit_on_file_sizes_leaves_nothing(library: Library, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    said = complaint(finish(start("extract", library.path("demo"), tmp_path / "out", preexec_fn=limit)))
    assert "File too large" in said
    assert str(tmp_path / "out") in said
    assert contents(tmp_path) == []


@pytest.mark.parametrize("is_compressed", [False, True], ids=["in the kernel", "decompressed"])
def test_a_full_disk_leaves_nothing(new_image: NewImage, tmp_path: Path, is_compressed: bool) -> None:
    image = new_image("4M").write(0, 4 * MIB, compressed=is_compressed)
    disk = tmp_path / "disk"
    disk.mkdir()
    namespace = [require("unshare"), "--mount", "--map-root-user"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(disk)]
    if subprocess.run([*namespace, *mount], capture_output=True, timeout=TIME_LIMIT).returncode:
        pytest.skip("no small file system can be mounted here")
    script = f'{" ".join(mount)} && "$@"; code=$?; ls -A {disk}; exit $code'
    before = (*namespace, "sh", "-c", script, "sh")
    result = finish(start("extract", image.path, disk / "out", before=before))
    said = complaint(result)
    assert "No space left" in said
    assert str(disk / "out") in said
    assert result.stdout == ""  # what `ls` found


def test_a_full_disk_leaves_what_was_to_be_overwritten(new_image: NewImage, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    (tmp_path / "out").write_text("precious")
    image = new_image("4M").write(0, 4 * MIB)
    complaint(finish(start("extract", "--force", image.path, tmp_path / "out", preexec_fn=limit)))
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("out", ["-", "/dev/full"])
def test_a_full_pipe_or_device_is_named(library: Library, out: str) -> None:
    with open("/dev/full", "wb") as full:
        said = complaint(finish(start("extract", library.path("demo"), out, stdout=full)))
    assert "No space left" in said
    assert ("standard output" if out == "-" else out) in said


@pytest.mark.parametrize("name", ["backing-raw-shorter", "backing-chain", "data-file"])
def test_without_its_backing_or_data_file_nothing_is_written(
    library: Library, run: Run, tmp_path: Path, name: str
) -> None:
    alone = shutil.copyfile(library.path(name), tmp_path / "alone.qcow2")
    said = complaint(run("extract", alone, tmp_path / "out"))
    assert "alone.qcow2" in said
    assert "No such file" in said
    assert contents(tmp_path) == ["alone.qcow2"]


@pytest.mark.parametrize("damaged", ["l2-beyond-end", "l1-beyond-end", "compressed-garbage", "cut-in-half"])
def test_damage_leaves_nothing(library: Library, run: Run, tmp_path: Path, damaged: str) -> None:
    result = run("extract", library.path(damaged), tmp_path / "out")
    assert result.returncode == 1
    assert "QCOW2-" in result.stderr.splitlines()[-1]
    assert contents(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("existing", [None, "precious"], ids=["new", "overwriting"])
def test_a_signal_in_the_middle_leaves_nothing(
    slow_image: Image, tmp_path: Path, number: signal.Signals, existing: str | None
) -> None:
    directory = tmp_path / "to"
    directory.mkdir()
    if existing:
        (directory / "out").write_text(existing)
    before, used = contents(directory), blocks(directory)
    process = start("extract", "--force", slow_image.path, directory / "out")
    deadline = time.monotonic() + TIME_LIMIT
    while blocks(directory) <= used + MIB and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    result = finish(process)
    assert result.returncode in (128 + number, -number)
    assert "Traceback" not in result.stderr
    assert contents(directory) == before
    assert not existing or (directory / "out").read_text() == existing


def blocks(directory: Path) -> int:
    """Bytes that the files in a directory take."""
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(directory))


EARLY_SIGNAL = """
import os, sys, time
from qcow2snap.cli import main
ftruncate = os.ftruncate
def interrupted(*args):
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(1)
    ftruncate(*args)
os.ftruncate = interrupted
main(sys.argv[2:])
"""


def early_signal(number: signal.Signals, *words: str | Path, **options: Any) -> int:
    """The exit code when a signal arrives between the making of the output and its first byte."""
    command = [sys.executable, "-c", EARLY_SIGNAL, str(int(number)), *words]
    return subprocess.run(command, capture_output=True, timeout=TIME_LIMIT, cwd=REPOSITORY, **options).returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_at_the_very_start_leaves_nothing(library: Library, tmp_path: Path, number: signal.Signals) -> None:
    def heed() -> None:
        signal.signal(number, signal.SIG_DFL)  # a test run in the background inherits SIGINT switched off

    code = early_signal(number, "extract", library.path("demo"), tmp_path / "out", preexec_fn=heed)
    assert code in (128 + number, -number)
    assert contents(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_that_nohup_or_the_shell_has_switched_off_stays_off(
    library: Library, tmp_path: Path, number: signal.Signals
) -> None:
    def ignore() -> None:
        signal.signal(number, signal.SIG_IGN)

    assert early_signal(number, "extract", library.path("demo"), tmp_path / "out", preexec_fn=ignore) == 0
    assert sha256((tmp_path / "out").read_bytes()) == library.images["demo"].active.sha256
