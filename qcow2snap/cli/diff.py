"""`qcow2snap diff`: which bytes differ between two snapshots, or a snapshot and the active disk, and how."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from qcow2snap.block.graph import OpenOptions
from qcow2snap.block.node import BlockNode, ChangedExtent
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.block.snapshot_access import SnapshotAccessNode
from qcow2snap.cli import options, text
from qcow2snap.cli.progress import ProgressBar
from qcow2snap.cli.signals import ended_by_signals


@click.command("diff")
@options.image_argument
@click.argument("since", metavar="A")
@click.argument("state", metavar="[B]", required=False)
@click.option("--verify", is_flag=True, help="Read both, and leave out what was written again with the same bytes.")
@options.range_options
@options.json_option
@options.opening_options
def command(
    image: str,
    since: str,
    state: str | None,
    verify: bool,
    start_offset: int,
    max_length: int | None,
    as_json: bool,
    opening: OpenOptions,
) -> int:
    """Show which bytes of IMAGE differ between snapshot A and snapshot B, or the active disk if there is no B.

    Told by the image's tables, without reading data; bytes that were written again are shown too, --verify drops them.
    Changes: data (other bytes), became-zero, was-zero, size (beyond the end of one of the two).

    Exit codes: 0 the same, 1 different, 2 could not.
    """
    disk = options.open_for(image, opening)
    snapshots = disk.find_snapshot(since), None if state is None else disk.find_snapshot(state)
    older, newer = (disk if snapshot is None else SnapshotAccessNode(disk, snapshot) for snapshot in snapshots)
    size = max(older.size, newer.size)
    length = options.length_within(size, start_offset, max_length)
    changes = disk.changes(*snapshots, start_offset, length)
    to_read = sum(extent.length for extent in disk.changes(*snapshots, start_offset, length)) if verify else 0
    with ended_by_signals(), ProgressBar("diff", to_read, wanted=verify and not sys.stdout.isatty()) as bar:
        extents = _Counted(_verified(disk, changes, older, newer, bar) if verify else changes)
        sys.stdout.writelines(text.json_array(_json(extents)) if as_json else _human(extents))
    disk.close()
    return 1 if extents.count else 0


def _verified(
    disk: Qcow2Node, changes: Iterator[ChangedExtent], older: BlockNode, newer: BlockNode, bar: ProgressBar
) -> Iterator[ChangedExtent]:
    from qcow2snap.forensics.diff import verified  # only here: threads, and numpy for the reading

    return verified(changes, older, newer, disk.header.subcluster_size, progress=bar.advance)


class _Counted:
    """An iterator that knows how many it gave."""

    def __init__(self, extents: Iterator[ChangedExtent]) -> None:
        self._extents = extents
        self.count = 0

    def __iter__(self) -> Iterator[ChangedExtent]:
        for extent in self._extents:
            self.count += 1
            yield extent


def _json(extents: _Counted) -> Iterator[str]:
    """Objects as `map` writes them."""
    for offset, length, change in extents:
        yield f'{{ "start": {offset}, "length": {length}, "change": "{change.value}"}}'


def _human(extents: _Counted) -> Iterator[str]:
    """A table, its heading only where there is something below it."""
    for offset, length, change in extents:
        if extents.count == 1:
            yield f"{'Offset':<16}{'Length':<16}Change\n"
        yield f"{offset:<#16x}{length:<#16x}{change.value}\n"
