"""QEMU's NBD server on an image, and what it says of a dirty bitmap."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.tools import TIME_LIMIT, require


@contextmanager
def qemu_nbd(path: Path, *options: str) -> Iterator[str]:
    """QEMU's server on an image; gives its URI."""
    socket = path.with_suffix(".qemu-nbd")
    command = [require("qemu-nbd"), "-r", "-t", "-f", "qcow2", "-k", str(socket), *options, str(path)]
    process = subprocess.Popen(command, cwd=path.parent)
    try:
        deadline = time.monotonic() + 20
        while not socket.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait(20)
        socket.unlink(missing_ok=True)


def nbdinfo_map(uri: str, context: str) -> list[tuple[int, int, int]]:
    """What libnbd's client gets of a context: offset, length and flags."""
    command = [require("nbdinfo"), "--json", f"--map={context}", uri]
    entries = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=TIME_LIMIT).stdout)
    return [(entry["offset"], entry["length"], entry["type"]) for entry in entries]


def dirty_by_qemu(path: Path, bitmap: str) -> list[tuple[int, int]]:
    """Offset and length of what is dirty by a persistent bitmap of an image that nobody has open."""
    with qemu_nbd(path, "-B", bitmap) as uri:
        found = nbdinfo_map(uri, f"qemu:dirty-bitmap:{bitmap}")
    return [(offset, length) for offset, length, flags in found if flags]
