"""What is dirty, from the JSON that programs print who know it. Whose disk it is of, and what for, is not known here.

Each program's way to say that bytes are dirty:

    nbdinfo --map=CONTEXT --json   offset, length, and bit 0 of "type"; of dirty bitmaps, and qcow2snap:changed-since
    qcow2snap diff --json          start, length, "change": all that is there is dirty
    ovirt-imageio                  start, length, "dirty"
    qemu-img map --output=json     start, length, and neither "data" nor "zero", with x-dirty-bitmap (a client of NBD);
                                   else it is a map of what is allocated: dirty is what the top image has ("present" at
                                   "depth" 0), which of an overlay is what was written since it was made
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qcow2snap.block.file import file_error
from qcow2snap.block.frozen_bitmap import FrozenBitmap
from qcow2snap.block.node import FileError, OutOfRange, UnsupportedFeature

MAX_FILE = 256 << 20  # bytes: four million extents
SECTOR = 512  # bytes; QEMU rounds the size of a disk up to it

Record = dict[str, Any]


def read_dirty_json(filename: str, size: int) -> FrozenBitmap:
    """What is dirty of a disk of `size` bytes. FileError, UnsupportedFeature or OutOfRange say what is wrong."""
    try:
        records = json.loads(_content(filename))
    except (ValueError, RecursionError) as error:
        raise UnsupportedFeature(f"{filename}: is not JSON: {error}") from None
    if not isinstance(records, list):
        raise UnsupportedFeature(f"{filename}: is no list of extents, but {type(records).__name__}")
    ranges = [_range(filename, number, record, size) for number, record in enumerate(records)]
    dirty = [extent for extent, is_dirty in zip(ranges, _flags(filename, records), strict=True) if is_dirty]
    return FrozenBitmap(sorted(dirty), size)


def _content(filename: str) -> bytes:
    try:
        with open(filename, "rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise file_error(filename, error) from None
    if len(content) > MAX_FILE:
        raise FileError(f"{filename}: has more than {MAX_FILE} bytes of JSON")
    return content


def _range(filename: str, number: int, record: object, size: int) -> tuple[int, int]:
    if isinstance(record, dict):
        offset, length = record.get("start", record.get("offset")), record.get("length")
        if type(offset) is int and type(length) is int and offset >= 0 and length >= 0:
            beyond = offset + length - size
            # What the disk had when it was larger is told by a diff, and is nobody's any more.
            if beyond >= SECTOR and record.get("change") != "size":
                raise OutOfRange(f"{filename}: extent {number} ends {beyond} bytes beyond the disk: is it another's?")
            return offset, max(0, length - max(0, beyond))
    raise UnsupportedFeature(f"{filename}: extent {number} has no start and length, or no sound ones")


def _flags(filename: str, records: list[Record]) -> Iterator[bool]:
    """For each record, whether it says that it is dirty."""
    if not records:
        return iter(())
    if all("change" in record for record in records):
        return iter([True] * len(records))
    if all(type(record.get("dirty")) is bool for record in records):
        return (record["dirty"] for record in records)
    if all(type(record.get("type")) is int for record in records):
        told = {record.get("description", "dirty") for record in records} - {"clean", "dirty"}
        if told:
            raise UnsupportedFeature(
                f'{filename}: tells of "{min(map(str, told))}", not what is dirty: '
                "make it by nbdinfo --map=qemu:dirty-bitmap:NAME --json"
            )
        return (bool(record["type"] & 1) for record in records)
    if all(type(record.get("data")) is bool and type(record.get("zero")) is bool for record in records):
        return _flags_of_map(filename, records)
    raise UnsupportedFeature(f"{filename}: its extents do not say, or not all in one way, whether they are dirty")


def _flags_of_map(filename: str, records: list[Record]) -> Iterator[bool]:
    # A bitmap has no zeros and no layers, a map of what is allocated nothing that is neither data nor zeros.
    is_bitmap = any(not record["data"] and not record["zero"] for record in records)
    is_map = any(record["zero"] or record.get("depth") for record in records)
    if is_bitmap == is_map:
        raise UnsupportedFeature(
            f"{filename}: may say that nothing is dirty, or that all is allocated: "
            "make it by nbdinfo --map=qemu:dirty-bitmap:NAME --json"
        )
    if is_bitmap:
        return (not record["data"] for record in records)
    return (record.get("depth", 0) == 0 and record.get("present", True) is True for record in records)
