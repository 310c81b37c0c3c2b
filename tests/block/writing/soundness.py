"""A small judge of images, in place of qemu-img check where thousands are judged: plain, and with no code of ours.

It knows what a writer must never leave: a reference that a refcount does not count, a cluster that is two things at
once, a COPIED flag that does not say what the refcount says, a table that is not in the file. Leaks are let pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_OFFSET = 0x00FFFFFFFFFFFE00
_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_BITMAPS = 0x23852875  # type of a header extension


class Unsound(AssertionError):
    """What is wrong with an image."""


def _be(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "big")


def _words(data: bytes, offset: int, count: int, what: str) -> list[int]:
    if offset + 8 * count > len(data):
        raise Unsound(f"the {what} at {offset:#x} is not in the file")
    return [int(word) for word in np.frombuffer(data, dtype=">u8", count=count, offset=offset)]


def check(image: bytes) -> None:
    """Raise Unsound if the image is not one that a crash may leave."""
    version, cluster_bits = _be(image, 4, 4), _be(image, 20, 4)
    size = 1 << cluster_bits
    incompatible = _be(image, 72, 8) if version >= 3 else 0
    order = _be(image, 96, 4) if version >= 3 else 4
    external, extended = bool(incompatible & 4), bool(incompatible & 16)
    references: Counter[int] = Counter()
    tables: Counter[int] = Counter()  # clusters of which there can be one use only

    def use(offset: int, length: int) -> None:
        for cluster in range(offset >> cluster_bits, (offset + length - 1 >> cluster_bits) + 1):
            references[cluster] += 1
            tables[cluster] += 1

    use(0, size)
    table_offset, table_size = _be(image, 48, 8), _be(image, 56, 4) * size
    use(table_offset, table_size)
    blocks = _words(image, table_offset, table_size // 8, "refcount table")
    for block in blocks:
        if block:
            use(block, size)
    l1_tables = [(_be(image, 40, 8), _be(image, 36, 4), True)]
    position = start = _be(image, 64, 8)
    for _ in range(_be(image, 60, 4)):
        extra, id_size, name_size = (
            _be(image, position + 36, 4),
            _be(image, position + 12, 2),
            _be(image, position + 14, 2),
        )
        l1_tables.append((_be(image, position, 8), _be(image, position + 8, 4), False))
        position += -(-(40 + extra + id_size + name_size) // 8) * 8
    if position > start:
        use(start, position - start)
    for offset, length in _bitmaps(image, size) if version >= 3 else ():
        use(offset, length)
    flags: list[tuple[int, int, str]] = []
    for offset, count, is_active in l1_tables:
        if count:
            use(offset, 8 * count)
        for entry in _words(image, offset, count, "L1 table"):
            if not entry & _OFFSET:
                continue
            references[(entry & _OFFSET) >> cluster_bits] += 1
            if is_active:
                flags.append((entry, (entry & _OFFSET) >> cluster_bits, "L1"))
            words = _words(image, entry & _OFFSET, size // 8, "L2 table")
            for l2_entry in words[:: 2 if extended else 1]:
                if external or not l2_entry:
                    continue
                if l2_entry & _COMPRESSED:
                    shift = 62 - (cluster_bits - 8)
                    host = l2_entry & (1 << shift) - 1
                    sectors = (l2_entry >> shift & (1 << 62 - shift) - 1) + 1
                    end = host // 512 * 512 + sectors * 512
                    for cluster in range(host >> cluster_bits, (end - 1 >> cluster_bits) + 1):
                        references[cluster] += 1
                elif l2_entry & _OFFSET:
                    if l2_entry & _OFFSET & size - 1:
                        raise Unsound(f"an L2 entry {l2_entry:#x} is not aligned")
                    references[(l2_entry & _OFFSET) >> cluster_bits] += 1
                    if is_active:
                        flags.append((l2_entry, (l2_entry & _OFFSET) >> cluster_bits, "L2"))
    refcounts = _refcounts(image, blocks, references, order, size)
    for cluster, count in references.items():
        if refcounts[cluster] < count:
            raise Unsound(f"cluster {cluster} has refcount {refcounts[cluster]} and {count} references")
    for cluster, count in tables.items():
        if references[cluster] > 1 or count > 1:
            raise Unsound(f"cluster {cluster} holds metadata and something else")
    for entry, cluster, what in flags:
        if bool(entry & _COPIED) != (refcounts[cluster] == 1):
            raise Unsound(f"{what} entry {entry:#x}: refcount {refcounts[cluster]}")
    for _, cluster, _what in flags:
        if cluster << cluster_bits > len(image):
            raise Unsound(f"cluster {cluster} is beyond the end of the file")


def _bitmaps(image: bytes, size: int) -> Iterator[tuple[int, int]]:
    """Offset and length of the bitmap directory, of tables, and of clusters of bits."""
    position = _be(image, 100, 4)
    while (kind := _be(image, position, 4)) not in (0, _BITMAPS):
        position += 8 + -(-_be(image, position + 4, 4) // 8) * 8
    if not kind or not _be(image, 88, 8) & 1:
        return
    count, length, offset = _be(image, position + 8, 4), _be(image, position + 16, 8), _be(image, position + 24, 8)
    yield offset, length
    if offset + length > len(image):
        raise Unsound(f"the bitmap directory at {offset:#x} is not in the file")
    for _ in range(count):
        table, entries = _be(image, offset, 8), _be(image, offset + 8, 4)
        yield table, 8 * entries
        for entry in _words(image, table, entries, "table of a bitmap"):
            if entry & _OFFSET:
                yield entry & _OFFSET, size
        offset += -(-(24 + _be(image, offset + 18, 2) + _be(image, offset + 20, 4)) // 8) * 8


def _refcounts(image: bytes, blocks: list[int], wanted: Counter[int], order: int, size: int) -> dict[int, int]:
    width = 1 << order
    per_block = size * 8 // width
    result = {}
    for cluster in wanted:
        index, place = divmod(cluster, per_block)
        block = blocks[index] if index < len(blocks) else 0
        bit = place * width
        if not block:
            result[cluster] = 0
        elif width >= 8:
            result[cluster] = _be(image, block + bit // 8, width // 8)
        else:
            byte = image[block + bit // 8] if block + bit // 8 < len(image) else 0
            result[cluster] = byte >> bit % 8 & (1 << width) - 1
    return result


def check_file(path: Path) -> None:
    check(path.read_bytes())
