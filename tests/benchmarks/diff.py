"""What differs between two snapshots: `qcow2snap diff` against two `qemu-nbd -l` and `qemu-img compare`.

Whole processes on both sides: the servers that the peer needs are started and ended in its time. What the peer tells is
less, that there is a difference and where the first one is; it has to be where ours is, and ours all that was made.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks import images, pairs, servers

_CHANGED = 256 << 20  # bytes


def rows(quick: bool) -> Iterator[pairs.Row]:
    if not pairs.offers("diff", "--json"):
        return
    sizes = {256 << 20: None, 1 << 30: None} if quick else {2 << 30: 20.0, 64 << 30: 100.0}
    for size, target in sizes.items():
        what = f"diff, {size >> 20} MiB" if quick else f"diff, {size >> 30} GiB"
        yield pairs.Row(what, partial(_compare, what, size, target, quick))


def _compare(what: str, size: int, target: float | None, quick: bool) -> pairs.Comparison:
    image, expected = images.two_states(size, min(size * 7 // 8, 8 << 30), _CHANGED // 8 if quick else _CHANGED)
    ours: pairs.Command = [pairs.QCOW2SNAP, "diff", image, "monday", "tuesday", "--json"]
    with TemporaryDirectory(dir=images.CACHE) as folder:
        output = Path(folder) / "diff.json"
        pairs.run(ours, stdout=output, status=1)
        found = images.joined((extent["start"], extent["length"]) for extent in json.loads(output.read_bytes()))
    if found != expected:
        raise pairs.BenchmarkError(f"diff finds {len(found)} extents in {image}, not the {len(expected)} that differ")

    def peer(number: int) -> pairs.Run:
        started = time.perf_counter()
        with (
            servers.Server(servers.qemu_nbd(image, "monday")[number]) as monday,
            servers.Server(servers.qemu_nbd(image, "tuesday")[number]) as tuesday,
        ):
            monday.wait()
            tuesday.wait()
            command = ["qemu-img", "compare", "-f", "raw", "-F", "raw", monday.uri, tuesday.uri]
            said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
            seconds = time.perf_counter() - started
        first = re.fullmatch(r"Content mismatch at offset (\d+)!\n", said)
        if first is None or not 0 <= int(first[1]) - expected[0][0] < expected[0][1]:
            raise pairs.BenchmarkError(f"qemu-img compare of {image} says: {said}")
        return pairs.Run(seconds)

    settings = servers.qemu_nbd(image, "monday")
    best = min(range(len(settings)), key=lambda number: peer(number).figure)
    return pairs.compare(
        what,
        partial(pairs.run, ours, status=1),
        partial(peer, best),
        f"qemu-img compare, {settings[best].name}",
        pairs=3,
        target=target,
    )
