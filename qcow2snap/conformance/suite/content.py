"""What a disk is expected to hold: bytes with a size, zeros but for some pieces. And the patterns that cases store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from typing import BinaryIO

LINE = 16  # bytes of a numbered line
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)


def lines(first: int, length: int) -> bytes:
    """Numbered lines of text: no two differ in nothing, and they compress to a third."""
    count = -(-length // LINE)
    return b"".join(b"%0*d\n" % (LINE - 1, number) for number in range(first, first + count))[:length]


def noise(seed: int, length: int) -> bytes:
    """Bytes that do not compress."""
    return hashlib.shake_128(b"qcow2 %d" % seed).digest(length)


class Content:
    """`size` bytes, zeros where nothing else was put. Pieces are sorted and do not overlap."""

    def __init__(self, size: int, pieces: tuple[tuple[int, bytes], ...] = ()) -> None:
        self.size = size
        self.pieces = pieces

    def with_size(self, size: int) -> Content:
        """The first `size` bytes, zeros where there were fewer."""
        return Content(size, self._without(size, max(size, self.size)))

    def put(self, offset: int, data: bytes) -> Content:
        """The same with `data` there; what reaches beyond the end is dropped."""
        data = data[: max(0, self.size - offset)]
        return Content(self.size, tuple(sorted((*self._without(offset, offset + len(data)), (offset, data)))))

    def zero(self, offset: int, length: int) -> Content:
        return Content(self.size, self._without(offset, offset + length))

    def _without(self, start: int, end: int) -> tuple[tuple[int, bytes], ...]:
        """The pieces outside of a range, cut where they reach into it."""
        left: list[tuple[int, bytes]] = []
        for offset, data in self.pieces:
            if offset + len(data) <= start or offset >= end:
                left.append((offset, data))
                continue
            if offset < start:
                left.append((offset, data[: start - offset]))
            if offset + len(data) > end:
                left.append((end, data[end - offset :]))
        return tuple(left)

    def chunks(self) -> Iterator[bytes]:
        """All of it, in pieces of a bounded size."""
        for offset, length, data in self._runs():
            if data:
                yield data
            else:
                for start in range(offset, offset + length, _CHUNK):
                    yield _ZEROS[: offset + length - start]

    def _runs(self) -> Iterator[tuple[int, int, bytes]]:
        """Offset, length and data of every piece, and of the zeros between them, with no data."""
        position = 0
        for offset, data in self.pieces:
            if offset > position:
                yield position, offset - position, b""
            yield offset, len(data), data
            position = offset + len(data)
        if position < self.size:
            yield position, self.size - position, b""

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def first_difference(self, file: BinaryIO) -> int | None:
        """The first byte in which a file differs from this, as far as both go. Holes of the file are not read."""
        fd = file.fileno()
        end = min(self.size, os.fstat(fd).st_size)
        for offset, length, data in self._runs():
            for start in range(offset, min(offset + length, end), _CHUNK):
                count = min(_CHUNK, offset + length - start, end - start)
                if not data and _is_hole(fd, start, count):
                    continue
                expected = data[start - offset : start - offset + count] if data else _ZEROS[:count]
                found = os.pread(fd, count, start)
                if found != expected:
                    pairs = zip(found, expected, strict=False)
                    return start + next((i for i, (a, b) in enumerate(pairs) if a != b), len(found))
        return None


def _is_hole(fd: int, start: int, length: int) -> bool:
    try:
        return os.lseek(fd, start, os.SEEK_DATA) >= start + length
    except OSError:  # ENXIO: no data from there on; EINVAL: a file system that does not know holes
        return os.fstat(fd).st_blocks == 0
