"""What one look at the snapshot table found, and all that has been read since: L1 tables, and the caches below them.

`in_use` says why these go together where somebody may write the image, and begin anew with another look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from formats import qcow2 as layout
from qcow2snap.block.file import FileNode
from qcow2snap.block.lru import BoundedCache
from qcow2snap.block.node import ImageFormatError, SnapshotGone, SnapshotInfo, SnapshotNotFound
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader, judge_active_l1
from qcow2snap.block.qcow2.in_use import Look, SnapshotWatch, Watch, is_same_snapshot
from qcow2snap.block.qcow2.l1 import RawL1Table, read_l1
from qcow2snap.block.qcow2.snapshot_table import SnapshotTable, TableEntry, read_snapshot_table

if TYPE_CHECKING:
    from qcow2snap.block.qcow2.view import Image, L1Table, View

L1_CACHE_SIZE = 64 << 20  # bytes; the largest L1 table takes 48 MiB


class Epoch:
    """The snapshots of one look at the table, or, of an image that nobody can write, of when they are first asked for.

    threads  any
    errors   SnapshotNotFound, or SnapshotGone where there was a look; ImageFormatError
    owns     nothing
    """

    def __init__(
        self,
        file: FileNode,
        header: ImageHeader,
        new_image: Callable[[], Image],
        look: Look | None = None,
        watches: Sequence[Watch] | None = None,
    ) -> None:
        """`watches`: of each snapshot of the look, in its order; by default, the file is asked."""
        self._file = file
        self._header = header
        self._new_image = new_image
        self._look = look
        # By position in the table; -1: the active disk, -2 and below: VM states.
        self._views: BoundedCache[int, View] = BoundedCache(L1_CACHE_SIZE)
        if look is not None:
            self._watches: Sequence[Watch] = watches or [
                SnapshotWatch(file, header, entry, look.pointer) for entry in look.table.entries
            ]

    @cached_property
    def table(self) -> SnapshotTable:
        """As far as it can be read."""
        table = read_snapshot_table(self._file, self._header) if self._look is None else self._look.table
        if table.damage is not None:
            table.damage.filename = self._file.filename
        return table

    def entry(self, snapshot: SnapshotInfo) -> TableEntry:
        entries = self.table.entries
        if snapshot.position < len(entries) and entries[snapshot.position].info == snapshot:
            return entries[snapshot.position]
        if self._look is None:
            raise SnapshotNotFound(f"{self._file.filename}: snapshot {snapshot} is not in the table")
        # It is known from an earlier look, and may have moved.
        entry = self._by_identity.get(identity(snapshot))
        if entry is None:
            raise SnapshotGone(f"{self._file.filename}: snapshot {snapshot} was deleted from the image meanwhile")
        return entry

    @cached_property
    def _by_identity(self) -> dict[SnapshotInfo, TableEntry]:
        return {identity(entry.info): entry for entry in self.table.entries}

    def known(self, entries: Sequence[TableEntry]) -> tuple[TableEntry, ...]:
        """The entries of a later look: those that were here too with the size that they had, if the table gave none."""
        before = {identity(entry.info)._replace(size=0): entry for entry in self.table.entries}
        result = []
        for entry in entries:
            old = before.get(identity(entry.info)._replace(size=0))
            if old is not None and is_same_snapshot(old.raw, entry.raw):
                entry = entry._replace(info=entry.info._replace(size=old.info.size))
            result.append(entry)
        return tuple(result)

    def watch(self, entry: TableEntry | None) -> Watch | None:
        """What tells whether a snapshot still stands, where that is in doubt."""
        return None if entry is None or self._look is None else self._watches[entry.info.position]

    @cached_property
    def image(self) -> Image:
        """What all views share, with caches of their own."""
        return self._new_image()

    def view(self, entry: TableEntry | None, active_size: int) -> View:
        """The disk of a snapshot, or the active disk. Kept, since each small read asks for it."""
        position, size = (-1, active_size) if entry is None else (entry.info.position, entry.info.size)
        return self._views.get(position) or self._new_view(position, entry, start=0, size=size, has_backing=True)

    def vm_state(self, entry: TableEntry) -> View:
        """The VM state saved with a snapshot. Kept like the disks."""
        position = -2 - entry.info.position
        # Its place follows from the snapshot's own size; a backing file has nothing to say there.
        return self._views.get(position) or self._new_view(
            position,
            entry,
            start=self._header.vm_state_offset(entry.info.size),
            size=entry.info.vm_state_size,
            has_backing=False,
        )

    def _new_view(self, position: int, entry: TableEntry | None, *, start: int, size: int, has_backing: bool) -> View:
        from qcow2snap.block.qcow2.view import View

        l1 = self.l1_table(entry)
        view = View(self.image, l1, start=start, size=size, has_backing=has_backing, watch=self.watch(entry))
        self._views.put(position, view, l1.nbytes)
        return view

    def l1_table(self, entry: TableEntry | None) -> L1Table:
        """The L1 table of a snapshot, or of the active disk. Read anew."""
        from qcow2snap.block.qcow2.view import L1Table

        return L1Table(*self.read_l1(entry))

    def read_l1(self, entry: TableEntry | None) -> RawL1Table:
        """The same, as it stands in the file."""
        try:
            if entry is None:
                judge_active_l1(self._header)
                offset, size = self._header.l1_table_offset, self._header.l1_size
            else:
                judge_l1(entry, self._header)
                offset, size = entry.l1_table_offset, entry.l1_size
            return read_l1(self._file, offset, size)
        except ImageFormatError as error:
            error.filename = self._file.filename
            raise
        finally:
            if watch := self.watch(entry):
                watch.confirm()  # what it raises takes the place of damage, which was then none


def identity(snapshot: SnapshotInfo) -> SnapshotInfo:
    """What stays the same of a snapshot wherever its entry is written."""
    return snapshot._replace(position=0, host_offset=0)


def judge_l1(entry: TableEntry, header: ImageHeader) -> None:
    """The rules for a snapshot's L1 table; those for the active one are the header's."""
    offset, where = entry.l1_table_offset, entry.info.host_offset
    if offset % header.cluster_size:
        what = f"the L1 table of snapshot {entry.info} is at {offset:#x}, not a cluster boundary"
        raise rules.SNAPSHOT_L1_OFFSET.broken(where, what)
    if entry.l1_size * 8 > layout.MAX_L1_TABLE_SIZE:
        what = f"the L1 table of snapshot {entry.info} has {entry.l1_size} entries, more than 32 MiB"
        raise rules.SNAPSHOT_L1_OFFSET.broken(where + 8, what)
