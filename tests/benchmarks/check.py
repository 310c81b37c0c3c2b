"""The check of sound images, as whole processes: much metadata, many snapshots, and an ordinary image."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.benchmarks import images, pairs

_GIB = 1 << 30


def rows(quick: bool) -> Iterator[pairs.Row]:
    count = 3 if quick else 7
    large = 64 * _GIB if quick else 1 << 40
    snapshots = partial(images.shared_tables, *((16 * _GIB, 20) if quick else (256 * _GIB, 100)))
    ordinary = _GIB if quick else 10 * _GIB
    for what, build, target in (
        ("check, 100 snapshots", snapshots, 10.0),
        ("check, 1 TiB", partial(images.preallocated, large), 2.0),
        ("check, 10 GiB with two snapshots", partial(_ordinary, ordinary), 1.0),
        ("check, 10 GiB of metadata", partial(images.preallocated, ordinary), 1.0),
    ):
        yield pairs.Row(what, partial(_command, what, build, target, count))


def _ordinary(size: int) -> Path:
    image, _ = images.two_states(size, data=size // 8, changed=size // 64)
    return image


def _command(what: str, build: partial[Path], target: float, count: int) -> pairs.Comparison:
    image = build()
    return pairs.compare(
        what,
        partial(pairs.run, [pairs.QCOW2SNAP, "check", "--json", image]),
        partial(pairs.run, ["qemu-img", "check", "--output=json", image]),
        "qemu-img check --output=json",
        pairs=count,
        target=target,
    )
