"""A second reader of headers and snapshot tables, written from the specification alone, to judge the first one.

It also rewrites a table, for names and sizes that no QEMU tool would store. For sound images only: it checks nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

ENTRY = struct.Struct(">QIHHIIQII")  # section "Snapshots", bytes 0-39
EXTRA = struct.Struct(">QQ")  # bytes 40-55: VM state size, virtual disk size


@dataclass
class Entry:
    """One entry of a snapshot table; every field may be changed before it is written back."""

    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int  # the 32-bit field
    extra: bytes
    id: bytes
    name: bytes
    host_offset: int = 0

    @property
    def disk_size(self) -> int | None:
        return int(EXTRA.unpack_from(self.extra)[1]) if len(self.extra) >= EXTRA.size else None

    @disk_size.setter
    def disk_size(self, size: int) -> None:
        state, _ = EXTRA.unpack_from(self.extra)
        self.extra = EXTRA.pack(state, size) + self.extra[EXTRA.size :]

    @property
    def full_vm_state_size(self) -> int:
        return int(EXTRA.unpack_from(self.extra)[0]) if len(self.extra) >= 8 else self.vm_state_size

    def build(self) -> bytes:
        fixed = ENTRY.pack(
            self.l1_table_offset,
            self.l1_size,
            len(self.id),
            len(self.name),
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            self.vm_state_size,
            len(self.extra),
        )
        body = fixed + self.extra + self.id + self.name
        return body + bytes(-len(body) % 8)


def field(image: Path, offset: int, size: int = 8) -> int:
    """A big-endian number of the file."""
    with image.open("rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(size), "big")


def patch(image: Path, offset: int, data: bytes) -> None:
    """Replace bytes of the file in place."""
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def cluster_size(image: Path) -> int:
    return 1 << field(image, 20, 4)


def read_table(image: Path) -> list[Entry]:
    """The entries of the snapshot table, in its order."""
    count, position = field(image, 60, 4), field(image, 64)
    entries = []
    with image.open("rb") as file:
        for _ in range(count):
            file.seek(position)
            l1_offset, l1_size, id_size, name_size, sec, nsec, clock, state, extra_size = ENTRY.unpack(
                file.read(ENTRY.size)
            )
            extra, id_, name = file.read(extra_size), file.read(id_size), file.read(name_size)
            entries.append(Entry(l1_offset, l1_size, sec, nsec, clock, state, extra, id_, name, position))
            position += (ENTRY.size + extra_size + id_size + name_size + 7) // 8 * 8
    return entries


def write_table(image: Path, entries: list[Entry]) -> None:
    """Put a new table at the end of the file and let the header point to it. Refcounts are left as they were."""
    cluster = cluster_size(image)
    offset = -(-image.stat().st_size // cluster) * cluster
    table = b"".join(entry.build() for entry in entries)
    patch(image, offset, table + bytes(-len(table) % cluster))
    patch(image, 60, struct.pack(">IQ", len(entries), offset))
