"""Images that a writer left behind when it was killed: real ones, by qemu-io and qemu-img under strace.

The process gets SIGKILL at a write of its own, counted from its start, so that one story gives as many images as it has
writes. What had not been written by then is lost, as when a host's process is killed; the page cache is not.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import qemu_img, qemu_io, require

WRITES = "pwrite64,pwritev,fallocate,ftruncate"
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Crash:
    """A program that works on an image and is killed at some of its writes. `{}` in its arguments is the image."""

    name: str
    program: str
    arguments: tuple[str, ...]
    writes: int  # it is killed at the first of them, at the second, and so on up to this one
    options: str = "cluster_size=4096"

    def images(self, directory: Path) -> Iterator[Path]:
        """What is left after each kill. QEMU's threads share the writes, so that a late kill may find it finished."""
        before = directory / "before.qcow2"
        self._prepare(before)
        for number in range(1, self.writes + 1):
            path = directory / f"crash-{self.name}={number}.qcow2"
            path.write_bytes(before.read_bytes())
            inject = f"inject={WRITES}:signal=KILL:when={number}"
            strace = (require("strace"), "-f", "-qq", "-o", "/dev/null", "-e", f"trace={WRITES}", "-e", inject)
            command = [*strace, require(self.program), *(part.format(path) for part in self.arguments)]
            done = subprocess.run(command, capture_output=True, timeout=60, cwd=directory)
            if done.returncode in (-9, 137):
                yield path

    def _prepare(self, path: Path) -> None:
        """Two snapshots, a bitmap where the version has them, and compressed clusters."""
        qemu_img("create", "-q", "-f", "qcow2", "-o", self.options, path, "6M")
        qemu_io(path, "write 0 64k", "write -c 1M 16k", "write 2M 8k")
        qemu_img("snapshot", "-c", "one", path)
        qemu_io(path, "write 16k 32k", "discard 2M 4k")
        qemu_img("snapshot", "-c", "two", path)
        if "compat=0.10" not in self.options:
            qemu_img("bitmap", "--add", path, "dirty")
        qemu_io(path, "write 0 4k", "write 4M 4k")


def _io(*commands: str) -> tuple[str, ...]:
    return (*(part for command in commands for part in ("-c", command)), "{}")


_WRITING = _io("write 0 16k", "write 4M 32k", "flush", "write 2M 64k", "write -c 3M 16k", "discard 0 8k", "flush")
_SUBCLUSTERS = _io("write 0 512", "write 2M 64k", "flush", "write -z 1M 2k", "write 3M 512", "flush")

CRASHES = (
    Crash("write", "qemu-io", _WRITING, 8),
    Crash("write-lazily", "qemu-io", _WRITING, 9, "cluster_size=4096,lazy_refcounts=on"),
    Crash("write-v2", "qemu-io", _WRITING, 6, "cluster_size=4096,compat=0.10"),
    Crash("write-subclusters", "qemu-io", _SUBCLUSTERS, 5, "cluster_size=16k,extended_l2=on"),
    Crash("snapshot-create", "qemu-img", ("snapshot", "-c", "three", "{}"), 8),
    Crash("snapshot-delete", "qemu-img", ("snapshot", "-d", "one", "{}"), 6),
    Crash("snapshot-apply", "qemu-img", ("snapshot", "-a", "one", "{}"), 3, "cluster_size=4096,compat=0.10"),
    Crash("bitmap-add", "qemu-img", ("bitmap", "--add", "{}", "another"), 5),
    Crash("resize", "qemu-img", ("resize", "-q", "{}", "64M"), 5),
)
