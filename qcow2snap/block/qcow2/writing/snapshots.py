"""Making, deleting, applying and renaming internal snapshots of an image that is written (QEMU block/qcow2-snapshot.c).

Each is one step from a sound image to another (shadow.py). Making the disk larger goes the same way, and so is here.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Lock

import numpy as np

from formats import qcow2 as layout
from formats.qcow2 import AutoclearFeature
from qcow2snap.block.node import NotSupported, Qcow2SnapError, SnapshotInfo, SnapshotNotFound
from qcow2snap.block.qcow2.epoch import identity, judge_l1
from qcow2snap.block.qcow2.header import ImageHeader, as_bytes
from qcow2snap.block.qcow2.l1 import read_l1
from qcow2snap.block.qcow2.snapshot_entry import MAX_NAME_SIZE, new_entry, next_id, renamed
from qcow2snap.block.qcow2.snapshot_table import SnapshotTable, TableEntry, parse_table
from qcow2snap.block.qcow2.words import big_endian, words
from qcow2snap.block.qcow2.writing.entries import COMPRESSED, COPIED, L1_OFFSET, OFFSET
from qcow2snap.block.qcow2.writing.header_state import SIZE_OFFSET
from qcow2snap.block.qcow2.writing.metadata import Metadata
from qcow2snap.block.qcow2.writing.order import Stage
from qcow2snap.block.qcow2.writing.overlap import Section
from qcow2snap.block.qcow2.writing.shadow import Shadow
from qcow2snap.block.qcow2.writing.tree import read_l2, tree_references, with_copied_flags


class Snapshots:
    """The snapshot table of an image that is written, and the active disk's size.

    alone    a context in which no guest changes the disk, and none is in the middle of a change
    gone     called when an entry is about to be deleted, before anything that it has is free
    broken   called with the error when the header may or may not have been written: the image can be written no more
    threads  any, one at a time. Writers wait; readers go on, but those of the disk may not be there in apply()
    errors   NotSupported, ImageFormatError, NoSpace, FileError: nothing was changed, unless `broken` was called
    """

    def __init__(
        self,
        metadata: Metadata,
        table: SnapshotTable,
        *,
        alone: Callable[[], AbstractContextManager[None]],
        gone: Callable[[TableEntry], None],
        broken: Callable[[Qcow2SnapError], None],
    ) -> None:
        self._metadata = metadata
        self._alone = alone
        self._gone = gone
        self._broken = broken
        self._operations = Lock()
        self.entries: tuple[TableEntry, ...] = table.entries
        metadata.sections.add(Section.SNAPSHOT_TABLE, metadata.header.snapshots_offset, self._table_size)

    @property
    def _table_size(self) -> int:
        """Bytes."""
        return sum(len(entry.raw) for entry in self.entries)

    # -- operations ---------------------------------------------------------------------------------------------------

    def create(self, name: str, *, date_ns: int | None = None, vm_clock_nsec: int = 0) -> SnapshotInfo:
        """Keep the disk as it is at one moment between two writes. `date_ns`: since the Epoch; by default, now."""
        metadata = self._metadata
        with self._changing() as shadow:
            raw_name = self._judged_name(name)
            if len(self.entries) >= layout.MAX_SNAPSHOTS:
                raise NotSupported(f"the image has {layout.MAX_SNAPSHOTS} snapshots, and cannot have more; delete some")
            header, l1 = metadata.header, metadata.tables.l1
            date_sec, date_nsec = divmod(time.time_ns() if date_ns is None else date_ns, 10**9)
            self._count(shadow, l1, 1)
            active = self._with_flags(shadow, l1, users=2)
            raw = new_entry(
                id_=next_id([entry.info.id for entry in self.entries]),
                name=raw_name,
                l1_table_offset=shadow.write(big_endian(active)),
                l1_size=len(active),
                disk_size=header.size,
                date_sec=date_sec,
                date_nsec=date_nsec,
                vm_clock_nsec=vm_clock_nsec,
            )
            (entry,) = parse_table([(0, raw)], None, header).entries
            header = self._replace_l1(shadow, header, active)
            self._switch(shadow, header, [*self.entries, entry])
        return self.entries[-1].info

    def delete(self, snapshot: SnapshotInfo) -> None:
        """Forget a snapshot, and free what only it had."""
        metadata = self._metadata
        with self._changing() as shadow:
            entry = self._entry(snapshot)
            self._count(shadow, self._l1_of(entry), -1)
            shadow.free(entry.l1_table_offset, 8 * entry.l1_size)
            active = self._with_flags(shadow, metadata.tables.l1, users=1)
            header = self._replace_l1(shadow, metadata.header, active)
            self._switch(shadow, header, [each for each in self.entries if each is not entry], gone=entry, punch=True)

    def rename(self, snapshot: SnapshotInfo, name: str) -> SnapshotInfo:
        """Give a snapshot another name; nothing else of it changes."""
        with self._changing() as shadow:
            entry = self._entry(snapshot)
            raw = renamed(entry.raw, self._judged_name(name, besides=entry))
            changed = entry._replace(raw=raw, info=entry.info._replace(name=name))
            entries = [changed if each is entry else each for each in self.entries]
            self._switch(shadow, self._metadata.header, entries)
            return self.entries[entry.info.position].info

    def apply(self, snapshot: SnapshotInfo) -> None:
        """Make the disk what a snapshot is, with its size. What the disk was is lost."""
        metadata = self._metadata
        with self._changing() as shadow:
            entry, header = self._entry(snapshot), metadata.header
            size = entry.info.size
            self._judge_size(size)
            if size != header.size:
                self._refuse_resize(f"snapshot {snapshot} has another size than the disk")
            self._refuse_bitmaps()
            l1 = self._l1_of(entry)
            l1.extend([0] * (-(-size // header.l2_coverage) - len(l1)))
            self._count(shadow, metadata.tables.l1, -1)
            self._count(shadow, l1, 1)
            active = self._with_flags(shadow, l1, users=1)
            header = self._replace_l1(shadow, header, active, is_new=True)
            self._switch(shadow, header._replace(size=size), self.entries, punch=True)

    def judge_growth(self, size: int) -> None:
        """NotSupported if the disk cannot get this size."""
        header = self._metadata.header
        self._judge_size(size)
        if size < header.size:
            raise NotSupported(f"the disk has {header.size} bytes, and can only be made larger: {size} are less")
        if header.version < 3 and self.entries:  # other programs may not look for a snapshot's own size
            raise NotSupported("a version 2 image that has snapshots cannot be resized; delete them first")

    def grow(self, size: int) -> None:
        """Make the L1 table fit for a larger disk, whose size stays what it is until set_size."""
        metadata = self._metadata
        with self._changing() as shadow:
            self.judge_growth(size)
            header = metadata.header
            used, needed = (-(-each // header.l2_coverage) for each in (header.size, size))
            l1 = metadata.tables.l1[:used]
            # What the active L1 table has behind the disk is a VM state, which would become part of it.
            behind = metadata.tables.l1[used:]
            if needed > len(metadata.tables.l1) or any(behind):
                self._count(shadow, behind, -1)
                l1.extend([0] * (needed - used))
                self._switch(shadow, self._replace_l1(shadow, header, l1, is_new=True), self.entries)

    def set_size(self, size: int) -> None:
        """Say that the disk has another size, which its L1 table covers."""
        metadata = self._metadata
        with self._operations:
            with metadata.lock:
                metadata.queue(Stage.POINTERS, SIZE_OFFSET, size.to_bytes(8, "big"), Section.MAIN_HEADER)
                metadata.header = metadata.header._replace(size=size)
            metadata.commit()

    # -- steps --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[Shadow]:
        """Around an operation: nobody else changes the image, and the file has what is in memory."""
        metadata = self._metadata
        metadata.order.write_back()  # writers need not wait for most of it
        with self._operations, self._alone(), metadata.order.still():
            yield Shadow(metadata)

    def _count(self, shadow: Shadow, l1: Sequence[int], addend: int) -> None:
        """So many references more to all that an L1 table leads to."""
        for clusters, counts in tree_references(self._metadata.file, self._metadata.header, l1):
            shadow.add(clusters, counts * addend)

    def _with_flags(self, shadow: Shadow, l1: Sequence[int], *, users: int) -> array[int]:
        """An L1 table whose COPIED flags, and those of its L2 tables, say what the refcounts do.

        Where flags of an L2 table change, it is written anew, and `users` of its references are to the new one.
        """
        metadata = self._metadata
        header, bits = metadata.header, metadata.header.cluster_bits
        result = array("Q", l1)
        for index, entry in enumerate(l1):
            offset = entry & L1_OFFSET
            if not offset:
                continue
            table = read_l2(metadata.file, header, offset)
            entries = table[:: header.l2_entry_size // 8]
            standard = (entries & np.uint64(COMPRESSED) == 0) & (entries & np.uint64(OFFSET) != 0)
            refcounts = np.zeros(len(entries), dtype=np.int64)
            refcounts[standard] = shadow.refcounts_of((entries[standard] & np.uint64(OFFSET)) >> np.uint64(bits))
            flagged = with_copied_flags(table, refcounts.astype(np.uint64), header)
            own = np.array([offset >> bits], dtype=np.uint64)
            refcount = int(shadow.refcounts_of(own)[0])
            if (flagged != table).any():
                offset = shadow.write(flagged.astype(">u8").tobytes())
                if users > 1:
                    shadow.add(np.array([offset >> bits], dtype=np.uint64), np.array([users - 1]))
                shadow.add(own, np.array([-users]))
                refcount = users
            result[index] = offset | (COPIED if refcount == 1 else 0)
        return result

    def _replace_l1(self, shadow: Shadow, header: ImageHeader, l1: array[int], *, is_new: bool = False) -> ImageHeader:
        """The header with this active L1 table, which is written if it differs from the one in the file."""
        if l1 == self._metadata.tables.l1 and not is_new:
            return header
        shadow.free(header.l1_table_offset, 8 * header.l1_size)
        return header._replace(l1_table_offset=shadow.write(big_endian(l1)), l1_size=len(l1))

    def _switch(
        self,
        shadow: Shadow,
        header: ImageHeader,
        entries: Sequence[TableEntry],
        *,
        gone: TableEntry | None = None,
        punch: bool = False,
    ) -> None:
        """Make it so, and have memory say the same. `punch`: the file system gets the space of what is free now."""
        metadata = self._metadata
        if entries is not self.entries:
            header, entries = self._replace_table(shadow, header, entries)
        if gone is not None:
            self._gone(gone)
        header = shadow.switch(header, self._broken)
        metadata.sections.remove(metadata.header.snapshots_offset, self._table_size)
        for entry in self.entries:
            metadata.sections.remove(entry.l1_table_offset, 8 * entry.l1_size)
        metadata.header, self.entries = header, tuple(entries)
        metadata.sections.add(Section.SNAPSHOT_TABLE, header.snapshots_offset, self._table_size)
        for entry in entries:
            metadata.sections.add(Section.INACTIVE_L1, entry.l1_table_offset, 8 * entry.l1_size)
        try:
            metadata.refcounts.reload(header)
            metadata.tables.reload(header)
        except Qcow2SnapError as error:
            self._broken(error)
            raise
        if punch:
            shadow.punch()

    def _replace_table(
        self, shadow: Shadow, header: ImageHeader, entries: Sequence[TableEntry]
    ) -> tuple[ImageHeader, list[TableEntry]]:
        data = b"".join(entry.raw for entry in entries)
        if len(data) > layout.MAX_SNAPSHOT_TABLE_SIZE:
            raise NotSupported("the snapshot table would be larger than 64 MiB; delete some snapshots")
        shadow.free(header.snapshots_offset, self._table_size)
        offset = position = shadow.write(data)
        placed = []
        for index, entry in enumerate(entries):
            placed.append(entry._replace(info=entry.info._replace(position=index, host_offset=position)))
            position += len(entry.raw)
        return header._replace(nb_snapshots=len(placed), snapshots_offset=offset), placed

    # -- judging ------------------------------------------------------------------------------------------------------

    def _entry(self, snapshot: SnapshotInfo) -> TableEntry:
        self._refuse_data_file()
        for entry in self.entries:
            if identity(entry.info) == identity(snapshot):
                return entry
        raise SnapshotNotFound(f"{self._metadata.file.filename}: snapshot {snapshot} is not in the image")

    def _l1_of(self, entry: TableEntry) -> array[int]:
        judge_l1(entry, self._metadata.header)
        return words(read_l1(self._metadata.file, entry.l1_table_offset, entry.l1_size).data)

    def _judged_name(self, name: str, besides: TableEntry | None = None) -> bytes:
        self._refuse_data_file()
        raw = as_bytes(name)
        if not raw or b"\0" in raw:
            raise NotSupported("the name of a snapshot cannot be empty, nor have NUL bytes in it")
        if len(raw) > MAX_NAME_SIZE:
            raise NotSupported(
                f"the name has {len(raw)} bytes, of which QEMU reads {MAX_NAME_SIZE}; give a shorter one"
            )
        for entry in self.entries:
            if entry.info.name == name and entry is not besides:
                raise NotSupported(f"there is a snapshot {entry.info} already; give another name, or delete it first")
        return raw

    def _refuse_data_file(self) -> None:
        if self._metadata.header.has_data_file:
            filename = self._metadata.file.filename
            raise NotSupported(f"{filename}: an image with an external data file cannot have snapshots")

    def _refuse_resize(self, what: str) -> None:
        """Where a snapshot's size is not its own, but the disk's, the disk keeps its size (version 2 of the format)."""
        for entry in self.entries:
            if layout.SnapshotTableEntry.parse(entry.raw).disk_size is None:
                raise NotSupported(f"{what}, but snapshot {entry.info} has no size of its own: it is the disk's")

    def _refuse_bitmaps(self) -> None:
        """As QEMU does: they do not know what differs between the disk and its snapshots."""
        if int(self._metadata.header.autoclear_features) & AutoclearFeature.BITMAPS:
            raise NotSupported(
                "applying a snapshot would make the image's dirty bitmaps wrong; remove them first (qemu-img bitmap "
                "--remove)"
            )

    def _judge_size(self, size: int) -> None:
        header = self._metadata.header
        if -(-size // header.l2_coverage) * 8 > layout.MAX_L1_TABLE_SIZE:
            raise NotSupported(f"a disk of {size} bytes is too large for clusters of {header.cluster_size}")
