"""The recipes of README.md, run as they stand there, on a disk with a file system in it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import Image, qemu_img, require
from tests.support.tools import REPOSITORY
from tests.support.waiting import until

# Lines that need what a test cannot have: a kernel module and root, an appliance, a screen. Nothing else is left out.
UNTRIED = ("nbd-client -unix", "qemu-nbd -r", "guestfish", "fuse2fs", "qemu-system-x86_64")
TOOLS = ["nbdinfo", "nbdcopy", "nbdfuse", "nbdsh", "qemu-img", "debugfs", "mke2fs"]


def commands() -> Iterator[str]:
    """All of the section's command lines, each with the lines that go on with it."""
    section = (REPOSITORY / "README.md").read_text().partition("## Recipes\n")[2].partition("\n## ")[0]
    for block in re.findall(r"^```console\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
        for command in re.findall(r"^[$#] (.*(?:\n> .*)*)", block, re.MULTILINE):
            yield command.replace("\n> ", "\n")


@pytest.fixture
def disk(tmp_path: Path) -> Image:
    """Monday: a file system with /etc/hostname. Tuesday it has grown, and is another in places."""
    for tool in TOOLS:
        require(tool)
    (tmp_path / "root" / "etc").mkdir(parents=True)
    (tmp_path / "root" / "etc" / "hostname").write_text("recipes.example\n")
    subprocess.run([require("mke2fs"), "-q", "-t", "ext4", "-d", "root", "fs.raw", "4M"], cwd=tmp_path, check=True)
    qemu_img("convert", "-O", "qcow2", tmp_path / "fs.raw", tmp_path / "disk.qcow2")
    image = Image(tmp_path / "disk.qcow2").snapshot("monday").write(2 << 20, 300_000)
    return image.write_zeroes(0, 65536).resize("6M").write(5 << 20, 65536).snapshot("tuesday").write(0, 4096)


class Shell:
    """Runs commands in one directory, some of them in the background, until the end of the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        programs = Path(sys.executable).parent  # last: Debian's nbdsh needs Debian's python3
        self.env = os.environ | {"PATH": f"/usr/sbin:/usr/bin:/sbin:/bin:{programs}", "PYTHONPATH": str(REPOSITORY)}
        self.running: list[subprocess.Popen[bytes]] = []

    def run(self, command: str) -> str:
        for name in ("disk.sock", "monday"):
            command = command.replace(f"/tmp/{name}", str(self.directory / f"at-{name}"))
        if not shutil.which("fusermount3"):
            command = command.replace("fusermount3 -u", "umount")
        if command.endswith("&"):
            self.running.append(
                subprocess.Popen(
                    ["bash", "-c", command[:-1]], cwd=self.directory, env=self.env, start_new_session=True,
                    stdout=subprocess.DEVNULL,
                )
            )  # fmt: skip
            return ""
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", command], cwd=self.directory, env=self.env, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def stop(self) -> None:
        for process in reversed(self.running):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(20)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.stop()


def test_the_recipes_do_what_they_say(disk: Image, shell: Shell, tmp_path: Path) -> None:
    mounts = os.access("/dev/fuse", os.R_OK | os.W_OK) and (os.geteuid() == 0 or shutil.which("fusermount3"))
    said = {}
    assert disk.path  # all of it is written
    for command in commands():
        program = command.split()[0]
        if command.startswith(UNTRIED) or (not mounts and "/tmp/monday" in command):
            continue
        said[program] = shell.run(command)
        if program == "qcow2snap":
            assert until(lambda: (tmp_path / "at-disk.sock").is_socket())
        if "nbdfuse" in command:
            assert until(lambda: (tmp_path / "at-monday" / "nbd").exists())
        if command.startswith("nbdcopy --"):
            digest, _ = said[program].split()
            assert digest == disk.reference("monday").sha256
    assert 'export="tuesday":' in said["nbdinfo"] or (tmp_path / "changed").exists()
    monday, tuesday = disk.reference("monday"), disk.reference("tuesday")
    assert hashlib.sha256((tmp_path / "monday.raw").read_bytes()).hexdigest() == monday.sha256
    assert hashlib.sha256((tmp_path / "tuesday.raw").read_bytes()).hexdigest() == tuesday.sha256
    changed = sum(int(line.split()[1]) for line in (tmp_path / "changed").read_text().splitlines())
    assert 300_000 < changed < 3 << 20, "what changed, and not the disk"
    qemu_img("compare", "-f", "raw", "-F", "qcow2", monday.raw, tmp_path / "monday.qcow2")
    if mounts:
        assert said["debugfs"] == "recipes.example\n"
        assert not list((tmp_path / "at-monday").iterdir()), "still mounted"


def test_nothing_is_left_out_that_is_not_there() -> None:
    found = list(commands())
    assert len(found) > 12
    for start in UNTRIED:
        assert any(command.startswith(start) for command in found), start
