"""A small Linux as a guest: Debian's kernel, busybox and mke2fs, booted without KVM, with one disk over NBD.

`scripts/guest-kernel` unpacks kernel and busybox. What the guest does is a shell script; it and its test talk in lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.support.tools import REPOSITORY, ToolFailed, require

KERNEL = REPOSITORY / ".guest"
BOOT_LIMIT = 200  # seconds; without KVM, on a machine that has other things to do

_PREPARE = """#!/bin/sh
/bin/busybox mkdir -p /proc /sys /dev /mnt /usr/bin /usr/sbin /sbin
/bin/busybox --install -s
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in /modules/*; do insmod $module || poweroff -f; done
until [ -b /dev/vda ]; do sleep 0.1; done
say() { echo "guest: $*"; }
hear() { read line; }
"""


def initramfs(script: str) -> bytes:
    """A root file system in which `script` is what init does, after _PREPARE."""
    if not (KERNEL / "complete").exists():
        skip = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        skip("`make test` gets a kernel for guests; see .guest")
    mke2fs = require("mke2fs")
    files = {
        "init": (_PREPARE + script + "\npoweroff -f\n").encode(),
        "bin/busybox": (KERNEL / "busybox").read_bytes(),
        "bin/sh": (KERNEL / "busybox").read_bytes(),
        "bin/mke2fs.ext4": Path(mke2fs).read_bytes(),
    }
    for module in (KERNEL / "modules").iterdir():
        files[f"modules/{module.name}"] = module.read_bytes()
    libraries = subprocess.run([require("ldd"), mke2fs], check=True, capture_output=True, text=True).stdout
    for library in re.findall(r"/\S+", libraries):
        files[library.lstrip("/")] = Path(library).read_bytes()
    return _cpio(files)


def _cpio(files: dict[str, bytes]) -> bytes:
    """An archive in the "newc" format, with the directories that the files are in."""
    directories = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    entries = [(name, 0o40755, b"") for name in sorted(directories)]
    entries += [(name, 0o100755, data) for name, data in files.items()] + [("TRAILER!!!", 0, b"")]
    archive = b""
    for number, (name, mode, data) in enumerate(entries):
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        header = b"070701" + "".join(f"{field:08x}" for field in fields).encode() + name.encode() + b"\0"
        archive += header.ljust(-(-len(header) // 4) * 4, b"\0") + data.ljust(-(-len(data) // 4) * 4, b"\0")
    return archive


class LinuxGuest:
    """A running guest whose disk is an NBD export on a Unix socket. A context manager; on exit it is gone."""

    def __init__(self, directory: Path, script: str, socket: Path, export: str) -> None:
        archive = directory / "initramfs"
        archive.write_bytes(initramfs(script))
        disk = f"driver=nbd,node-name=disk,server.type=unix,server.path={socket},export={export}"
        self._command: list[str | Path] = [
            require("qemu-system-x86_64"), "-machine", "pc", "-accel", "tcg", "-cpu", "max", "-m", "256",
            "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-kernel", KERNEL / "vmlinuz", "-initrd", archive, "-append", "console=ttyS0 quiet panic=-1",
            "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk",
        ]  # fmt: skip
        self.lines: list[str] = []
        self._heard = threading.Condition()

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                with self._heard:
                    self.lines.append(line.decode(errors="replace").strip())
                    self._heard.notify_all()

    def said(self, beginning: str) -> list[str]:
        """What the guest has said so far that begins so."""
        with self._heard:
            return [line.removeprefix("guest: ") for line in self.lines if line.startswith(f"guest: {beginning}")]

    def wait_for(self, beginning: str, count: int = 1) -> list[str]:
        """Wait until it has said so many lines that begin so."""
        deadline = time.monotonic() + BOOT_LIMIT
        while len(found := self.said(beginning)) < count:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise ToolFailed(f"the guest did not say {beginning!r}: {self.lines[-20:]}")
            with self._heard:
                self._heard.wait(0.5)
        return found

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()
