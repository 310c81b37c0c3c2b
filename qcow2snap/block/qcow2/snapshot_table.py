"""The snapshot table: bytes -> entries, as many as can be read. A damaged entry never hides those before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from formats import qcow2 as layout
from qcow2snap.block.file import FileNode
from qcow2snap.block.node import ImageFormatError, SnapshotInfo
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader, as_text

_READ_SIZE = 1 << 16
_VARIABLE_SIZES = (12, 14), (14, 16), (36, 40)  # where id_str_size, name_size and extra_data_size stand


class TableEntry(NamedTuple):
    """One entry: what is told of the snapshot, where its L1 table is, and the bytes as they stand in the file."""

    info: SnapshotInfo
    l1_table_offset: int
    l1_size: int  # entries
    raw: bytes


class SnapshotTable(NamedTuple):
    """What could be read of the table, and the error that ended the reading before its end."""

    entries: tuple[TableEntry, ...]
    damage: ImageFormatError | None = None


def read_snapshot_table(file: FileNode, header: ImageHeader) -> SnapshotTable:
    """Read the table entry by entry, up to its end or to the first that is no entry. Raises FileError only."""
    return parse_table(*read_raw_table(file, header), header)


def read_raw_table(file: FileNode, header: ImageHeader) -> tuple[list[tuple[int, bytes]], ImageFormatError | None]:
    """The same, as the entries stand in the file, at a hundredth of the cost; and the error that ended the reading."""
    entries: list[tuple[int, bytes]] = []
    try:
        for entry in raw_entries(file, header):
            entries.append(entry)  # one by one: what comes before the damage counts
    except ImageFormatError as damage:
        return entries, damage
    return entries, None


def parse_table(
    entries: list[tuple[int, bytes]], damage: ImageFormatError | None, header: ImageHeader
) -> SnapshotTable:
    parsed = (parse_entry(raw, header, index, position) for index, (position, raw) in enumerate(entries))
    return SnapshotTable(tuple(parsed), damage)


def raw_entries(file: FileNode, header: ImageHeader) -> Iterator[tuple[int, bytes]]:
    """Where each entry starts in the file, and its bytes, padding and all. Not an entry: ImageFormatError."""
    window = TableWindow(file)
    position = header.snapshots_offset
    if header.nb_snapshots and position % header.cluster_size:
        raise rules.HEADER_SNAPSHOTS.broken(64, f"the snapshot table is at {position:#x}, not a cluster boundary")
    for index in range(header.nb_snapshots):
        if index == layout.MAX_SNAPSHOTS:
            raise rules.HEADER_SNAPSHOTS.broken(60, f"{header.nb_snapshots} snapshots are more than {index}")
        raw = _read_entry(window, header, position, index)
        yield position, raw
        position += len(raw)


def used_size(raw: bytes) -> int:
    """Bytes of an entry without its padding, from its first SNAPSHOT_HEADER_LENGTH bytes."""
    return layout.SNAPSHOT_HEADER_LENGTH + sum(int.from_bytes(raw[a:b], "big") for a, b in _VARIABLE_SIZES)


def _read_entry(window: TableWindow, header: ImageHeader, position: int, index: int) -> bytes:
    what = f"snapshot {index + 1} of {header.nb_snapshots}"
    fixed = window.read(position, layout.SNAPSHOT_HEADER_LENGTH)
    if len(fixed) < layout.SNAPSHOT_HEADER_LENGTH:
        raise rules.SNAPSHOT_COMPLETE.broken(position, f"the file ends within the table entry of {what}")
    if not any(fixed):  # an L1 table cannot be where the header is
        raise rules.SNAPSHOT_L1_OFFSET.broken(position, f"the table entry of {what} is all zeros; it has been lost")
    extra_data_size = int.from_bytes(fixed[36:40], "big")
    if extra_data_size > layout.MAX_SNAPSHOT_EXTRA_DATA_SIZE:
        raise rules.SNAPSHOT_EXTRA_DATA.broken(
            position + 36, f"{what} has {extra_data_size} bytes of extra data, more than 1024"
        )
    used = used_size(fixed)
    length = used + -used % 8
    if position + length - header.snapshots_offset > layout.MAX_SNAPSHOT_TABLE_SIZE:
        raise rules.SNAPSHOT_TABLE_SIZE.broken(position, f"with {what} the snapshot table exceeds 64 MiB")
    raw = window.read(position, length)
    if len(raw) < used:
        raise rules.SNAPSHOT_COMPLETE.broken(position, f"the file ends within the table entry of {what}")
    return raw.ljust(length, b"\0")  # the padding of the last entry need not be in the file


def parse_entry(raw: bytes, header: ImageHeader, index: int, position: int) -> TableEntry:
    """What a whole entry says; nothing is judged."""
    fields = layout.SnapshotTableEntry.parse(raw)
    large = fields.vm_state_size_large
    info = SnapshotInfo(
        id=as_text(fields.id_str),
        name=as_text(fields.name),
        # Version 2 entries may lack the size: then it is the active disk's.
        size=header.size if fields.disk_size is None else fields.disk_size,
        vm_state_size=fields.vm_state_size if large is None else large,
        date_sec=fields.date_sec,
        date_nsec=fields.date_nsec,
        vm_clock_nsec=fields.vm_clock_nsec,
        icount=None if fields.icount in (None, layout.ICOUNT_OFF) else fields.icount,
        position=index,
        host_offset=position,
    )
    return TableEntry(info, fields.l1_table_offset, fields.l1_size, raw)


class TableWindow:
    """A stretch of the file, moved on when the next entry might not be in it: few reads for many small entries."""

    def __init__(self, file: FileNode) -> None:
        self._file = file
        self._start = 0
        self._data = b""

    def read(self, position: int, length: int) -> bytes:
        """`length` bytes at `position`, less only where the file ends."""
        start = position - self._start
        if start < 0 or start + length > len(self._data):
            self._start, start = position, 0
            self._data = self._file.pread_available(position, max(length, _READ_SIZE))
        return self._data[start : start + length]
