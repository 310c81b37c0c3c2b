"""A snapshot copied to a raw file: `qcow2snap extract` against `qemu-img convert -l` at its best options."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks import images, pairs

# How many times as fast as qemu-img we want to be, by the compression of the image.
TARGETS = {"none": 1.2, "zlib": 2.0, "zstd": 1.5}

# What may make qemu-img faster; which does depends on the image and the machine. Left out: -S 0, which fills the holes.
PEER_OPTIONS = [
    ["-m", "1"],
    ["-m", "16"],
    ["-m", "16", "-W"],
    ["-m", "16", "-W", "-C"],
    ["-m", "16", "-W", "-S", "64k"],
    ["-m", "16", "-W", "-t", "none"],
    ["-m", "16", "-W", "-T", "none"],
]


def rows(quick: bool) -> Iterator[pairs.Row]:
    size = 256 << 20 if quick else 2 << 30
    for compression, target in TARGETS.items():
        what = f"extract, {compression}"
        yield pairs.Row(what, partial(_compare, what, size, compression, target, 3 if quick else 5))


def touch_memory(size: int, path: Path) -> None:
    """Have as much memory as a file takes in the page cache, and let go of it."""
    piece = bytes(1 << 20)
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // len(piece)):
            file.write(piece)
    path.unlink()


def _compare(what: str, size: int, compression: str, target: float, count: int) -> pairs.Comparison:
    image = images.fragmented(size, compression)
    with TemporaryDirectory(dir=images.CACHE) as folder:
        ours, theirs = Path(folder) / "ours.raw", Path(folder) / "theirs.raw"

        def clear() -> None:
            """So that no run pays for the files of another, nor for memory that a host has taken back meanwhile."""
            ours.unlink(missing_ok=True)
            theirs.unlink(missing_ok=True)
            os.sync()
            touch_memory(size, Path(folder) / "touched")

        def peer(options: list[str]) -> pairs.Run:
            named = f"snapshot.name={images.SNAPSHOT}"
            return pairs.run(["qemu-img", "convert", *options, "-l", named, "-O", "raw", image, theirs])

        def trial(options: list[str]) -> float:
            clear()
            return peer(options).figure

        peer([])  # the image is in the page cache from here on
        best = min(PEER_OPTIONS, key=lambda options: min(trial(options), trial(options)))

        extract = partial(pairs.run, [pairs.QCOW2SNAP, "extract", "-s", images.SNAPSHOT, image, ours])
        clear()
        extract()
        peer(best)
        if not filecmp.cmp(ours, theirs, shallow=False):
            raise pairs.BenchmarkError(f"extract and qemu-img convert -l differ on {image}")
        return pairs.compare(
            what, extract, partial(peer, best), f"convert {' '.join(best)}", pairs=count, before=clear, target=target
        )
