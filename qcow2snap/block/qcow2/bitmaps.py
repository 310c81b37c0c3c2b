"""Persistent dirty bitmaps: which there are, and which bytes they say are dirty.

Bitmaps belong to the active disk, whose writes they record; a snapshot has none. Limits are those of QEMU
(block/qcow2-bitmap.c). A bitmap that is in use was not saved by the program that had the image open: it is listed, and
its contents are refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from construct import StreamError

from formats import qcow2 as layout
from formats.qcow2 import AutoclearFeature, BitmapFlag, BitmapTableEntry, BitmapType, HeaderExtensionType
from qcow2snap.block.file import FileNode
from qcow2snap.block.node import BitmapNotFound, ImageFormatError, UnsupportedFeature
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader, as_text
from qcow2snap.block.qcow2.words import words

_KNOWN_FLAGS = int(BitmapFlag.IN_USE | BitmapFlag.AUTO | BitmapFlag.EXTRA_DATA_COMPATIBLE)
_OFFSET = BitmapTableEntry.mask("offset")
_ALL_ONES = BitmapTableEntry.mask("all_ones")
_RESERVED = BitmapTableEntry.mask("reserved_low") | BitmapTableEntry.mask("reserved_high")
_SLICE = 4096  # bytes of a bitmap that are looked at together: whoever wants one run does not pay for a cluster
_LARGEST_ENTRY = layout.BITMAP_DIRECTORY_ENTRY_LENGTH + 0xFFFF + 1024 + 7  # QEMU takes no extra data at all

Run = tuple[int, int]  # first and the one after the last


class BitmapInfo(NamedTuple):
    """One entry of the bitmap directory; granularity in bytes."""

    name: str
    granularity: int
    flags: int
    type: int = BitmapType.DIRTY_TRACKING
    table_offset: int = 0
    table_size: int = 0  # entries
    has_extra_data: bool = False
    host_offset: int = 0  # where the entry starts in the image file

    @property
    def flag_names(self) -> list[str]:
        """As `qemu-img info` names them."""
        known = {BitmapFlag.IN_USE: "in-use", BitmapFlag.AUTO: "auto"}
        return [name for flag, name in known.items() if self.flags & flag]


def read_bitmap_directory(file: FileNode, header: ImageHeader) -> tuple[BitmapInfo, ...]:
    """The bitmaps of an image, none if it has no such extension. Damaged: ImageFormatError."""
    extension = header.extension(HeaderExtensionType.BITMAPS)
    if extension is None:
        return ()
    if len(extension.data) != layout.BitmapsExtension.sizeof():
        raise rules.EXTENSION_DATA.broken(
            extension.host_offset, f"the bitmaps extension has {len(extension.data)} bytes, not 24"
        )
    fields = layout.BitmapsExtension.parse(extension.data)
    offset, size = fields.bitmap_directory_offset, fields.bitmap_directory_size
    if fields.nb_bitmaps > layout.MAX_BITMAPS or size > layout.MAX_BITMAP_DIRECTORY_SIZE:
        rule = rules.BITMAP_NUMBER if fields.nb_bitmaps > layout.MAX_BITMAPS else rules.BITMAP_DIRECTORY
        raise rule.broken(extension.host_offset, f"{fields.nb_bitmaps} bitmaps in {size} bytes are too many")
    directory = file.pread_available(offset, size)
    bitmaps = []
    position = 0
    for index in range(fields.nb_bitmaps):
        try:
            entry = layout.BitmapDirectoryEntry.parse(directory[position:][:_LARGEST_ENTRY])
        except StreamError:
            raise rules.BITMAP_DIRECTORY.broken(
                offset + position, f"bitmap directory entry {index} of {fields.nb_bitmaps} is not whole"
            ) from None
        if entry.granularity_bits > 63:
            raise rules.BITMAP_GRANULARITY.broken(
                offset + position + 17, f"granularity 2^{entry.granularity_bits} of a bitmap is impossible"
            )
        bitmaps.append(
            BitmapInfo(
                name=as_text(entry.name),
                granularity=1 << entry.granularity_bits,
                flags=int(entry.flags),
                type=int(entry.type),
                table_offset=entry.bitmap_table_offset,
                table_size=entry.bitmap_table_size,
                has_extra_data=bool(entry.extra_data),
                host_offset=offset + position,
            )
        )
        position += layout.BITMAP_DIRECTORY_ENTRY_LENGTH + len(entry.extra_data) + len(entry.name) + len(entry.padding)
    return tuple(bitmaps)


def why_unknown(info: BitmapInfo, header: ImageHeader) -> str | None:
    """Why nobody knows what is dirty by this bitmap; None where it can be trusted."""
    if not header.autoclear_features & AutoclearFeature.BITMAPS:
        return "a program that does not know bitmaps has written the image since it was saved"
    if info.flags & BitmapFlag.IN_USE:
        return "it is marked in use: what had the image open did not save it, or has it open still"
    if info.type != BitmapType.DIRTY_TRACKING:
        return f"it is of type {info.type}, not a dirty tracking bitmap"
    if info.flags & ~_KNOWN_FLAGS or (info.has_extra_data and not info.flags & BitmapFlag.EXTRA_DATA_COMPATIBLE):
        return "it has flags or extra data that are not known here"
    return None


def read_bitmap_table(file: FileNode, header: ImageHeader, info: BitmapInfo) -> array[int]:
    """Where the bits of a bitmap are. UnsupportedFeature if they are more than QEMU takes, too."""
    size = info.table_size
    if size > layout.MAX_BITMAP_TABLE_SIZE or size * header.cluster_size > layout.MAX_BITMAP_DATA_SIZE:
        raise UnsupportedFeature(f"{file.filename}: the bits of dirty bitmap {info.name!a} take more than 512 MiB")
    if info.table_offset % header.cluster_size:
        what = f"has its table at {info.table_offset:#x}, no cluster boundary"
        raise _broken(file, info, rules.BITMAP_TABLE, info.host_offset, what)
    data = file.pread_available(info.table_offset, 8 * size)
    if len(data) < 8 * size:
        what = "has a table that reaches beyond the end of the file"
        raise _broken(file, info, rules.BITMAP_TABLE, info.host_offset, what)
    return words(data)


def _broken(file: FileNode, info: BitmapInfo, rule: rules.Rule, host_offset: int, what: str) -> ImageFormatError:
    error = rule.broken(host_offset, f"dirty bitmap {info.name!a} {what}")
    error.filename = file.filename
    return error


class DirtyBitmap:
    """The contents of one bitmap.

    threads  any; nothing changes after construction
    errors   BitmapNotFound when built, for one that cannot be trusted; ImageFormatError when built or read
    """

    def __init__(self, file: FileNode, header: ImageHeader, info: BitmapInfo) -> None:
        reason = why_unknown(info, header)
        if reason is not None:
            raise BitmapNotFound(f'{file.filename}: the contents of dirty bitmap "{info.name}" are unknown: {reason}')
        self._file = file
        self._info = info
        self._cluster_size = header.cluster_size
        self._size = header.size
        self._coverage = header.cluster_size * 8 * info.granularity  # guest bytes that a cluster of bits stands for
        self._table = self._read_table(header)
        self.nbytes = 300 + 8 * len(self._table)

    def _read_table(self, header: ImageHeader) -> array[int]:
        needed = -(-header.size // self._coverage)
        if self._info.table_size != needed:
            what = f"has {self._info.table_size} table entries, where its disk and granularity need {needed}"
            raise _broken(self._file, self._info, rules.BITMAP_TABLE, self._info.host_offset + 8, what)
        return read_bitmap_table(self._file, header, self._info)

    def dirty(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Offset and length of each dirty run in a range of the disk, in order, none touching the next."""
        return joined(self._runs(offset, min(offset + length, self._size)), offset)

    def clusters(self) -> Iterator[tuple[int, bytes]]:
        """Index and bytes of each cluster of bits that are not all zeros."""
        for index, entry in enumerate(self._table):
            host_offset = self._checked(index, entry)
            if host_offset:
                yield index, self._read(index, host_offset, 0, self._cluster_size)
            elif entry & _ALL_ONES:
                yield index, b"\xff" * self._cluster_size

    def _runs(self, offset: int, end: int) -> Iterator[Run]:
        """Guest bytes that are dirty, cut to the range; neighbours may touch."""
        granularity = self._info.granularity
        for index in range(offset // self._coverage, -(-end // self._coverage)):
            base = index * self._coverage
            low, high = max(offset, base), min(end, base + self._coverage)
            entry = self._table[index]
            host_offset = self._checked(index, entry)
            if host_offset:
                bits = (low - base) // granularity, -(-(high - base) // granularity)
                for first, stop in self._bits(index, host_offset, *bits):
                    yield max(low, base + first * granularity), min(high, base + stop * granularity)
            elif entry & _ALL_ONES:
                yield low, high

    def _bits(self, index: int, host_offset: int, first: int, stop: int) -> Iterator[Run]:
        """Runs of ones among the bits of one cluster, the least significant of a byte being the first."""
        for start in range(first // 8 // _SLICE * _SLICE, -(-stop // 8), _SLICE):
            data = self._read(index, host_offset, start, min(_SLICE, self._cluster_size - start))
            for one, end in ones(data):
                low, high = max(first, 8 * start + one), min(stop, 8 * start + end)
                if low < high:
                    yield low, high

    def _read(self, index: int, host_offset: int, start: int, length: int) -> bytes:
        data = self._file.pread_available(host_offset + start, length)
        if len(data) < length:
            raise self._entry_broken(index, "beyond the end of the file")
        return data

    def _checked(self, index: int, entry: int) -> int:
        """The host offset of an entry that is as the specification wants it, 0 where all bits are the same."""
        host_offset = entry & _OFFSET
        if entry & _RESERVED or (host_offset and entry & _ALL_ONES):
            raise self._entry_broken(index, f"reserved bits are set in {entry:#x}")
        if host_offset % self._cluster_size:
            raise self._entry_broken(index, f"{host_offset:#x}, not a cluster boundary")
        return host_offset

    def _entry_broken(self, index: int, what: str) -> ImageFormatError:
        where = self._info.table_offset + 8 * index
        error = _broken(self._file, self._info, rules.BITMAP_TABLE_ENTRY, where, f"has table entry {index}: {what}")
        error.guest_range = index * self._coverage, min(self._coverage, self._size - index * self._coverage)
        return error


def joined(runs: Iterable[Run], offset: int) -> Iterator[tuple[int, int]]:
    """Offset and length of runs in order, from `offset` on, those that touch as one."""
    run_start = run_end = offset
    for start, stop in runs:
        if start > run_end:
            if run_end > run_start:
                yield run_start, run_end - run_start
            run_start = start
        run_end = stop
    if run_end > run_start:
        yield run_start, run_end - run_start


def ones(data: bytes) -> Iterator[Run]:
    """Runs of ones among bits, the least significant bit of each byte being the first."""
    import numpy as np  # not at the top: the directory is read without it

    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
    edges = np.flatnonzero(np.diff(bits, prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
