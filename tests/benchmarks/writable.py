"""Writing a raw disk over NBD: `qcow2snap serve -f raw --writable` against qemu-nbd at its best setting.

Each run has a server of its own, on one file that is there in full, so that all of them overwrite the same pages.
Ahead of all runs ours is written by fio with checksums in the data, which fio then reads back from the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tests.benchmarks import fio, images, pairs, servers


class Load(NamedTuple):
    """What the client does, with so many bytes."""

    what: str
    options: list[str]
    amount: int
    target: float


_RANDOM = ["--rw=randwrite", "--bs=4k", "--norandommap"]
LOADS = [
    Load("raw, sequential writes", ["--rw=write", "--bs=256k", "--iodepth=4"], 4 << 30, 1.2),
    Load("raw, random 4 KiB writes, depth 1", [*_RANDOM, "--iodepth=1"], 256 << 20, 1.1),
    Load("raw, random 4 KiB writes, depth 64", [*_RANDOM, "--iodepth=64"], 512 << 20, 1.1),
]
_AIO = ("threads", "io_uring")


def rows(quick: bool) -> Iterator[pairs.Row]:
    for load in LOADS:
        yield pairs.Row(load.what, partial(_compare, load, quick))


def _compare(load: Load, quick: bool) -> pairs.Comparison:
    size = 64 << 20 if quick else 1 << 30
    images.CACHE.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=images.CACHE) as name:
        disk = Path(name) / "disk.raw"
        _write_all(disk, size)
        ours = servers.Setting(
            "serve", lambda path: [pairs.QCOW2SNAP, "serve", "-f", "raw", "--writable", "-k", path, disk]
        )
        _check(ours, disk, size)
        amount = load.amount // 16 if quick else load.amount
        measure = partial(_measure, [*load.options, f"--io_size={amount}"], size)
        peers = [_qemu_nbd(disk, aio) for aio in _AIO]
        peer = peers[0] if quick else max(peers, key=lambda setting: measure(setting).figure)
        return pairs.compare(
            load.what,
            partial(measure, ours),
            partial(measure, peer),
            f"qemu-nbd {peer.name}",
            pairs=3 if quick else 7,
            unit=pairs.Unit.RATE,
            target=load.target,
        )


def _qemu_nbd(disk: Path, aio: str) -> servers.Setting:
    common = ["qemu-nbd", "-t", "-e", "8", "-f", "raw", f"--aio={aio}", "--cache=writeback"]
    return servers.Setting(f"--aio={aio}", lambda path: [*common, "-k", path, disk])


def _write_all(path: Path, size: int) -> None:
    """A file without holes, on the disk already: nobody's writes wait for it."""
    piece = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(piece)
        os.fsync(file.fileno())


def _measure(options: list[str], size: int, setting: servers.Setting) -> pairs.Run:
    os.sync()
    with servers.Server(setting) as server:
        server.wait()
        job = _fio(["--ioengine=nbd", f"--uri={server.uri}", *options], size)
        return pairs.Run(float(job["write"]["iops"]), server.pss())


def _fio(options: list[str], size: int) -> dict[str, Any]:
    command = ["fio", "--name=writer", f"--size={size}", "--randseed=1", "--output-format=json", *options]
    return fio.job(command)


def _check(setting: servers.Setting, disk: Path, size: int) -> None:
    """What ours was given to write is in the file."""
    load = ["--rw=randwrite", "--bsrange=4k-128k", "--iodepth=64", f"--io_size={size // 4}", "--verify=crc32c"]
    with servers.Server(setting) as server:
        server.wait()
        _fio(["--ioengine=nbd", f"--uri={server.uri}", *load, "--do_verify=0", "--verify_state_save=0"], size)
    _fio(["--ioengine=psync", f"--filename={disk}", *load, "--verify_only", "--verify_state_save=0"], size)
