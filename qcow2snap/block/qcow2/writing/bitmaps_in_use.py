"""Dirty bitmaps of an image that is written: marked in use, as their writer would. What they hold is not kept up.

Section "Bitmaps": a program that changes the disk and does not record it in a bitmap has to say that the bitmap may not
be right. Clearing the autoclear bit would say so of all of them, and leak their clusters; the flag in_use says it of
those that record (flag auto). Bitmaps that do not record stay right whatever is written.
"""

from __future__ import annotations

from formats.qcow2 import AutoclearFeature, BitmapFlag
from qcow2snap.block.node import ImageFormatError
from qcow2snap.block.qcow2.bitmaps import BitmapInfo, read_bitmap_directory
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.writing.image_file import ImageFile

_FLAGS = 12  # in an entry: 4 bytes, in one sector with it


class BitmapsInUse:
    """The bitmaps of an image, from its opening on. A directory that cannot be read: ImageFormatError."""

    def __init__(self, file: ImageFile, header: ImageHeader) -> None:
        self._file = file
        self._known: tuple[BitmapInfo, ...] = ()
        if header.version >= 3 and header.autoclear_features & AutoclearFeature.BITMAPS:
            try:
                self._known = read_bitmap_directory(file, header)
            except ImageFormatError as error:
                error.filename = file.filename
                raise

    def mark(self, *, size_changes: bool = False) -> None:
        """Before the disk is changed. When its size changes, no bitmap fits it any more."""
        known = list(self._known)
        for number, info in enumerate(known):
            records = info.flags & BitmapFlag.AUTO or size_changes
            if records and not info.flags & BitmapFlag.IN_USE:
                known[number] = info._replace(flags=int(info.flags) | int(BitmapFlag.IN_USE))
                flags = known[number].flags.to_bytes(4, "big")
                self._file.pwritev(info.host_offset + _FLAGS, [memoryview(flags)])
        if tuple(known) != self._known:
            self._file.flush()
            self._known = tuple(known)
