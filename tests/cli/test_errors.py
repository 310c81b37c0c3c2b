"""What a new user meets: each mistake gets one line that says what, where and what to do, and never a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.support import complaint, contents, finish, here, start
from tests.conftest import NewImage
from tests.support import Library, Result
from tests.support.tools import TIME_LIMIT, require

Run = Callable[..., Result]

# Every command that only needs an image, with what it needs besides.
COMMANDS: dict[str, list[str]] = {"list": [], "info": [], "map": [], "digest": [], "extract": ["-"]}

each_command = pytest.mark.parametrize("command", COMMANDS)


def refusal(run: Run, command: str, image: Path) -> str:
    """Why a command does not take an image; it has to name it."""
    said = complaint(run(command, image, *COMMANDS[command]))
    assert str(image) in said
    return said


# What is no image


@each_command
def test_a_missing_file(run: Run, tmp_path: Path, command: str) -> None:
    assert "No such file or directory" in refusal(run, command, tmp_path / "nothing.qcow2")


@each_command
def test_a_directory(run: Run, tmp_path: Path, command: str) -> None:
    assert "is a directory" in refusal(run, command, tmp_path)


@each_command
def test_an_empty_file(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").touch()
    assert "empty" in refusal(run, command, tmp_path / "empty")


@each_command
def test_a_raw_image(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(510) + b"\x55\xaa" + bytes(65536))
    assert "raw disk, which has no snapshots" in refusal(run, command, tmp_path / "disk.raw")


@each_command
def test_a_fifo_is_not_waited_for(run: Run, tmp_path: Path, command: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    refusal(run, command, tmp_path / "fifo")


def test_a_device_that_is_no_disk(run: Run) -> None:
    refusal(run, "list", Path("/dev/null"))


def test_an_image_of_another_format_is_called_by_its_name(run: Run, tmp_path: Path) -> None:
    for name, start_of_file in (
        ("vmdk", b"KDMV\1\0\0\0"),
        ("vdi", bytes(64) + b"\x7f\x10\xda\xbe"),
        ("luks", b"LUKS\xba\xbe"),
    ):
        (tmp_path / name).write_bytes(start_of_file.ljust(4096, b"\0"))
        assert f"it looks like {name}" in refusal(run, "list", tmp_path / name)


def test_a_name_that_is_no_text(run: Run, tmp_path: Path) -> None:
    said = complaint(run("list", os.fsencode(tmp_path) + b"/\xff\n.qcow2"))
    assert "No such file" in said


def test_a_name_that_is_too_long(run: Run, tmp_path: Path) -> None:
    assert "File name too long" in complaint(run("list", tmp_path / ("x" * 300)))


@each_command
def test_an_image_that_one_may_not_read(library: Library, tmp_path: Path, command: str) -> None:
    image = Path(shutil.copyfile(library.path("demo"), tmp_path / "disk.qcow2"))
    image.chmod(0)
    mere: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root, without what lets root read all
        rights = "-dac_override,-dac_read_search"
        mere = (require("setpriv"), f"--bounding-set={rights}", f"--inh-caps={rights}")
    result = finish(start(command, image, *COMMANDS[command], before=mere))
    assert "Permission denied" in complaint(result)
    assert str(image) in result.stderr


# Snapshots that are not there


@pytest.mark.parametrize("command", ["map", "digest", "extract"])
def test_near_names_are_suggested(library: Library, run: Run, command: str) -> None:
    for wrong, near in (("mondey", "monday"), ("Monday", "monday"), ("before-upgarde", "before-upgrade")):
        said = complaint(run(command, "-s", wrong, library.path("demo"), *COMMANDS[command]))
        assert f"did you mean {near!r}?" in said


def test_where_no_name_is_near_all_are_told(library: Library, run: Run) -> None:
    said = complaint(run("map", "-s", "xyz", library.path("demo")))
    assert "'monday' (id 1), 'tuesday' (id 2), 'before-upgrade' (id 3)" in said


def test_an_id_that_is_not_there(library: Library, run: Run) -> None:
    assert 'no snapshot "id=4"' in complaint(run("map", "-s", "id=4", library.path("demo")))


def test_an_id_and_a_name_of_two_snapshots(library: Library, run: Run) -> None:
    assert "no snapshot" in complaint(run("map", "-s", "id=1,name=tuesday", library.path("demo")))


def test_an_image_without_snapshots(new_image: NewImage, run: Run) -> None:
    assert "the image has no snapshots" in complaint(run("map", "-s", "any", new_image("64k").path))


def test_a_snapshot_without_vm_state(library: Library, run: Run) -> None:
    said = complaint(run("extract", "--vm-state", "-s", "monday", library.path("demo"), "-"))
    assert "has no VM state" in said


# Images in use


class Machine:
    """A program of QEMU's that has an image open for writing."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=TIME_LIMIT)
        finally:
            self.process.kill()


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    running: list[Machine] = []
    yield running
    for machine in running:
        machine.stop()


def storage_daemon(image: Path) -> Machine:
    ready = image.with_suffix(".pid")
    blockdev = f"driver=qcow2,node-name=disk,file.driver=file,file.filename={image}"
    machine = Machine(require("qemu-storage-daemon"), "--blockdev", blockdev, "--pidfile", str(ready))
    deadline = time.monotonic() + TIME_LIMIT
    while not ready.exists() and machine.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert ready.exists()
    return machine


def virtual_machine(image: Path) -> Machine:
    drive = f"if=none,id=disk,file={image},format=qcow2"
    command = [require("qemu-system-x86_64"), "-machine", "microvm", "-accel", "tcg", "-m", "1", "-S", "-nodefaults"]
    command += ["-display", "none", "-drive", drive, "-device", "virtio-blk-device,drive=disk", "-monitor", "stdio"]
    machine = Machine(*command)
    assert machine.process.stdin is not None
    assert machine.process.stdout is not None
    machine.process.stdin.write(b"info block\n")
    machine.process.stdin.flush()
    said = b""
    while b"disk (#" not in said:  # the answer, and not the echo of the question
        piece = os.read(machine.process.stdout.fileno(), 4096)
        assert piece, said
        said += piece
    return machine


each_holder = pytest.mark.parametrize("hold", [storage_daemon, virtual_machine], ids=lambda hold: hold.__name__)


@each_holder
def test_an_image_in_use_is_refused_and_read_with_force_share(
    new_image: NewImage, run: Run, machines: list[Machine], hold: Callable[[Path], Machine]
) -> None:
    image = new_image("1M").write(0, 100_000).snapshot("frozen").write(0, 65536)
    path, expected = image.path, image.reference("frozen")
    machines.append(hold(path))
    for command in COMMANDS:
        said = refusal(run, command, path)
        assert "in use" in said
        assert "-U/--force-share" in said
    assert [entry["name"] for entry in run("list", "-U", "--json", path).json()] == ["frozen"]
    assert run("info", "-U", "--json", path).json()["virtual-size"] == 1 << 20
    assert run("map", "-U", "--json", "-s", "frozen", path).json()[0]["length"] == 131072
    (entry,) = run("digest", "--force-share", "--json", "-s", "frozen", path).json()["entries"]
    assert entry["digests"]["sha256"] == expected.sha256
    assert run("diff", path, "frozen").returncode == 2
    assert run("diff", "-U", "--verify", "--json", path, "frozen").stdout.count("start") == 1
    out = path.with_name("out")
    assert run("extract", "-U", "-s", "frozen", path, out) == Result("", "", 0)
    assert out.read_bytes() == expected.read()
    machines[0].stop()
    assert run("list", path).returncode == 0


def test_a_backing_file_in_use_is_named(new_image: NewImage, run: Run, machines: list[Machine]) -> None:
    base = new_image("1M", name="base.qcow2").write(0, 65536)
    image = new_image("1M", backing=base).snapshot("s")
    machines.append(storage_daemon(base.path))
    said = complaint(run("extract", image.path, "-"))
    assert "base.qcow2: in use" in said
    assert run("list", image.path).returncode == 0


# References to files outside


@pytest.fixture
def outsider(new_image: NewImage, tmp_path: Path) -> Path:
    """An image whose backing file lies in a directory beside its own."""
    for directory in ("images", "bases"):
        (tmp_path / directory).mkdir()
    base = new_image("1M", name="bases/base.qcow2").write(0, 65536)
    return new_image("1M", name="images/disk.qcow2", backing=base).write(65536, 65536).snapshot("s").path


@pytest.mark.parametrize("command", ["map", "digest", "extract"])
def test_a_backing_file_outside_is_refused_until_it_is_allowed(
    outsider: Path, tmp_path: Path, run: Run, command: str
) -> None:
    said = refusal(run, command, outsider)
    assert str(tmp_path / "bases" / "base.qcow2") in said
    assert f"--allow-path {tmp_path / 'bases'}" in said
    assert run(command, "--allow-path", tmp_path / "bases", outsider, *COMMANDS[command]).returncode == 0
    refused = run(command, "--allow-path", tmp_path / "images", outsider, *COMMANDS[command])
    assert "--allow-path" in complaint(refused)


def test_with_leave_all_of_it_is_read(outsider: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    assert run("extract", "--allow-path", tmp_path, "-s", "s", outsider, out) == Result("", "", 0)
    lines = out.read_bytes()[:65536].splitlines()
    assert [int(line, 16) for line in lines] == list(range(4096))


def test_it_is_listed_and_described_without_leave(outsider: Path, run: Run) -> None:
    assert run("list", outsider).returncode == 0
    (link,) = run("info", "--json", outsider).json()["backing-chain"]
    assert "--allow-path" in link["error"]


def test_a_link_does_not_lead_outside_unseen(outsider: Path, tmp_path: Path, run: Run, new_image: NewImage) -> None:
    (outsider.parent / "link.qcow2").symlink_to(tmp_path / "bases" / "base.qcow2")
    image = new_image("1M", name="images/by-link.qcow2", backing="link.qcow2", backing_fmt="qcow2")
    assert str(tmp_path / "bases" / "base.qcow2") in complaint(run("map", image.path))


@pytest.mark.parametrize("name", ["backing-absolute", "backing-upwards", "backing-device", "backing-protocol"])
def test_a_hostile_reference_is_refused(library: Library, run: Run, tmp_path: Path, name: str) -> None:
    complaint(run("extract", library.path(name), tmp_path / "out"))
    assert contents(tmp_path) == []


# Usage


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["lst", "IMAGE"],
        ["list"],
        ["list", "IMAGE", "IMAGE"],
        ["list", "--no-such-option", "IMAGE"],
        ["map", "--start-offset", "ten", "IMAGE"],
        ["map", "--start-offset", "-1", "IMAGE"],
        ["map", "--max-length", "1X", "IMAGE"],
        ["map", "--vm-state", "IMAGE"],
        ["map", "-s"],
        ["extract", "IMAGE"],
        ["extract", "--range", "64k", "IMAGE", "-"],
        ["extract", "--range", "a:b", "IMAGE", "-"],
        ["extract", "--vm-state", "IMAGE", "-"],
        ["digest", "--manifest", "a", "--verify", "b", "IMAGE"],
        ["list", "--output", "yaml", "IMAGE"],
    ],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_wrong_usage_is_exit_code_2(library: Library, words: list[str]) -> None:
    image = str(library.path("demo"))
    result = finish(start(*(image if word == "IMAGE" else word for word in words)))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(("Usage: qcow2snap", "Error: "))
    assert "Traceback" not in result.stderr


def test_a_mistyped_command_is_guessed(run: Run) -> None:
    assert "Did you mean 'extract'?" in run("extrct", "x").stderr


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_is_no_error(words: list[str]) -> None:
    result = finish(start(*words))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


def test_the_command_line_can_be_used_twice_in_a_process(library: Library) -> None:
    assert here("list", library.path("demo")).returncode == 0
    assert here("--help").returncode == 0


# Output that nobody takes


@pytest.mark.parametrize("command", ["list", "info", "map", "digest"])
def test_a_full_disk_behind_standard_output_is_told(library: Library, command: str) -> None:
    with open("/dev/full", "wb") as full:
        assert "No space left" in complaint(finish(start(command, library.path("demo"), stdout=full)))


def test_what_is_said_on_a_closed_standard_error_is_not_among_the_output(library: Library) -> None:
    """As the shell's `2>&-` does it."""
    silent = (require("sh"), "-c", '"$@" 2>&-', "sh")
    result = finish(start("map", "--json", library.path("corrupt"), before=silent))  # with a warning
    assert isinstance(result.json(), list)
    assert finish(start("list", "missing", before=silent)).stdout == ""


@pytest.mark.parametrize("command", ["list", "info", "map", "digest"])
def test_a_closed_standard_output_gives_no_traceback(library: Library, command: str) -> None:
    """As the shell's `>&-` does it."""
    result = finish(start(command, library.path("demo"), before=(require("sh"), "-c", '"$@" >&-', "sh")))
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert result.returncode in (0, 1)
