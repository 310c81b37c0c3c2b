"""A snapshot as programs read of it: qemu-img's field names, and its own disk size."""

from __future__ import annotations

from qcow2snap.block.node import SnapshotInfo
from qcow2snap.block.snapshot_ref import json_text


def snapshot_json(snapshot: SnapshotInfo) -> dict[str, object]:
    """A snapshot with qemu-img's field names, and its own disk size."""
    fields: dict[str, object] = {
        "id": json_text(snapshot.id),
        "name": json_text(snapshot.name),
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
