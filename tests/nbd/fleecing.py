"""`qcow2snap fleece` over a disk, and QEMU's graph over another: fixtures of the room, and the clients of both."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nbd.serving import Serving
from tests.nbd.support import run as output
from tests.nbd.test_interop import SYSTEM_PYTHON
from tests.support import require

MiB = 1 << 20
CLUSTER = 1 << 16
SIZE = 8 * MiB + 3 * 4096  # the last cluster is short


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Data, with holes in it."""
    path = tmp_path / "disk.raw"
    content = random.Random(1)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset in range(0, SIZE, MiB):
            file.seek(offset)
            file.write(content.randbytes(min(700_000, SIZE - offset)))
    return path


Fleece = Callable[..., Serving]
QemuGraph = Callable[..., tuple[str, str]]


@pytest.fixture
def fleece(disk: Path, tmp_path: Path) -> Iterator[Fleece]:
    running = []

    def start(*arguments: str | Path) -> Serving:
        where = ("--target", tmp_path / "temp.raw", "-k", tmp_path / "s")
        running.append(Serving(disk, *where, *arguments, command="fleece"))
        return running[-1]

    yield start
    for each in running:
        if each.process.poll() is None:
            each.stop()


def copy(uri: str, to: Path) -> bytes:
    """All of an export, by nbdcopy."""
    require("nbdcopy")
    output("nbdcopy", uri, to)
    return to.read_bytes()


def libnbd(script: str, *arguments: str) -> str:
    if output(SYSTEM_PYTHON, "-c", "import nbd; print('yes')", check=False) != "yes\n":
        require("python3-libnbd")
    return output(SYSTEM_PYTHON, "-c", script, *arguments)


@pytest.fixture
def qemu_graph(tmp_path: Path) -> Iterator[QemuGraph]:
    """QEMU's graph over a disk, by whichever qemu-storage-daemon; gives the URIs of guest and backup."""
    running = []

    def start(disk: Path, program: str | Path = "qemu-storage-daemon") -> tuple[str, str]:
        temp, where = tmp_path / "qemu-temp.raw", tmp_path / "q"
        temp.touch()
        os.truncate(temp, disk.stat().st_size)
        nodes: list[dict[str, Any]] = [
            {"driver": "file", "node-name": "disk", "filename": str(disk)},
            {"driver": "file", "node-name": "temp", "filename": str(temp)},
            {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "temp"},
            {"driver": "snapshot-access", "node-name": "access", "file": "cbw"},
        ]
        command = [
            program if isinstance(program, Path) else require(program),
            "--nbd-server",
            f"addr.type=unix,addr.path={where}",
        ]
        for node in nodes:
            command += ["--blockdev", json.dumps({**node, "discard": "unmap"})]
        for name, node_name in (("guest", "cbw"), ("backup", "access")):
            command += ["--export", f"type=nbd,id={name},node-name={node_name},name={name},writable=on"]
        pid = tmp_path / "pid"
        running.append(subprocess.Popen([*command, "--pidfile", str(pid)]))
        for _ in range(200):
            if pid.exists():
                break
            time.sleep(0.05)
        return f"nbd+unix:///guest?socket={where}", f"nbd+unix:///backup?socket={where}"

    yield start
    for process in running:
        process.kill()
        process.wait()
