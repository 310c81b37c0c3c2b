"""Writing a disk through copy-before-write: `fleece` and `daemon` against qemu-storage-daemon with the same graph.

Each run has a server of its own, on a fresh copy of the disk, so that what is written has to be copied first. Ahead of
all runs ours is written, and then has to give back the disk as it was. (Of QEMU 7.2 that cannot be asked.)
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.benchmarks import fio, images, pairs, servers


class Load(NamedTuple):
    """What the guest does, with so many bytes of a disk of 2 GiB. With `backup`, that is timed meanwhile."""

    what: str
    options: list[str]
    amount: int
    target: float
    backup: bool = False


_RANDOM = ["--rw=randwrite", "--bs=4k"]
_SEQUENTIAL = ["--rw=write", "--bs=256k", "--iodepth=4"]
LOADS = [
    Load("random 4 KiB writes, depth 1", [*_RANDOM, "--iodepth=1"], 32 << 20, 1.0),
    Load("random 4 KiB writes, depth 32", [*_RANDOM, "--iodepth=32"], 32 << 20, 1.0),
    Load("sequential writes", _SEQUENTIAL, 1 << 30, 1.0),
    Load("snapshot read while writing", [*_RANDOM, "--iodepth=4", "--rate_iops=2000"], 1 << 40, 1.2, True),
]


def rows(quick: bool) -> Iterator[pairs.Row]:
    for name, ours in (("fleece", _fleece), ("daemon", _daemon)):
        for load in LOADS:
            what = f"{name}, {load.what}"
            yield pairs.Row(what, partial(_compare, what, load, ours, quick))


def _compare(what: str, load: Load, ours: Graph, quick: bool) -> pairs.Comparison:
    size = 256 << 20 if quick else 2 << 30
    before = images.raw(images.fragmented(size))
    with TemporaryDirectory(dir=images.CACHE) as name:
        folder = Path(name)
        measure = partial(_measure, load, before, folder)
        _check(ours, before, folder)
        peer = max(
            PEERS if not quick else PEERS[:1],
            key=lambda setting: _unit(load).ratio(measure(setting).figure, 1.0) if not quick else 0.0,
        )
        return pairs.compare(
            what,
            partial(measure, ours),
            partial(measure, peer),
            peer(folder).name,
            pairs=3 if quick else 5,
            unit=_unit(load),
            target=load.target,
        )


def _unit(load: Load) -> pairs.Unit:
    return pairs.Unit.SECONDS if load.backup else pairs.Unit.RATE


# A graph over disk.raw and temp.raw in a folder.
Graph = Callable[[Path], servers.Setting]


def _fleece(folder: Path) -> servers.Setting:
    words = [pairs.QCOW2SNAP, "fleece", folder / "disk.raw", "--target", folder / "temp.raw", "--force", "-k"]
    return servers.Setting("fleece", lambda path: [*words, path])


def _daemon(folder: Path) -> servers.Setting:
    return servers.Setting("daemon", _storage_daemon([pairs.QCOW2SNAP, "daemon"], "threads", folder))


def _qemu(aio: str, folder: Path) -> servers.Setting:
    return servers.Setting(f"qemu-storage-daemon, {aio}", _storage_daemon(["qemu-storage-daemon"], aio, folder))


def _storage_daemon(program: pairs.Command, aio: str, folder: Path) -> Callable[[Path], pairs.Command]:
    """The command line for a socket's path; ours and QEMU's differ in the program only."""

    def command(path: Path) -> pairs.Command:
        nodes = [
            {"driver": "file", "node-name": "disk", "filename": str(folder / "disk.raw"), "aio": aio},
            {"driver": "file", "node-name": "temp", "filename": str(folder / "temp.raw"), "aio": aio},
            {"driver": "copy-before-write", "node-name": "guest", "file": "disk", "target": "temp"},
            {"driver": "snapshot-access", "node-name": "backup", "file": "guest"},
        ]
        words = [*program, "--nbd-server", f"addr.type=unix,addr.path={path},max-connections=8"]
        for node in nodes:
            words += ["--blockdev", json.dumps(node)]
        for export in ("guest,writable=on", "backup"):
            name = export.partition(",")[0]
            words += ["--export", f"type=nbd,id={name},node-name={name},name={export}"]
        return words

    return command


PEERS: list[Graph] = [partial(_qemu, "threads"), partial(_qemu, "io_uring")]


def _start(graph: Graph, before: Path, folder: Path) -> servers.Server:
    disk, temp = folder / "disk.raw", folder / "temp.raw"
    shutil.copyfile(before, disk)
    temp.write_bytes(b"")
    os.truncate(temp, before.stat().st_size)
    os.sync()
    return servers.Server(graph(folder))


def _measure(load: Load, before: Path, folder: Path, graph: Graph) -> pairs.Run:
    with _start(graph, before, folder) as server:
        server.wait()
        command = _fio(load, server.uri_of("guest"), before)
        if not load.backup:
            return pairs.Run(float(fio.job(command)["write"]["iops"]), server.pss())
        return fio.read_beside(command, server.uri_of("backup"), server)


def _fio(load: Load, uri: str, disk: Path) -> list[str]:
    size = disk.stat().st_size
    how_much = ["--time_based", "--runtime=60"] if load.backup else [f"--io_size={min(load.amount, size)}"]
    options = ["--name=guest", "--ioengine=nbd", f"--uri={uri}", f"--size={size}", "--randseed=1", *how_much]
    return ["fio", *options, *load.options, "--output-format=json"]


def _check(graph: Graph, before: Path, folder: Path) -> None:
    """The snapshot is what the disk was, after much of it was written."""
    copy = folder / "copy.raw"
    with _start(graph, before, folder) as server:
        server.wait()
        pairs.run([str(word) for word in _fio(LOADS[1], server.uri_of("guest"), before)])
        pairs.run(["nbdcopy", server.uri_of("backup"), copy])
    if not filecmp.cmp(copy, before, shallow=False):
        raise pairs.BenchmarkError(f"{graph(folder).name} gives other bytes than the disk had")
    copy.unlink()
