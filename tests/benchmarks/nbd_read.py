"""Reading a snapshot over NBD: `qcow2snap serve` against `qemu-nbd -r -e 8` at its best setting, and against the limit.

Both servers run throughout a comparison, on Unix sockets; clients read from them in turn. The page cache is warm unless
a row says that it is cold: then the image's pages are dropped ahead of each run. The limit is nbdkit's file plugin on
the raw bytes. Before anything is measured, both servers have to give the same bytes, ours also in the client's way.
"""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, NamedTuple

from tests.benchmarks import certificates, images, pairs, servers


@dataclass(frozen=True)
class Copy:
    """nbdcopy to nowhere, timed. It opens no more connections than it has threads: unless told, one a processor."""

    connections: int
    threads: int | None = None
    request_size: ClassVar = 256 << 10
    unit: ClassVar = pairs.Unit.SECONDS

    def run(self, uri: str, quick: bool) -> float:
        threads = [] if self.threads is None else [f"--threads={self.threads}"]
        return pairs.run(["nbdcopy", f"--connections={self.connections}", *threads, uri, "null:"]).figure


@dataclass(frozen=True)
class Fio:
    """Reads of 4 KiB by fio: how many a second."""

    pattern: str  # read or randread
    depth: int
    request_size: ClassVar = 4096
    unit: ClassVar = pairs.Unit.RATE

    def run(self, uri: str, quick: bool) -> float:
        milliseconds = 500 if quick else 2500
        size = json.loads(_output(["nbdinfo", "--json", uri]))["exports"][0]["export-size"]
        options = ["--name=read", "--ioengine=nbd", f"--uri={uri}", f"--rw={self.pattern}", f"--size={size}"]
        options += ["--bs=4k", f"--iodepth={self.depth}", "--time_based", f"--runtime={milliseconds}ms"]
        output = _output(["fio", *options, "--output-format=json"])
        report = json.loads(output[output.index("{") :])  # its NBD engine says something before that
        if report["jobs"][0]["error"]:
            raise pairs.BenchmarkError(f"fio, reading {uri}: error {report['jobs'][0]['error']}")
        return float(report["jobs"][0]["read"]["iops"])


class Reading(NamedTuple):
    """What is read, and how. `target` is a ratio."""

    what: str
    layout: str
    client: Copy | Fio
    target: float | None
    tls: bool = False
    cold: bool = False
    in_use: bool = False  # ours with --force-share, as on an image that a VM writes; the peer is ours without


# fmt: off
READINGS = [
    Reading("sequential, 1 connection",         "none",        Copy(1),             1.3),
    Reading("sequential, --connections=4",      "none",        Copy(4),             2.0),
    Reading("sequential, 4 threads",            "none",        Copy(4, threads=4),  None),
    Reading("random 4 KiB, depth 1",            "none",        Fio("randread", 1),  1.5),
    Reading("random 4 KiB, depth 64",           "none",        Fio("randread", 64), 1.9),
    Reading("zlib, sequential",                 "zlib",        Copy(1),             2.3),
    Reading("zlib, 4 KiB in sequence, depth 1", "zlib",        Fio("read", 1),      10.0),
    Reading("zlib, random 4 KiB, depth 64",     "zlib",        Fio("randread", 64), 2.0),
    Reading("zstd, sequential",                 "zstd",        Copy(1),             1.5),
    Reading("chain of 3, sequential",           "chain",       Copy(1),             1.3),
    Reading("extended L2, sequential",          "extended-l2", Copy(1),             1.3),
    Reading("clusters of 4 KiB, sequential",    "4k-clusters", Copy(1),             1.3),
    Reading("TLS, sequential",                  "none",        Copy(1),             1.0, tls=True),
    Reading("TLS, sequential, --connections=4", "none",        Copy(4),             1.0, tls=True),
    Reading("cold, sequential",                 "none",        Copy(1),             1.0, cold=True),
    Reading("cold, random 4 KiB, depth 64",     "none",        Fio("randread", 64), 1.0, cold=True),
    Reading("in use, sequential",               "none",        Copy(1),             0.7, in_use=True),
    Reading("in use, random 4 KiB, depth 1",    "none",        Fio("randread", 1),  0.7, in_use=True),
]
# fmt: on


def rows(quick: bool) -> Iterator[pairs.Row]:
    checked: set[object] = set()
    options = {"tls": "--tls-certificates", "in_use": "--force-share"}
    for reading in READINGS:
        if not all(pairs.offers("serve", option) for field, option in options.items() if getattr(reading, field)):
            continue
        yield pairs.Row(reading.what, partial(_compare, reading, quick, checked))


def _compare(reading: Reading, quick: bool, checked: set[object]) -> pairs.Comparison:
    size = 256 << 20 if quick else 2 << 30
    image = images.fragmented(size, reading.layout)
    raw = images.raw(images.fragmented(size))
    client = reading.client
    before = partial(_drop_pages, image, raw) if reading.cold else _nothing
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=images.CACHE)))
        tls = certificates.make(folder / "tls") if reading.tls else None

        def trial(setting: servers.Setting) -> float:
            before()
            with servers.Server(setting) as server:
                return client.unit.ratio(client.run(server.wait().uri, quick=True), 1.0)

        def start_best(settings: list[servers.Setting]) -> servers.Server:
            best = settings[0]
            if len(settings) > 1 and not quick:
                best = max(settings, key=lambda setting: max(trial(setting), trial(setting)))
            return stack.enter_context(servers.Server(best)).wait()

        ours = start_best([servers.qcow2snap(image, images.SNAPSHOT, *["-U"] * reading.in_use, tls=tls)])
        peers = [servers.qcow2snap(image, images.SNAPSHOT)] if reading.in_use else _qemu_nbd(image, tls)
        # The peer's bytes are checked first at any setting, so that all trials find a warm page cache.
        key = reading.layout, client.request_size, reading.tls, reading.in_use
        if key not in checked:
            with servers.Server(_qemu_nbd(image, tls)[0]) as peer:
                _check_equal(ours, peer.wait(), client.request_size, folder)
            checked.add(key)
        peer = start_best(peers)
        limit = start_best(servers.nbdkit(raw, tls=tls))
        client.run(limit.uri, quick=True)
        return pairs.compare(
            reading.what,
            lambda: pairs.Run(client.run(ours.uri, quick), ours.pss()),
            lambda: pairs.Run(client.run(peer.uri, quick)),
            peer.name,
            pairs=3 if quick or isinstance(client, Fio) else 7,
            before=before,
            unit=client.unit,
            target=reading.target,
            limit=lambda: pairs.Run(client.run(limit.uri, quick)),
        )


def _qemu_nbd(image: Path, tls: Path | None) -> list[servers.Setting]:
    return servers.qemu_nbd(image, images.SNAPSHOT, tls=tls)


def _check_equal(ours: servers.Server, peer: servers.Server, request_size: int, folder: Path) -> None:
    """Ours is read in pieces of the size that will be measured, with many of them in flight."""
    copies = folder / "ours.raw", folder / "theirs.raw"
    pairs.run(["nbdcopy", f"--request-size={request_size}", ours.uri, copies[0]])
    pairs.run(["nbdcopy", peer.uri, copies[1]])
    if not filecmp.cmp(*copies, shallow=False):
        raise pairs.BenchmarkError(f"{ours.name} and {peer.name} give different bytes")
    for copy in copies:
        copy.unlink()
    os.sync()


def _drop_pages(*files: Path) -> None:
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _nothing() -> None:
    pass


def _output(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise pairs.BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
