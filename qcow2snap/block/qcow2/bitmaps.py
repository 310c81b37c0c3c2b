"""The directory of persistent bitmaps: what bitmaps an image has. Their contents are not read here."""

from __future__ import annotations

from typing import NamedTuple

from construct import StreamError

from formats import qcow2 as layout
from formats.qcow2 import BitmapFlag, HeaderExtensionType
from qcow2snap.block.file import FileNode
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader, as_text


class BitmapInfo(NamedTuple):
    """One entry of the bitmap directory; granularity in bytes."""

    name: str
    granularity: int
    flags: int

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
        raise rules.BITMAP_DIRECTORY.broken(extension.host_offset, f"{fields.nb_bitmaps} bitmaps are too many")
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
            raise rules.BITMAP_DIRECTORY.broken(
                offset + position + 17, f"granularity 2^{entry.granularity_bits} of a bitmap is impossible"
            )
        bitmaps.append(BitmapInfo(as_text(entry.name), 1 << entry.granularity_bits, int(entry.flags)))
        position += layout.BITMAP_DIRECTORY_ENTRY_LENGTH + len(entry.extra_data) + len(entry.name) + len(entry.padding)
    return tuple(bitmaps)


_LARGEST_ENTRY = layout.BITMAP_DIRECTORY_ENTRY_LENGTH + 0xFFFF + 1024 + 7  # QEMU takes no extra data at all
