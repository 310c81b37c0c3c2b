"""Images that a VM writes while we read: finding a snapshot's table entry again after each read of it. Reads no data.

An image that is not locked against writers loses snapshots while they are read, and what belonged to a snapshot is used
again within milliseconds. What is read is right all the same if the snapshot still stood afterwards:

1. While a snapshot exists, QEMU changes nothing that it refers to: not its L1 table, no data, and of its L2 tables
   only COPIED flags, which a reader does not look at.
2. When QEMU deletes one, it writes the new snapshot table into free clusters, then the header's pointer to the table
   (12 bytes at 60, in one write) and waits for that; only then it frees, punches or overwrites what the snapshot had
   (qcow2_snapshot_delete, qcow2_write_snapshots).
3. So whoever reads, copies what was read, and then reads the pointer and finds the entry in that table, has read before
   anything was freed. A pointer that is half new is one whose write has not ended: nothing is freed then either.
4. Nothing but the whole entry will do. Name, id, the place of the table and that of the L1 table come again when a
   snapshot is made as another is deleted; date and VM clock do not. An entry moves when others go, and where QEMU
   writes it anew it pads it with whatever lay there, and gives it the extra data that older versions left out.

Which snapshots there are, and that one is gone, is believed only of a sound table that was seen twice the same. One
that does not parse is a race: an old table is freed at once, and may be zeros, or half of a newer one, when it is read
by an older pointer. Then we look again, up to TRIES times.

Caches hold tables and clusters by their place in the file, unchecked, shared by all snapshots. That is sound for this
reason: a cache is made after a look at the snapshot table, and serves only snapshots that were in it. What it holds was
read later; and as long as such a snapshot stands, whatever it refers to has stayed as it was from that look on, whoever
it was read for. A new snapshot may refer to a cluster that was something else when it was cached: so a look that finds
new ones begins with empty caches. No reader is handed anything before its own snapshot was found again.

Where this ends:
- The writer has to be QEMU, or to keep its order of writes. Images replaced or restored in place are no such thing.
- Reader and VM run on one host and open one file system mount: page cache and O_DIRECT are coherent there, of regular
  files. A block device's page cache is not, with O_DIRECT and asynchronous I/O: there it is dropped before each read
  (FileNode). Over NFS and the like from two hosts nothing is promised.
- Pages given away by reference (sendfile, splice) are not copies. Only stable files may be read so.
- The active disk changes while it is read. A backing or data file belongs to no snapshot: one that is written, as by a
  block commit, changes what is read through it, and nothing here notices.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from construct import Container

from formats import qcow2 as layout
from qcow2snap.block.file import FileNode
from qcow2snap.block.node import FileError, ImageFormatError, ImageInUse, SnapshotGone
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.snapshot_table import (
    SnapshotTable,
    TableEntry,
    parse_table,
    raw_entries,
    read_raw_table,
    used_size,
)

TRIES = 200  # looks at a table that is being changed
PAUSE = 0.001  # seconds between two of them
PATIENCE = 5.0  # seconds for all of them: a hostile table may have 65,536 entries
DAMAGED = 10  # looks that have to find a table unreadable in the same place, until that is damage and no race

_POINTER_OFFSET = 60  # nb_snapshots and snapshots_offset of the header
_POINTER_SIZE = 12


class Look(NamedTuple):
    """The header's pointer to the snapshot table, and what was there."""

    pointer: bytes
    table: SnapshotTable


def look_at_table(file: FileNode, header: ImageHeader) -> Look:
    """The snapshot table as it stands now; as far as it can be read, if it is damaged. Raises FileError, ImageInUse."""
    last, times = None, 0
    for _ in _looks():
        pointer = _read_pointer(file)
        header = pointing(header, pointer)
        entries, damage = read_raw_table(file, header)
        seen = pointer, entries, damage is None
        times = times + 1 if seen == last else 1
        if times == (2 if damage is None else DAMAGED):
            return Look(pointer, parse_table(entries, damage, header))
        last = seen
    raise _kept_changing(file)


def _looks() -> Iterator[None]:
    """One after the other at once, then with pauses, for as long as a race may last."""
    deadline = time.monotonic() + PATIENCE
    for attempt in range(TRIES):
        if attempt > 1:
            if time.monotonic() > deadline:
                return
            time.sleep(PAUSE)
        yield


def pointing(header: ImageHeader, pointer: bytes) -> ImageHeader:
    """The header with another pointer to the snapshot table."""
    nb_snapshots, offset = int.from_bytes(pointer[:4], "big"), int.from_bytes(pointer[4:], "big")
    return header._replace(nb_snapshots=nb_snapshots, snapshots_offset=offset)


def is_same_snapshot(old: bytes, new: bytes) -> bool:
    """Whether an entry is another one as QEMU would write it into a new table."""
    if old[: used_size(old)] == new[: used_size(new)]:
        return True
    if old[:12] != new[:12] or old[16:32] != new[16:32]:  # L1 table; date and VM clock
        return False
    before, after = layout.SnapshotTableEntry.parse(old), layout.SnapshotTableEntry.parse(new)
    return _carried_over(before) == _carried_over(after) and before.disk_size in (None, after.disk_size)


class Watch(Protocol):
    """Knows whether a snapshot still stands."""

    def confirm(self) -> None:
        """Return if all that was copied from the snapshot before this call is right. Otherwise SnapshotGone."""


class SnapshotWatch:
    """Whether one snapshot still stands.

    threads  any
    errors   SnapshotGone, from the first time on for ever; ImageInUse if the table never held still; FileError
    cost     two small reads, as long as the table stays where it is
    """

    def __init__(self, file: FileNode, header: ImageHeader, entry: TableEntry, pointer: bytes) -> None:
        self._file = file
        self._header = header
        self._snapshot = entry.info
        self._raw = entry.raw
        # What is where, while nothing has changed. Threads replace it as a whole.
        self._place = pointer, entry.info.host_offset, entry.raw[: used_size(entry.raw)]
        self._gone = False

    def confirm(self) -> None:
        """Return if the snapshot stood when this was called: then all that was copied from it before is right."""
        if not self._gone:
            pointer, offset, raw = self._place
            pread = self._file.pread_available
            if pread(_POINTER_OFFSET, _POINTER_SIZE) == pointer and pread(offset, len(raw)) == raw:
                return
            self._find_again()
        if self._gone:
            raise SnapshotGone(f"{self._file.filename}: snapshot {self._snapshot} was deleted from the image meanwhile")

    def _find_again(self) -> None:
        """Find where the entry is now, or that it is gone."""
        last = None  # a hash of pointer and entries of a sound table without this one, seen in the last look
        for _ in _looks():
            pointer = _read_pointer(self._file)
            seen = hash(pointer)
            try:
                for position, raw in raw_entries(self._file, pointing(self._header, pointer)):
                    if is_same_snapshot(self._raw, raw):
                        self._place = pointer, position, raw[: used_size(raw)]
                        return
                    seen = hash((seen, raw))
            except ImageFormatError:
                last = None
                continue
            if seen == last:
                self._gone = True
                return
            last = seen
        raise _kept_changing(self._file)


def _read_pointer(file: FileNode) -> bytes:
    pointer = file.pread_available(_POINTER_OFFSET, _POINTER_SIZE)
    if len(pointer) < _POINTER_SIZE:
        raise FileError(f"{file.filename}: the file was cut while it was read")
    return pointer


def _carried_over(entry: Container) -> tuple[object, ...]:
    """What QEMU keeps of an entry, whatever extra data it had."""
    large = entry.vm_state_size_large
    return (
        entry.id_str,
        entry.name,
        entry.vm_state_size if large is None else large,
        layout.ICOUNT_OFF if entry.icount is None else entry.icount,
    )


def _kept_changing(file: FileNode) -> ImageInUse:
    return ImageInUse(f"{file.filename}: its snapshot table kept changing, or is damaged; try again")
