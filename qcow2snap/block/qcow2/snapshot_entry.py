"""One entry of the snapshot table, as bytes: made, and given another name. Reading entries is snapshot_table's."""

from __future__ import annotations

from typing import Any

from formats import qcow2 as layout

EXTRA_DATA_SIZE = 24  # bytes: VM state size, disk size and icount
MAX_NAME_SIZE = 255  # bytes; QEMU reads no more of a name


def new_entry(
    *,
    id_: str,
    name: bytes,
    l1_table_offset: int,
    l1_size: int,
    disk_size: int,
    date_sec: int,
    date_nsec: int,
    vm_clock_nsec: int = 0,
) -> bytes:
    """An entry with all the extra data that version 3 asks for. No VM state, and record/replay off."""
    fields = {
        "l1_table_offset": l1_table_offset,
        "l1_size": l1_size,
        "id_str_size": len(id_),
        "name_size": len(name),
        "date_sec": date_sec,
        "date_nsec": date_nsec,
        "vm_clock_nsec": vm_clock_nsec,
        "vm_state_size": 0,
        "extra_data_size": EXTRA_DATA_SIZE,
        "vm_state_size_large": 0,
        "disk_size": disk_size,
        "icount": layout.ICOUNT_OFF,
        "unknown_extra_data": b"",
        "id_str": id_.encode(),
        "name": name,
    }
    return _built(fields)


def renamed(raw: bytes, name: bytes) -> bytes:
    """The same entry under another name; all else as it was, known or not."""
    return _built(dict(layout.SnapshotTableEntry.parse(raw)) | {"name": name, "name_size": len(name)})


def next_id(ids: list[str]) -> str:
    """The id that QEMU would give the next snapshot: one more than the largest that begins with a number."""
    largest = 0
    for id_ in ids:
        digits = id_[: len(id_) - len(id_.lstrip("0123456789"))]
        largest = max(largest, int(digits or "0"))
    return str(largest + 1)


def _built(fields: dict[str, Any]) -> bytes:
    variable = sum(fields[size] for size in ("extra_data_size", "id_str_size", "name_size"))
    padding = bytes(-(layout.SNAPSHOT_HEADER_LENGTH + variable) % 8)
    built: bytes = layout.SnapshotTableEntry.build(fields | {"padding": padding})
    return built
