"""The map of a large disk that has all of its metadata and no data: `qcow2snap map` against `qemu-img map`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks import images, pairs


def comparisons(quick: bool) -> Iterator[pairs.Comparison]:
    image = images.preallocated(64 << 30 if quick else 1 << 40)
    ours: pairs.Command = [pairs.QCOW2SNAP, "map", "--json", image]
    peer: pairs.Command = ["qemu-img", "map", "--output=json", image]
    with TemporaryDirectory(dir=images.CACHE) as folder:
        if _output(ours, Path(folder)) != _output(peer, Path(folder)):
            raise pairs.BenchmarkError(f"map --json and qemu-img map differ on {image}")
    yield pairs.compare("map --json | map --output=json", ours, peer, pairs=3 if quick else 7, at_least=3.0)


def _output(command: pairs.Command, folder: Path) -> object:
    output = folder / "map.json"
    pairs.run(command, stdout=output)
    return json.loads(output.read_bytes())
