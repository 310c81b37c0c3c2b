"""`qcow2snap map`: the extents of the active disk or a snapshot, as `qemu-img map` writes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from qcow2snap.block.graph import OpenOptions
from qcow2snap.block.node import Extent, Status
from qcow2snap.block.snapshot_ref import shown
from qcow2snap.cli import options, text


@click.command("map")
@options.image_argument
@options.snapshot_option
@click.option("--vm-state", is_flag=True, help="The VM state saved with the snapshot, not its disk.")
@options.range_options
@options.json_option
@options.opening_options
def command(
    image: str,
    snapshot: str | None,
    vm_state: bool,
    start_offset: int,
    max_length: int | None,
    as_json: bool,
    opening: OpenOptions,
) -> None:
    """Show which parts of a disk or snapshot of IMAGE are allocated, and where they lie."""
    disk = options.open_for(image, opening)
    node = options.choose(disk, snapshot, vm_state)
    extents = node.block_status(start_offset, options.length_within(node.size, start_offset, max_length))
    sys.stdout.writelines(text.json_array(_json(extents)) if as_json else _human(extents))
    disk.close()


def _json(extents: Iterator[Extent]) -> Iterator[str]:
    """Objects as qemu-img spells them."""
    for extent in extents:
        status = int(extent.status)
        offset = "" if extent.file is None else f', "offset": {extent.file_offset}'
        yield (
            f'{{ "start": {extent.offset}, "length": {extent.length}, "depth": {extent.depth}, '
            f'"present": {_BOOL[status & Status.ALLOCATED]}, "zero": {_BOOL[status & Status.ZERO]}, '
            f'"data": {_BOOL[status & Status.DATA]}{offset}}}'
        )


_BOOL = {0: "false", int(Status.ALLOCATED): "true", int(Status.ZERO): "true", int(Status.DATA): "true"}


def _human(extents: Iterator[Extent]) -> Iterator[str]:
    """What has to be read, and where it lies; holes and zeros are left out, as in qemu-img."""
    yield f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n"
    for extent in extents:
        if not extent.must_read:
            continue
        if extent.file is not None:
            mapped, name = f"{extent.file_offset:#x}", shown(extent.file.filename)
        else:
            mapped, name = "compressed" if extent.status & Status.COMPRESSED else "encrypted", "-"
        yield f"{extent.offset:<#16x}{extent.length:<#16x}{mapped:<16}{name}\n"
