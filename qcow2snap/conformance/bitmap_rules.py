"""The rules for persistent dirty bitmaps: extension, directory, tables, and the last bits of each.

QEMU refuses an image whose bitmaps are damaged, except where their autoclear bit is not set: then it forgets them.
"""

from __future__ import annotations

import numpy as np
from construct import Container, StreamError
from numpy.typing import NDArray

from formats import qcow2 as layout
from formats.qcow2 import AutoclearFeature, BitmapFlag, BitmapTableEntry, BitmapType, HeaderExtensionType
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import Extension, as_text
from qcow2snap.conformance.findings import Finding
from qcow2snap.conformance.references import words
from qcow2snap.conformance.subject import Region, Subject

_KNOWN_FLAGS = int(BitmapFlag.IN_USE | BitmapFlag.AUTO | BitmapFlag.EXTRA_DATA_COMPATIBLE)
_OFFSET = np.uint64(BitmapTableEntry.mask("offset"))
_ALL_ONES = np.uint64(BitmapTableEntry.mask("all_ones"))
_RESERVED = np.uint64(BitmapTableEntry.mask("reserved_low") | BitmapTableEntry.mask("reserved_high"))
_GRANULARITIES = range(9, 32)  # those of QEMU
_MAX_NAME = 1023  # bytes, QEMU's


def judge_bitmaps(subject: Subject) -> None:
    """Everything about bitmaps, and the areas they take. Raises FileError."""
    header, findings = subject.header, subject.findings
    extension = header.extension(HeaderExtensionType.BITMAPS)
    if extension is None:
        return
    if len(extension.data) != layout.BitmapsExtension.sizeof():
        what = f"the bitmaps extension has {len(extension.data)} bytes, not 24"
        findings.add(Finding(rules.EXTENSION_DATA, extension.host_offset, what, stops=True))
        return
    if not header.autoclear_features & AutoclearFeature.BITMAPS:
        what = "a program that does not know bitmaps has written the image: nobody knows what is dirty"
        findings.add(Finding(rules.BITMAPS_INCONSISTENT, extension.host_offset, what))
        return
    fields = layout.BitmapsExtension.parse(extension.data)
    _judge_extension(subject, extension, fields)
    if not (0 < fields.nb_bitmaps <= layout.MAX_BITMAPS and fields.bitmap_directory_size):
        return
    size = min(fields.bitmap_directory_size, layout.MAX_BITMAP_DIRECTORY_SIZE)
    directory = Region(fields.bitmap_directory_offset, size, "the bitmap directory")
    subject.takes(directory, rules.BITMAP_DIRECTORY)
    _judge_directory(subject, directory, fields.nb_bitmaps, fields.bitmap_directory_size)


def _judge_extension(subject: Subject, extension: Extension, fields: Container) -> None:
    where = extension.host_offset + layout.HEADER_EXTENSION_HEADER_LENGTH

    def refuse(rule: rules.Rule, position: int, what: str) -> None:
        subject.findings.add(Finding(rule, where + position, what, stops=True))

    if not 0 < fields.nb_bitmaps <= layout.MAX_BITMAPS:
        refuse(rules.BITMAP_NUMBER, 0, f"the bitmaps extension is for {fields.nb_bitmaps} bitmaps")
    if fields.reserved:
        refuse(rules.BITMAP_EXTENSION_RESERVED, 4, f"the reserved field of the bitmaps extension is {fields.reserved}")
    if fields.bitmap_directory_size > layout.MAX_BITMAP_DIRECTORY_SIZE or not fields.bitmap_directory_size:
        refuse(rules.BITMAP_DIRECTORY, 8, f"the bitmap directory has {fields.bitmap_directory_size} bytes")
    if fields.bitmap_directory_offset % subject.header.cluster_size:
        refuse(
            rules.BITMAP_DIRECTORY_ALIGNED,
            16,
            f"the bitmap directory is at {fields.bitmap_directory_offset:#x}, not a cluster boundary",
        )


def _judge_directory(subject: Subject, region: Region, nb_bitmaps: int, size: int) -> None:
    data = subject.file.pread_available(region.offset, region.length)
    if subject.file_size - region.offset >= region.length:
        data = data.ljust(region.length, b"\0")  # the last sector need not be there whole
    names: set[bytes] = set()
    position = 0
    for index in range(nb_bitmaps):
        where = region.offset + position
        head = data[position : position + layout.BITMAP_DIRECTORY_ENTRY_LENGTH]
        lengths = int.from_bytes(head[18:20], "big") + int.from_bytes(head[20:24], "big")
        end = position + layout.BITMAP_DIRECTORY_ENTRY_LENGTH + lengths
        end += -end % 8
        try:
            entry = layout.BitmapDirectoryEntry.parse(data[position:end])
        except StreamError:
            what = f"bitmap directory entry {index + 1} of {nb_bitmaps} is not whole"
            subject.findings.add(Finding(rules.BITMAP_DIRECTORY, where, what, stops=True))
            return
        bitmap = _Bitmap(subject, entry, where)
        bitmap.judge(names)
        names.add(entry.name)
        position = end
    if position != size:
        what = f"the entries of the bitmap directory take {position} bytes, and it has {size}"
        subject.findings.add(Finding(rules.BITMAP_DIRECTORY, region.offset, what, stops=True))


class _Bitmap:
    """One entry of the directory, and what it leads to."""

    def __init__(self, subject: Subject, entry: Container, where: int) -> None:
        self._subject = subject
        self._entry = entry
        self._where = where
        self._name = f"dirty bitmap {as_text(entry.name)!a}"
        self._is_in_use = bool(int(entry.flags) & BitmapFlag.IN_USE)

    def judge(self, other_names: set[bytes]) -> None:
        entry, cluster_size = self._entry, self._subject.header.cluster_size
        flags = int(entry.flags)
        if flags & ~_KNOWN_FLAGS:
            self._refuse(rules.BITMAP_FLAGS, 12, f"has flags {flags:#x}")
        if entry.type != BitmapType.DIRTY_TRACKING:
            self._refuse(rules.BITMAP_TYPE, 16, f"is of type {int(entry.type)}")
        if entry.granularity_bits not in _GRANULARITIES:
            self._refuse(rules.BITMAP_GRANULARITY, 17, f"has a granularity of 2^{entry.granularity_bits} bytes")
        if not 0 < entry.name_size <= _MAX_NAME:
            self._refuse(rules.BITMAP_NAME, 18, f"has a name of {entry.name_size} bytes")
        if entry.name in other_names:
            self._refuse(rules.BITMAP_NAME_UNIQUE, 24, "is there more than once")
        if entry.extra_data_size:
            self._refuse(rules.BITMAP_EXTRA_DATA, 20, f"has {entry.extra_data_size} bytes of extra data")
        if entry.padding.strip(b"\0"):
            self._add(
                rules.BITMAP_PADDING, 24 + entry.extra_data_size + entry.name_size, "has padding that is not zero"
            )
        if self._is_in_use:
            self._add(rules.BITMAP_IN_USE, 12, "was not saved by what had the image open last")
        if entry.bitmap_table_offset % cluster_size or not entry.bitmap_table_offset:
            what = f"has its table at {entry.bitmap_table_offset:#x}, not a cluster boundary"
            self._refuse(rules.BITMAP_TABLE, 0, what)
        elif self._has_table():
            self._subject.bitmap_budget -= 8 * entry.bitmap_table_size
            if self._subject.bitmap_budget >= 0:
                self._judge_table()
            else:
                self._subject.findings.problems.append(f"{self._name}: too much for one check, not read")

    def _has_table(self) -> bool:
        """Whether the table has as many entries as the bitmap needs. One in use may be of another size."""
        entry, header = self._entry, self._subject.header
        size = entry.bitmap_table_size
        covered = header.cluster_size * 8 << min(entry.granularity_bits, 63)  # by one entry
        needed, by_qemu = (
            -(-header.size // covered),
            -(-(header.size // layout.SECTOR_SIZE * layout.SECTOR_SIZE) // covered),
        )
        is_right = size == needed or (self._is_in_use and size > 0)
        if not is_right:
            self._refuse(rules.BITMAP_TABLE, 8, f"has {size} table entries, and needs {needed}")
        elif size != by_qemu and not self._is_in_use:
            what = f"has {size} table entries, and QEMU wants {by_qemu}, for a disk of whole sectors"
            self._refuse(rules.HEADER_SIZE_SECTORS, 8, what)
        elif size * header.cluster_size > layout.MAX_BITMAP_DATA_SIZE:
            self._refuse(rules.BITMAP_TABLE, 8, f"has {size} table entries, for more than QEMU's 512 MiB")
            return False
        return is_right

    def _judge_table(self) -> None:
        entry, subject = self._entry, self._subject
        offset, size = entry.bitmap_table_offset, entry.bitmap_table_size
        subject.takes(Region(offset, 8 * size, f"the table of {self._name}"), rules.BITMAP_TABLE)
        entries = words(subject.file.pread_available(offset, 8 * size))
        hosts = entries & _OFFSET
        broken = (entries & _RESERVED) != 0
        broken |= (hosts != 0) & (
            (entries & _ALL_ONES != 0) | (hosts & np.uint64(subject.header.cluster_size - 1) != 0)
        )
        for index in np.flatnonzero(broken)[:1].tolist():  # QEMU goes no further
            what = f"{self._name} has {int(entries[index]):#x} as table entry {index}"
            subject.findings.add(Finding(rules.BITMAP_TABLE_ENTRY, offset + 8 * index, what, stops=True))
        self._take(offset, hosts, np.flatnonzero((hosts != 0) & ~broken))
        if len(entries) == size and not broken.any() and not self._is_in_use:
            self._judge_tail(int(entries[-1]))

    def _take(self, table: int, hosts: NDArray[np.uint64], indexes: NDArray[np.intp]) -> None:
        """Count the clusters that the table points to."""
        offsets = hosts[indexes].view(np.int64)
        outside = offsets >= self._subject.file_size

        def make(step: int) -> Finding:
            index = int(indexes[outside][step])
            what = f"{self._name} has its cluster {index} at {int(hosts[index]):#x}, beyond the end of the file"
            return Finding(rules.BITMAP_TABLE_ENTRY, table + 8 * index, what)

        self._subject.findings.add_each(rules.BITMAP_TABLE_ENTRY, 1, int(outside.sum()), make)
        self._subject.bitmap_data.append(offsets[~outside])

    def _judge_tail(self, last: int) -> None:
        """The bits of the last cluster that stand for nothing."""
        subject, host = self._subject, last & int(_OFFSET)
        nb_bits = -(-subject.header.size // (1 << self._entry.granularity_bits)) % (8 * subject.header.cluster_size)
        if not host or not nb_bits:
            return
        start = nb_bits // 8
        tail = subject.file.pread_available(host + start, subject.header.cluster_size - start)
        first = tail[0] >> nb_bits % 8 if tail else 0
        if first or tail[1:].strip(b"\0"):
            what = f"{self._name} has bits set beyond the end of the disk"
            subject.findings.add(Finding(rules.BITMAP_TAIL, host + start, what))

    def _add(self, rule: rules.Rule, position: int, what: str) -> None:
        self._subject.findings.add(Finding(rule, self._where + position, f"{self._name} {what}"))

    def _refuse(self, rule: rules.Rule, position: int, what: str) -> None:
        self._subject.findings.add(Finding(rule, self._where + position, f"{self._name} {what}", stops=True))
