"""NBD servers as processes on Unix sockets: ours, and the peers at each of their settings."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from types import TracebackType
from typing import NamedTuple, Self

from tests.benchmarks import pairs

READY_TIMEOUT = 30.0  # seconds from the start until a server accepts
STOP_TIMEOUT = 10.0

# --aio and --cache that can go together.
_QEMU_SETTINGS = [
    ["--aio=io_uring", "--cache=writeback"],
    ["--aio=threads", "--cache=writeback"],
    ["--aio=io_uring", "--cache=none"],
    ["--aio=threads", "--cache=none"],
    ["--aio=native", "--cache=none"],
]
_NBDKIT_SETTINGS = [[], ["--threads=2"]]


class Setting(NamedTuple):
    """How a server is started. `name`: what tells it from others of its kind."""

    name: str
    command: Callable[[Path], pairs.Command]  # given the socket
    tls: Path | None = None  # the folder of certificates


def qcow2snap(image: Path, snapshot: str | None, *options: str, tls: Path | None = None) -> Setting:
    """Ours. `snapshot` is the default export; "" for the active disk; None for all."""
    chosen = ["-s", snapshot] if snapshot else []
    if tls is not None:
        options = (*options, "--tls", "require", "--tls-certificates", str(tls))
    return Setting(
        shlex.join(["serve", *options]),
        lambda path: [pairs.QCOW2SNAP, "serve", *chosen, *options, "-k", path, image],
        tls,
    )


def qemu_nbd(image: Path, snapshot: str, *, tls: Path | None = None, shared: int = 8) -> list[Setting]:
    """qemu-nbd at each setting that may be its best."""
    chosen = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
    common = ["qemu-nbd", "-r", "-t", "-e", str(shared), "-f", "qcow2", *chosen]
    if tls is not None:
        common += ["--object", f"tls-creds-x509,id=tls,dir={tls},endpoint=server,verify-peer=no", "--tls-creds", "tls"]

    def setting(options: list[str]) -> Setting:
        return Setting(" ".join(options), lambda path: [*common, *options, "-k", path, image], tls)

    return [setting(options) for options in _QEMU_SETTINGS]


def writable(image: Path) -> Setting:
    """Ours, of the active disk for writing and the snapshots beside it."""
    return Setting("serve --writable", lambda path: [pairs.QCOW2SNAP, "serve", "--writable", "-k", path, image])


def qemu_nbd_writable(image: Path) -> list[Setting]:
    """qemu-nbd of the active disk, for writing, at each setting that may be its best."""

    def setting(options: list[str]) -> Setting:
        return Setting(
            " ".join(options), lambda path: ["qemu-nbd", "-t", "-e", "8", "-f", "qcow2", *options, "-k", path, image]
        )

    return [setting(options) for options in _QEMU_SETTINGS]


def qemu_nbd_in_use(image: Path, snapshot: str) -> Setting:
    """qemu-nbd of a snapshot while another one has the image for writing."""
    options = f"driver=qcow2,force-share=on,file.driver=file,file.filename={image}"
    words = ["qemu-nbd", "-r", "-t", "-l", f"snapshot.name={snapshot}", "--image-opts"]
    return Setting("force-share", lambda path: [*words, "-k", path, options])


def nbdkit(raw: Path, *, tls: Path | None = None) -> list[Setting]:
    """nbdkit's file plugin at each setting that may be its best."""
    common = ["nbdkit", "-f", "-r"]
    if tls is not None:
        common += ["--tls=require", f"--tls-certificates={tls}"]

    def setting(options: list[str]) -> Setting:
        return Setting(" ".join(options), lambda path: [*common, *options, "-U", path, "file", raw], tls)

    return [setting(options) for options in _NBDKIT_SETTINGS]


class Server:
    """One server and all its processes, on a socket in a folder of its own. Starts when made, ends with the context."""

    def __init__(self, setting: Setting) -> None:
        self.name = setting.name
        self._folder = TemporaryDirectory(prefix="bench-")
        self._socket = Path(self._folder.name) / "nbd.sock"
        self._command = setting.command(self._socket)
        self._errors = TemporaryFile()  # noqa: SIM115
        self._tls = setting.tls
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors
        )

    @property
    def uri(self) -> str:
        return self.uri_of("")

    def uri_of(self, export: str) -> str:
        if self._tls is not None:
            return f"nbds+unix:///{export}?socket={self._socket}&tls-certificates={self._tls}"
        return f"nbd+unix:///{export}?socket={self._socket}"

    def wait(self) -> Self:
        """Until it greets its clients."""
        deadline = time.monotonic() + READY_TIMEOUT
        while not _greets(self._socket):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._errors.seek(0)
                message = self._errors.read().decode().strip() or "does not accept"
                raise pairs.BenchmarkError(f"{shlex.join(map(str, self._command))}: {message}")
            time.sleep(0.001)
        return self

    def pss(self) -> int:
        """Bytes: memory of all its processes, what several share divided among them."""
        return sum(_field(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in self._processes())

    def peak_rss(self) -> int:
        """Bytes: the most that each of its processes held, added up."""
        return sum(_field(f"/proc/{pid}/status", "VmHWM:") for pid in self._processes())

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _processes(self) -> Iterator[int]:
        waiting = [self._process.pid]
        while waiting:
            pid = waiting.pop()
            yield pid
            for thread in os.listdir(f"/proc/{pid}/task"):
                with suppress(FileNotFoundError), open(f"/proc/{pid}/task/{thread}/children") as file:
                    waiting += map(int, file.read().split())


def _greets(path: Path) -> bool:
    """Whether a server greets who connects."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(path))
            return client.recv(8) == b"NBDMAGIC"
        except OSError:
            return False


def _field(path: str, name: str) -> int:
    """A field of a file in /proc, in bytes."""
    with open(path) as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) << 10
    raise pairs.BenchmarkError(f"{path} has no {name}")
