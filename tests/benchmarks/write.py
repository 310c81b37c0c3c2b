"""Writing a qcow2 image over NBD: `qcow2snap serve --writable` against `qemu-nbd` at its best setting.

Each run has a server of its own, on a fresh copy of the image, in turn. Both are as durable: what a client has not
flushed may be in the page cache, or in a cache of tables. After each run of ours qemu-img has to find the image sound.
The snapshot that is read while a guest writes is served by one process of ours; QEMU needs a second one, which takes
no lock.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.benchmarks import fio, images, pairs, servers


class Load(NamedTuple):
    """What the guest does to a disk. `amount`: bytes; 0: for some seconds. With `read`, a snapshot's read is timed."""

    what: str
    image: Callable[[int], Path]
    options: list[str]
    amount: int
    target: float | None
    read: bool = False


_SEQUENTIAL = ["--rw=write", "--bs=256k", "--iodepth=4"]
_RANDOM = ["--rw=randwrite", "--bs=4k"]
_SLOWLY = ["--iodepth=4", "--rate_iops=2000"]
LOADS = [
    Load("write in sequence, allocated", images.full, _SEQUENTIAL, 1 << 40, 1.2),
    Load("write in sequence, allocating", images.empty, _SEQUENTIAL, 1 << 40, 1.0),
    Load("overwrite 4 KiB at random, depth 1", images.full, [*_RANDOM, "--iodepth=1"], 0, 1.0),
    Load("overwrite 4 KiB at random, depth 64", images.full, [*_RANDOM, "--iodepth=64"], 0, 1.0),
    Load("4 KiB at random after a snapshot", images.kept, [*_RANDOM, "--iodepth=16"], 24 << 20, 1.0),
    Load("the same, a flush each 64 writes", images.kept, [*_RANDOM, "--iodepth=16", "--fsync=64"], 4 << 20, None),
    Load("4 KiB at random, allocating", images.empty, [*_RANDOM, "--iodepth=16"], 24 << 20, None),
    Load("snapshot read while writing", images.kept, [*_RANDOM, *_SLOWLY], 0, 1.2, read=True),
]

Start = Callable[[Path], servers.Setting]


def rows(quick: bool) -> Iterator[pairs.Row]:
    for load in LOADS:
        yield pairs.Row(load.what, partial(_compare, load, quick))


def _compare(load: Load, quick: bool) -> pairs.Comparison:
    size = 128 << 20 if quick else 2 << 30 if load.read else 512 << 20  # a read of 512 MiB is over too soon to be timed
    before = load.image(size)
    with TemporaryDirectory(dir=images.CACHE) as name:
        image = Path(name) / "disk.qcow2"
        measure = partial(_measure, load, before, image, quick)
        peers = servers.qemu_nbd_writable(image)
        reader = servers.qemu_nbd_in_use(image, images.SNAPSHOT) if load.read else None
        peer = peers[0]
        if not quick:
            peer = max(peers, key=lambda setting: _unit(load).ratio(measure(setting, reader).figure, 1.0))

        def ours() -> pairs.Run:
            run = measure(servers.writable(image), None)
            pairs.run(["qemu-img", "check", "-q", image])
            return run

        return pairs.compare(
            load.what,
            ours,
            lambda: measure(peer, reader),
            peer.name,
            pairs=5 if load.read and not quick else 3,
            unit=_unit(load),
            target=load.target,
        )


def _unit(load: Load) -> pairs.Unit:
    return pairs.Unit.SECONDS if load.read else pairs.Unit.RATE


def _measure(
    load: Load, before: Path, image: Path, quick: bool, setting: servers.Setting, reader: servers.Setting | None
) -> pairs.Run:
    shutil.copyfile(before, image)
    os.sync()
    with ExitStack() as stack:
        server = stack.enter_context(servers.Server(setting)).wait()
        command = _fio(load, server.uri, quick)
        if not load.read:
            return pairs.Run(float(fio.job(command)["write"]["iops"]), server.pss())
        second = server if reader is None else stack.enter_context(servers.Server(reader)).wait()
        uri = second.uri if reader is not None else server.uri_of(images.SNAPSHOT)
        return fio.read_beside(command, uri, server)


def _fio(load: Load, uri: str, quick: bool) -> list[str]:
    size = json.loads(subprocess.check_output(["nbdinfo", "--json", uri]))["exports"][0]["export-size"]
    seconds = 60 if load.read else 1 if quick else 3
    how_much = [f"--io_size={min(load.amount, size)}"] if load.amount else ["--time_based", f"--runtime={seconds}"]
    options = ["--name=guest", "--ioengine=nbd", f"--uri={uri}", f"--size={size}", "--randseed=1", *how_much]
    return ["fio", *options, *load.options, "--output-format=json"]
