"""A snapshot as programs read of it: qemu-img's field names, and its own disk size."""

from __future__ import annotations

from qcow2snap.block.node import SnapshotInfo


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


def json_text(text: str) -> str:
    """A name for JSON, which can hold all but bytes that are not UTF-8: these escaped as \\xNN."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
