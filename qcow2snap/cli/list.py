"""`qcow2snap list`: the snapshot table, for people and as JSON. Needs neither backing nor data file."""

from __future__ import annotations

import click

from qcow2snap.block.graph import OpenOptions
from qcow2snap.block.node import SnapshotInfo
from qcow2snap.block.snapshot_ref import shown
from qcow2snap.cli import options, text


def snapshot_json(snapshot: SnapshotInfo) -> dict[str, object]:
    """A snapshot with qemu-img's field names, and its own disk size."""
    fields: dict[str, object] = {
        "id": text.json_text(snapshot.id),
        "name": text.json_text(snapshot.name),
        "vm-state-size": snapshot.vm_state_size,
        "disk-size": snapshot.size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
    }
    if snapshot.icount is not None:
        fields["icount"] = snapshot.icount
    return fields


def snapshot_lines(snapshots: list[SnapshotInfo]) -> list[str]:
    """The table for people."""
    headings = ("ID", "TAG", "VM SIZE", "DISK SIZE", "DATE", "VM CLOCK", "ICOUNT")
    rows = [
        (
            shown(s.id),
            shown(s.name),
            text.size(s.vm_state_size),
            text.size(s.size),
            text.date(s.date_sec),
            text.clock(s.vm_clock_nsec),
            "--" if s.icount is None else str(s.icount),
        )
        for s in snapshots
    ]
    return text.table(headings, rows, left=("ID", "TAG"))


@click.command("list")
@options.image_argument
@options.json_option
@options.force_share_option
def command(image: str, as_json: bool, force_share: bool) -> int:
    """List the snapshots of IMAGE, each with its own disk size. Exit code 1 if some cannot be read."""
    node = options.open_for(image, OpenOptions(force_share), with_children=False)
    snapshots = list(node.snapshots())
    if as_json:
        import json

        print(json.dumps([snapshot_json(snapshot) for snapshot in snapshots], indent=4))
    elif snapshots:
        print("\n".join(snapshot_lines(snapshots)))
    elif node.snapshot_table.damage is None:
        click.echo(f"qcow2snap: {image} has no snapshots", err=True)
    node.close()
    return 0 if node.snapshot_table.damage is None else 1
