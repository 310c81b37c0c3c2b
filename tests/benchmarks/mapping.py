"""The map of a large disk that has all of its metadata and no data, from the command line and over NBD."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks import images, pairs, servers


def rows(quick: bool) -> Iterator[pairs.Row]:
    size, count = 64 << 30 if quick else 1 << 40, 3 if quick else 7
    yield pairs.Row("map --json, 1 TiB", partial(_command, size, count))
    yield pairs.Row("base:allocation, 1 TiB", partial(_context, size, count))


def _command(size: int, count: int) -> pairs.Comparison:
    image = images.preallocated(size)
    ours: pairs.Command = [pairs.QCOW2SNAP, "map", "--json", image]
    peer: pairs.Command = ["qemu-img", "map", "--output=json", image]
    _check_equal(ours, peer)
    return pairs.compare(
        "map --json, 1 TiB",
        partial(pairs.run, ours),
        partial(pairs.run, peer),
        "qemu-img map --output=json",
        pairs=count,
        target=3.0,
    )


def _context(size: int, count: int) -> pairs.Comparison:
    image = images.preallocated(size)

    def client(server: servers.Server) -> list[str]:
        return ["nbdinfo", "--map", "--json", server.uri]

    with (
        servers.Server(servers.qcow2snap(image, "")) as ours,
        servers.Server(servers.qemu_nbd(image, "")[0]) as peer,
    ):
        _check_equal(client(ours.wait()), client(peer.wait()))
        return pairs.compare(
            "base:allocation, 1 TiB",
            lambda: pairs.run(client(ours))._replace(peak=ours.pss()),
            lambda: pairs.run(client(peer)),
            f"nbdinfo --map, {peer.name}",  # it reads metadata alone: no setting matters
            pairs=count,
            target=5.0,
        )


def _check_equal(ours: pairs.Command, peer: pairs.Command) -> None:
    with TemporaryDirectory(dir=images.CACHE) as folder:
        output = Path(folder) / "map.json"
        maps = []
        for command in ours, peer:
            pairs.run(command, stdout=output)
            maps.append(json.loads(output.read_bytes()))
    if maps[0] != maps[1]:
        raise pairs.BenchmarkError(f"{ours[0]} and {peer[0]} give different maps")
