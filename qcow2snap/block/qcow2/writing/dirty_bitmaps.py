"""The dirty bitmaps of an image that is written: marked in use before the first change, kept right, stored at the end.

As QEMU does (block/qcow2-bitmap.c). Those that record (flag auto) are read into memory, and say of themselves in the
file that they are in use; so what a crash leaves of them is believed by nobody. A clean close writes their bits anew,
and a directory that leads to them and marks them in use no more, into free clusters; when all of that is on disk, one
write of 8 bytes to the header makes it the image's, and the old clusters become free.

A bitmap that does not record stays in the file as it is, until the disk gets another size: then it has to be another.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from itertools import groupby
from threading import Lock

from formats import qcow2 as layout
from formats.qcow2 import AutoclearFeature, BitmapFlag, BitmapTableEntry, HeaderExtensionType
from qcow2snap.block.node import ImageFormatError, NotSupported, Qcow2SnapError, UnsupportedFeature
from qcow2snap.block.qcow2.bitmaps import (
    BitmapInfo,
    DirtyBitmap,
    read_bitmap_directory,
    read_bitmap_table,
    why_unknown,
)
from qcow2snap.block.qcow2.words import big_endian
from qcow2snap.block.qcow2.writing.metadata import Metadata
from qcow2snap.block.qcow2.writing.order import Stage
from qcow2snap.block.qcow2.writing.overlap import Section
from qcow2snap.block.qcow2.writing.recording_bitmap import RecordingBitmap, nbytes

logger = logging.getLogger(__name__)

MAX_MEMORY = (
    128 << 20
)  # bytes of bits of all bitmaps together: 64 TiB of disk, one bitmap, QEMU's granularity of 64 KiB
_TABLE_FIELDS = 16  # bytes of an entry: bitmap_table_offset, bitmap_table_size, flags
_FLAGS = 12  # where the last of them is, 4 bytes in one sector
_DIRECTORY_OFFSET = 16  # in the bitmaps extension: 8 bytes in one sector
_BITS_OFFSET = BitmapTableEntry.mask("offset")


class DirtyBitmaps:
    """The bitmaps of an image, from its opening on.

    threads  any; record() with no lock held, store() when nobody writes any more
    errors   when built: ImageFormatError for a directory that cannot be read. FileError; NotSupported where said so
    memory   MAX_MEMORY. A bitmap that does not fit, or is damaged, stays marked in use, and the log says so
    """

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._file = metadata.file
        self._lock = Lock()  # over what follows
        self._known: list[BitmapInfo] = []
        self._kept: dict[int, RecordingBitmap] = {}  # by their places in _known; the file says: in use
        self._recording: tuple[RecordingBitmap, ...] = ()  # those of them that record
        header = metadata.header
        extension = header.extension(HeaderExtensionType.BITMAPS)
        if extension is None or header.version < 3 or not header.autoclear_features & AutoclearFeature.BITMAPS:
            return
        try:
            self._known = list(read_bitmap_directory(self._file, header))
        except ImageFormatError as error:
            error.filename = self._file.filename
            raise
        fields = layout.BitmapsExtension.parse(extension.data)
        self._pointer = extension.host_offset + layout.HEADER_EXTENSION_HEADER_LENGTH + _DIRECTORY_OFFSET
        self._directory = fields.bitmap_directory_offset, fields.bitmap_directory_size
        metadata.sections.add(Section.BITMAP_DIRECTORY, *self._directory)

    # -- while it is written ------------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Before the disk is changed: those that record do so from now on. Whether there is any."""
        with self._lock:
            self._keep([place for place, info in enumerate(self._known) if info.flags & BitmapFlag.AUTO])
            return bool(self._recording)

    def begin_resizing(self, size: int) -> None:
        """Before the disk gets another size, to which all bitmaps have to be fit. NotSupported if one cannot be."""
        with self._lock:
            new = [place for place in range(len(self._known)) if place not in self._kept]
            for place in new:
                if reason := why_unknown(self._known[place], self._metadata.header):
                    raise self._unfit(place, reason)
            needed = sum(nbytes(size, info.granularity) for info in self._known)
            if needed > MAX_MEMORY:
                raise NotSupported(
                    f"{self._file.filename}: its dirty bitmaps would take {needed} bytes for a disk of {size}, more "
                    f"than {MAX_MEMORY}; remove one first (qemu-img bitmap --remove)"
                )
            self._keep(new)
            for place in new:
                if place not in self._kept:
                    raise self._unfit(place, "its contents cannot be read")

    def resized(self, size: int) -> None:
        """The disk has another size."""
        with self._lock:
            for bitmap in self._kept.values():
                bitmap.resize(size)

    def record(self, offset: int, length: int) -> None:
        """A range of the disk is about to be changed."""
        for bitmap in self._recording:
            bitmap.set(offset, length)

    def names(self) -> list[str]:
        """Those whose contents are known, as long as the image is open."""
        header = self._metadata.header
        return [
            info.name
            for place, info in enumerate(self._known)
            if place in self._kept or why_unknown(info, header) is None
        ]

    def find(self, name: str) -> RecordingBitmap | None:
        """A bitmap that is kept in memory, and not in the file."""
        return next((bitmap for place, bitmap in list(self._kept.items()) if self._known[place].name == name), None)

    def _keep(self, places: list[int]) -> None:
        """Locked. Have bitmaps in memory, and marked in use on disk."""
        for place in places:
            info = self._known[place]
            if place in self._kept or info.flags & BitmapFlag.IN_USE:
                continue
            try:
                self._kept[place] = self._load(info)
            except Qcow2SnapError as error:
                name = f"{self._file.filename}: dirty bitmap {info.name!a}"
                logger.warning("%s is not kept up, and stays marked in use: %s", name, error)
        self._recording = tuple(
            bitmap for place, bitmap in self._kept.items() if self._known[place].flags & BitmapFlag.AUTO
        )
        marked = False
        for place in places:
            marked |= self._mark(place)
        if marked:
            self._file.flush()

    def _load(self, info: BitmapInfo) -> RecordingBitmap:
        header = self._metadata.header
        taken = sum(nbytes(header.size, bitmap.granularity) for bitmap in self._kept.values())
        if taken + nbytes(header.size, info.granularity) > MAX_MEMORY:
            raise UnsupportedFeature(f"the bits of the dirty bitmaps take more than {MAX_MEMORY} bytes")
        stored = DirtyBitmap(self._file, header, info)
        bitmap = RecordingBitmap(header.size, info.granularity)
        for index, bits in stored.clusters():
            bitmap.load(index, bits)
        return bitmap

    def _mark(self, place: int) -> bool:
        """Locked. Say in the file that nobody may believe a bitmap; whether it had to be said."""
        info = self._known[place]
        if info.flags & BitmapFlag.IN_USE:
            return False
        where = info.host_offset + _FLAGS
        found = self._metadata.sections.overlap(where, 4, Section.BITMAP_DIRECTORY)
        if found is not None:
            raise self._metadata.order.corrupt(where, f"the bitmap directory would be written over the {found.value}")
        flags = int(info.flags) | int(BitmapFlag.IN_USE)
        self._file.pwritev(where, [memoryview(flags.to_bytes(4, "big"))])
        self._known[place] = info._replace(flags=flags)
        return True

    def _unfit(self, place: int, reason: str) -> NotSupported:
        return NotSupported(
            f"{self._file.filename}: cannot be resized, as dirty bitmap {self._known[place].name!a} cannot: {reason}; "
            "remove it first (qemu-img bitmap --remove)"
        )

    # -- at the end ---------------------------------------------------------------------------------------------------

    def store(self) -> bool:
        """Have the next commit make them the image's, as they are now; the file has all else. Whether there are any.

        After an error nothing is kept up any more, and all that was kept stays marked in use.
        """
        kept, self._kept, self._recording = self._kept, {}, ()
        if not kept:
            return False
        metadata, made = self._metadata, _Made(self._metadata)
        offset, size = self._directory
        directory = bytearray(self._file.pread_available(offset, size))
        released = [self._directory]
        try:
            for place, bitmap in kept.items():
                info = self._known[place]
                released += self._clusters_of(info)
                table = array("Q", (made.write(bits) if bits else 0 for bits in bitmap.clusters(made.cluster_size)))
                fields = made.write(big_endian(table)).to_bytes(8, "big") + len(table).to_bytes(4, "big")
                fields += (int(info.flags) & ~int(BitmapFlag.IN_USE)).to_bytes(4, "big")
                start = info.host_offset - offset
                directory[start : start + _TABLE_FIELDS] = fields
            place_of_directory = made.write(bytes(directory))
        except Qcow2SnapError:
            made.take_back()
            raise
        with metadata.lock:
            metadata.sections.remove(offset, size)
            metadata.sections.add(Section.BITMAP_DIRECTORY, place_of_directory, size)
            pointer = place_of_directory.to_bytes(8, "big")
            metadata.queue(Stage.POINTERS, self._pointer, pointer, Section.MAIN_HEADER)
            for each in released:
                metadata.release(*each)
        return True

    def _clusters_of(self, info: BitmapInfo) -> Iterator[tuple[int, int]]:
        """Offset and length of what a bitmap has in the file; not what seems to be other metadata's as well."""
        metadata, bits = self._metadata, self._metadata.header.cluster_bits
        clusters = {
            entry >> bits for entry in read_bitmap_table(self._file, metadata.header, info) if entry & _BITS_OFFSET
        }
        clusters |= {(info.table_offset >> bits) + n for n in range(-(-8 * info.table_size >> bits))}
        mine = sorted(each for each in clusters if metadata.sections.overlap(each << bits, 1) is None)
        for _, run in groupby(enumerate(mine), key=lambda pair: pair[1] - pair[0]):
            numbers = [cluster for _, cluster in run]
            yield numbers[0] << bits, len(numbers) << bits


class _Made:
    """New clusters, written but referred to by nothing yet."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._allocated: list[tuple[int, int]] = []  # first cluster and number
        self.cluster_size = metadata.header.cluster_size

    def write(self, data: bytes) -> int:
        """Bytes into clusters of their own, at least one; gives their host offset."""
        metadata, count = self._metadata, max(1, -(-len(data) // self.cluster_size))
        with metadata.lock:
            offset = metadata.allocate(count * self.cluster_size)
            self._allocated.append((offset >> metadata.header.cluster_bits, count))
        metadata.file.pwritev(offset, [memoryview(data.ljust(count * self.cluster_size, b"\0"))])
        return offset

    def take_back(self) -> None:
        with self._metadata.lock:
            for first, count in self._allocated:
                self._metadata.refcounts.add(first, count, -1)
