"""`qcow2snap list`: the snapshot table, for people and as JSON, on demand with the space that each snapshot takes.

Needs neither backing nor data file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from qcow2snap.block.graph import OpenOptions
from qcow2snap.block.node import SnapshotInfo
from qcow2snap.block.snapshot_ref import shown
from qcow2snap.cli import options, text
from qcow2snap.forensics.listing import snapshot_json

if TYPE_CHECKING:
    from qcow2snap.conformance.usage import Usage


def usage_json(usage: Usage | None) -> dict[str, int | None]:
    """Bytes; null where the L1 table is damaged."""
    names = ("used", "refer", "shared")
    return {name: None if usage is None else getattr(usage, name) for name in names}


def snapshot_lines(snapshots: Sequence[SnapshotInfo], usages: Sequence[Usage | None] | None = None) -> list[str]:
    """The table for people. With usages, in the words and the order of `zfs list -t snapshot`."""
    columns = {
        "ID": [shown(s.id) for s in snapshots],
        "TAG": [shown(s.name) for s in snapshots],
        **({} if usages is None else usage_columns(usages)),
        "VM SIZE": [text.size(s.vm_state_size) for s in snapshots],
        "DISK SIZE": [text.size(s.size) for s in snapshots],
        "DATE": [text.date(s.date_sec) for s in snapshots],
        "VM CLOCK": [text.clock(s.vm_clock_nsec) for s in snapshots],
        "ICOUNT": ["--" if s.icount is None else str(s.icount) for s in snapshots],
    }
    return text.table(list(columns), list(zip(*columns.values(), strict=True)), left=("ID", "TAG"))


def usage_columns(usages: Sequence[Usage | None]) -> dict[str, list[str]]:
    """USED, REFER and SHARED of each; "-" where the L1 table is damaged."""
    return {
        name.upper(): ["-" if value is None else text.size(value) for value in (usage_json(u)[name] for u in usages)]
        for name in ("used", "refer", "shared")
    }


@click.command("list")
@options.image_argument
@options.json_option
@options.usage_option
@options.force_share_option
def command(image: str, as_json: bool, usage: bool, force_share: bool) -> int:
    """List the snapshots of IMAGE, each with its own disk size. Exit code 1 if some cannot be read."""
    node = options.open_for(image, OpenOptions(force_share), with_children=False)
    usages: Sequence[Usage | None] | None = None
    if usage:
        from qcow2snap.conformance.usage import usage_of

        usages = usage_of(node).snapshots
    snapshots = list(node.snapshots())
    if as_json:
        import json

        listed = [snapshot_json(snapshot) for snapshot in snapshots]
        if usages is not None:
            listed = [fields | usage_json(each) for fields, each in zip(listed, usages, strict=True)]
        print(json.dumps(listed, indent=4))
    elif snapshots:
        print("\n".join(snapshot_lines(snapshots, usages)))
    elif node.snapshot_table.damage is None:
        click.echo(f"qcow2snap: {image} has no snapshots", err=True)
    node.close()
    return 0 if node.snapshot_table.damage is None else 1
