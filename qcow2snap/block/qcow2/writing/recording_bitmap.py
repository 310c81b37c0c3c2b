"""A dirty bitmap in memory that records (QEMU's BdrvDirtyBitmap). Where it is kept in the image is not known here."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock

from qcow2snap.block.qcow2.bitmaps import Run, joined, ones

_SLICE = 1 << 16  # bytes of bits that are looked at together


class RecordingBitmap:
    """Which parts of a disk of `size` bytes were written, in units of `granularity` bytes.

    threads  any; what is set while somebody looks may be seen or not
    memory   a bit for each unit, and of those that were never set, as a rule, none
    """

    def __init__(self, size: int, granularity: int) -> None:
        self.size = size
        self.granularity = granularity
        self._shift = granularity.bit_length() - 1
        self._bits = bytearray(nbytes(size, granularity))  # of each byte, the least significant bit is the first
        self._lock = Lock()  # over changes of _bits

    def set(self, offset: int, length: int) -> None:
        """A range is dirty; what of it is beyond the end of the disk is not there."""
        if not length:
            return
        first = offset >> self._shift
        stop = -(-min(offset + length, self.size) >> self._shift)
        if first + 1 == stop:
            index, bit = first >> 3, 1 << (first & 7)
            if not self._bits[index] & bit:  # most of what is written was written before
                with self._lock:
                    self._bits[index] |= bit
        elif first < stop:
            with self._lock:
                self._set_many(first, stop)

    def _set_many(self, first: int, stop: int) -> None:
        """Locked. More than one bit."""
        bits, whole, end = self._bits, -(-first // 8), stop // 8
        if whole > end:  # all in one byte
            bits[end] |= (1 << stop % 8) - (1 << first % 8)
            return
        if first % 8:
            bits[whole - 1] |= 0xFF << first % 8 & 0xFF
        bits[whole:end] = b"\xff" * (end - whole)
        if stop % 8:
            bits[end] |= (1 << stop % 8) - 1

    def dirty(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Offset and length of each dirty run in a range of the disk, in order, none touching the next."""
        return joined(self._runs(offset, min(offset + length, self.size)), offset)

    def _runs(self, offset: int, end: int) -> Iterator[Run]:
        granularity = self.granularity
        first, stop = offset >> self._shift, -(-end >> self._shift)
        for start in range(first // 8, -(-stop // 8), _SLICE):
            for one, until in ones(bytes(self._bits[start : start + _SLICE])):
                low = max(offset, (8 * start + one) * granularity)
                high = min(end, (8 * start + until) * granularity)
                if low < high:
                    yield low, high

    def load(self, index: int, bits: bytes) -> None:
        """Take over cluster `index` of bits that are in a file; all clusters but the last are as long as `bits`."""
        start = index * len(bits)
        with self._lock:
            self._bits[start : start + len(bits)] = bits[: len(self._bits) - start]
            self._clear_tail()

    def clusters(self, cluster_size: int) -> Iterator[bytes]:
        """The bits, cut and filled up with zeros to clusters of a file; without bytes where all of a cluster are 0."""
        for start in range(0, len(self._bits), cluster_size):
            part = bytes(self._bits[start : start + cluster_size])
            yield part.ljust(cluster_size, b"\0") if part.count(0) < len(part) else b""

    def resize(self, size: int) -> None:
        """Of a disk of another size; what is new of it is clean."""
        with self._lock:
            length = nbytes(size, self.granularity)
            if length > len(self._bits):
                self._bits.extend(bytes(length - len(self._bits)))
            else:
                del self._bits[length:]
            self.size = size
            self._clear_tail()

    def _clear_tail(self) -> None:
        """Locked. What is beyond the disk is 0, as the specification wants it."""
        in_last = -(-self.size >> self._shift) % 8
        if in_last:
            self._bits[-1] &= (1 << in_last) - 1


def nbytes(size: int, granularity: int) -> int:
    """The bytes of a bitmap of a disk of so many bytes."""
    return -(-size // (8 * granularity))
