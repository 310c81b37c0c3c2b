"""What QEMU writes into an image, write by write, as its blklogwrites driver logs it.

The log's format is that of Linux' dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst); numbers are
little-endian, sizes in sectors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.qmp import file_node

SECTOR = 512
_SUPER = struct.Struct("<QQQI")  # magic, version, number of entries, sector size
_ENTRY = struct.Struct("<QQQQ")  # sector, sectors, flags, bytes of data
_MAGIC = 0x6A736677736872
_DISCARD = 1 << 2


class Write(NamedTuple):
    """Bytes written at an offset; a discard is so many zeros."""

    offset: int
    data: bytes


def logged(image: Path, log: Path) -> dict[str, Any]:
    """Blockdev options of a file whose writes are logged."""
    log.touch()
    return {"driver": "blklogwrites", "file": file_node(image), "log": file_node(log)}


def read_log(log: Path) -> Iterator[Write]:
    """The writes in turn. Flushes are left out."""
    with log.open("rb") as file:
        magic, version, count, sector = _SUPER.unpack(file.read(_SUPER.size))
        assert (magic, version, sector) == (_MAGIC, 1, SECTOR)
        position = SECTOR
        for _ in range(count):
            file.seek(position)
            start, length, flags, _size = _ENTRY.unpack(file.read(_ENTRY.size))
            position += SECTOR
            if flags & _DISCARD:
                yield Write(start * SECTOR, bytes(length * SECTOR))
                continue
            file.seek(position)
            if length:
                yield Write(start * SECTOR, file.read(length * SECTOR))
            position += length * SECTOR
