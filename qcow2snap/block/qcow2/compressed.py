"""Compressed clusters: from an L2 entry to the bytes of a cluster, the last of them kept within a budget of bytes.

Fast path: libdeflate, or one zstd decompressor for each thread; both let go of the GIL. libdeflate wants a stream that
ends where the cluster does, which QEMU always writes; whatever it refuses is tried again with zlib, which reads what
the specification allows: "decompression stops when it has produced a cluster of data".
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence

from formats.qcow2 import SECTOR_SIZE, CompressionType, compressed_l2_entry
from qcow2snap.block.file import FileNode
from qcow2snap.block.lru import BoundedCache
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader

_SPAN = 1 << 20  # bytes of compressed clusters that are read at once
_GAP = 1 << 14  # bytes between them that are read in vain: cheaper than another call
_LOCKS = 61  # clusters that may be under way to the cache at once; a prime, as entries have a common factor

# Fills a buffer of a cluster with what a stream holds. Damaged or too short: ValueError.
Decompress = Callable[[bytes | memoryview, memoryview], None]


class CompressedClusters:
    """Reads compressed clusters of one image file.

    threads  any; each decompresses on its own, and what one has decompressed in `cluster` serves all
    errors   ImageFormatError where the data is not in the file or does not decompress; FileError
    """

    def __init__(self, file: FileNode, header: ImageHeader, cache_size: int) -> None:
        self._file = file
        self._cluster_size = header.cluster_size
        entry = compressed_l2_entry(header.cluster_bits)
        self._offset_mask = entry.mask("offset")
        sectors = entry.ranges["additional_sectors"]
        self._sectors_mask, self._sectors_shift = sectors.mask, sectors.first
        is_zstd = header.compression_type == CompressionType.ZSTD
        self._decompress: Decompress = zstd_decompress if is_zstd else deflate_decompress
        self._cache: BoundedCache[int, memoryview] = BoundedCache(cache_size)
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def host_range(self, entry: int) -> tuple[int, int]:
        """Host offset and length of the data that an L2 entry describes; its last sector may hold other data too."""
        host_offset = entry & self._offset_mask
        sectors = ((entry & self._sectors_mask) >> self._sectors_shift) + 1
        return host_offset, sectors * SECTOR_SIZE - host_offset % SECTOR_SIZE

    def cluster(self, entry: int) -> memoryview:
        """The decompressed cluster of an L2 entry. Kept: whoever wants a part of it will soon want another."""
        cluster = self._cache.get(entry)
        if cluster is None:
            with self._locks[entry % _LOCKS]:  # so that of several who want it one does the work
                cluster = self._cache.get(entry)
                if cluster is None:
                    cluster = memoryview(bytearray(self._cluster_size))
                    host_offset, length = self.host_range(entry)
                    self._fill(cluster, self._file.pread_available(host_offset, length), host_offset)
                    self._cache.put(entry, cluster, len(cluster))
        return cluster

    def read(self, entries: Sequence[int], buffers: Sequence[memoryview]) -> Iterator[None]:
        """Decompress clusters into buffers of their size, one at each step. Not kept: nobody reads them twice.

        Writers put compressed clusters one behind the other: what lies close together is read at once.
        """
        ranges = [self.host_range(entry) for entry in entries]
        for (host_offset, _), data, buffer in zip(ranges, self._data(ranges), buffers, strict=True):
            self._fill(buffer, data, host_offset)
            yield

    def _data(self, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        """What lies in these parts of the file, as far as it is there."""
        if len(ranges) == 1:
            return [self._file.pread_available(*ranges[0])]
        datas: list[memoryview] = [memoryview(b"")] * len(ranges)
        order = sorted(range(len(ranges)), key=ranges.__getitem__)
        index = 0
        while index < len(order):
            start, length = ranges[order[index]]
            end, last = start + length, index + 1
            while last < len(order) and ranges[order[last]][0] - end <= _GAP and end - start < _SPAN:
                end = max(end, sum(ranges[order[last]]))
                last += 1
            data = memoryview(self._file.pread_available(start, end - start))
            for each in order[index:last]:
                host_offset, length = ranges[each]
                datas[each] = data[host_offset - start :][:length]
            index = last
        return datas

    def _fill(self, cluster: memoryview, data: bytes | memoryview, host_offset: int) -> None:
        if not data:
            raise rules.COMPRESSED_IN_FILE.broken(
                host_offset, f"the compressed cluster at {host_offset:#x} lies beyond the end of the file"
            )
        try:
            self._decompress(data, cluster)
        except ValueError as error:
            raise rules.COMPRESSED_DATA.broken(
                host_offset, f"the compressed cluster at {host_offset:#x} does not decompress: {error}"
            ) from None


def deflate_decompress(data: bytes | memoryview, cluster: memoryview) -> None:
    """Fill a cluster from a raw deflate stream. Damaged or too short: ValueError."""
    import deflate

    try:
        content = deflate.deflate_decompress(data, len(cluster))
    except deflate.DeflateError:
        deflate_decompress_slowly(data, cluster)
    else:
        _put(content, cluster)


def deflate_decompress_slowly(data: bytes | memoryview, cluster: memoryview) -> None:
    """As deflate_decompress, with zlib: the plain twin, and what reads streams that do not end with the cluster."""
    try:
        _put(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, len(cluster)), cluster)
    except zlib.error as error:
        raise ValueError(str(error)) from None


_thread = threading.local()


def zstd_decompress(data: bytes | memoryview, cluster: memoryview) -> None:
    """Fill a cluster from zstd frames. Damaged or too short: ValueError."""
    import zstandard

    try:
        decompressor = _thread.zstd
    except AttributeError:
        decompressor = _thread.zstd = zstandard.ZstdDecompressor()
    try:
        # One frame that states its size is decompressed straight into the buffer. Others would be by way of a window,
        # whose size they choose.
        if zstandard.frame_content_size(data) == len(cluster) == decompressor.stream_reader(data).readinto(cluster):
            return
    except zstandard.ZstdError:
        pass
    zstd_decompress_slowly(data, cluster)


def zstd_decompress_slowly(data: bytes | memoryview, cluster: memoryview) -> None:
    """Fill a cluster from one or more zstd frames, streamed: the plain twin, for what one call refuses."""
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
            _put(reader.read(len(cluster)), cluster)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def _put(content: bytes | bytearray, cluster: memoryview) -> None:
    if len(content) != len(cluster):
        raise ValueError(f"the stream ends after {len(content)} of {len(cluster)} bytes")
    cluster[:] = content
