"""A snapshot copied to a qcow2 image: `qcow2snap extract -O qcow2 [-c]` against `qemu-img convert -O qcow2 [-c]`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks import images, pairs
from tests.benchmarks.extract import touch_memory

# The target's flags, by what the source is: whose clusters are copied, and how they are stored.
CASES = {
    "none to none": ("none", [], 1.0),
    "none to zlib": ("none", ["-c"], 1.5),
    "none to zstd": ("none", ["-c", "-o", "compression_type=zstd"], 1.0),
    "zlib to zlib": ("zlib", ["-c"], 1.5),
}

# What may make qemu-img faster. -W: out of order; compressed clusters are written in parallel only with it.
PEER_OPTIONS = [["-m", "8"], ["-m", "16", "-W"], ["-m", "16", "-W", "-S", "64k"]]


def rows(quick: bool) -> Iterator[pairs.Row]:
    # Copied without compression, 512 MiB take no longer than Python does to start.
    for case, (source, flags, target) in CASES.items():
        size = (128 if quick else 512 if flags else 2048) << 20
        what = f"extract -O qcow2, {case}"
        yield pairs.Row(what, partial(_compare, what, size, source, flags, target, 3))


def _compare(what: str, size: int, source: str, flags: list[str], target: float, count: int) -> pairs.Comparison:
    image = images.fragmented(size, source)
    with TemporaryDirectory(dir=images.CACHE) as folder:
        ours, theirs = Path(folder) / "ours.qcow2", Path(folder) / "theirs.qcow2"

        def clear() -> None:
            ours.unlink(missing_ok=True)
            theirs.unlink(missing_ok=True)
            os.sync()
            touch_memory(size, Path(folder) / "touched")

        def peer(options: list[str]) -> pairs.Run:
            named = f"snapshot.name={images.SNAPSHOT}"
            return pairs.run(["qemu-img", "convert", *options, "-l", named, *flags, "-O", "qcow2", image, theirs])

        def trial(options: list[str]) -> float:
            clear()
            return peer(options).figure

        peer([])  # the image is in the page cache from here on
        best = min(PEER_OPTIONS, key=trial)
        words = [pairs.QCOW2SNAP, "extract", "-s", images.SNAPSHOT, "-O", "qcow2", *flags, image, ours]
        extract = partial(pairs.run, words)
        clear()
        extract()
        peer(best)
        pairs.run(["qemu-img", "check", ours])
        pairs.run(["qemu-img", "compare", ours, theirs])
        return pairs.compare(
            what, extract, partial(peer, best), f"convert {' '.join(best)}", pairs=count, before=clear, target=target
        )
