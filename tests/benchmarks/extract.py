"""A snapshot copied to a raw file: `qcow2snap extract` against `qemu-img convert -l` at its best options."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator
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


def comparisons(quick: bool) -> Iterator[pairs.Comparison]:
    size = 256 << 20 if quick else 2 << 30
    for compression, target in TARGETS.items():
        image = images.fragmented(size, compression)
        with TemporaryDirectory(dir=images.CACHE) as folder:
            yield _compare(image, Path(folder), f"extract, {compression}", target, 3 if quick else 5)


def _compare(image: Path, folder: Path, what: str, target: float, count: int) -> pairs.Comparison:
    ours, theirs = folder / "ours.raw", folder / "theirs.raw"

    def clear() -> None:
        """So that no run pays for the files of another."""
        ours.unlink(missing_ok=True)
        theirs.unlink(missing_ok=True)
        os.sync()

    def peer(options: list[str]) -> pairs.Command:
        return ["qemu-img", "convert", *options, "-l", f"snapshot.name={images.SNAPSHOT}", "-O", "raw", image, theirs]

    def trial(options: list[str]) -> float:
        clear()
        return pairs.run(peer(options)).seconds

    pairs.run(peer([]))  # the image is in the page cache from here on
    best = min(PEER_OPTIONS, key=lambda options: min(trial(options), trial(options)))

    command: pairs.Command = [pairs.QCOW2SNAP, "extract", "-s", images.SNAPSHOT, image, ours]
    clear()
    pairs.run(command)
    pairs.run(peer(best))
    if not filecmp.cmp(ours, theirs, shallow=False):
        raise pairs.BenchmarkError(f"extract and qemu-img convert -l differ on {image}")
    return pairs.compare(
        f"{what} | convert {' '.join(best)}", command, peer(best), pairs=count, before=clear, at_least=target
    )
