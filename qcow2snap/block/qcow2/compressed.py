"""Compressed clusters: from an L2 entry to the bytes of a cluster, the last of them kept within a budget of bytes.

What is asked for ahead (`prefetch`) is decompressed by a pool of threads, one a processor, some clusters at a time.
Whoever needs a cluster that the pool has not begun yet takes it from there and does it himself, so that nobody waits
while there is work.

Fast path: libdeflate, or one zstd decompressor for each thread; both let go of the GIL. libdeflate wants a stream that
ends where the cluster does, which QEMU always writes; whatever it refuses is tried again with zlib, which reads what
the specification allows: "decompression stops when it has produced a cluster of data".
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from formats.qcow2 import SECTOR_SIZE, CompressionType, compressed_l2_entry
from qcow2snap.block.file import FileNode
from qcow2snap.block.lru import BoundedCache
from qcow2snap.block.node import Qcow2SnapError
from qcow2snap.block.pool import Job, thread_pool
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader

# What a codec gave. Some give a bytearray, which nobody writes to once it is here.
Cluster = bytes | bytearray

_SPAN = 1 << 20  # bytes of compressed clusters that are read at once
_GAP = 1 << 14  # bytes between them that are read in vain: cheaper than another call
# Bytes of clusters that are decompressed ahead at most, and no more than half of the cache: 64 clusters. A pool that
# runs further ahead takes the processors from who sends, and so from the client: with 16 MiB, zlib took 1.3 times as
# long.
_AHEAD = 4 << 20
_TOGETHER = 256 << 10  # bytes of clusters in one job of the pool: a small part of a millisecond, and one call to read


class CompressedClusters:
    """Reads compressed clusters of one image file.

    threads  any; each decompresses on its own, and what one has decompressed serves all
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
        self._decompress = zstd_decompress if is_zstd else deflate_decompress
        self._cache: BoundedCache[int, Cluster] = BoundedCache(cache_size)
        self._max_coming = min(_AHEAD, cache_size // 2) // header.cluster_size
        self._together = max(1, _TOGETHER // header.cluster_size)
        # By entry: the job of the pool that decompresses it, or is about to, and all the entries of that job.
        self._coming: dict[int, tuple[Job, Sequence[int]]] = {}
        self._lock = threading.Lock()  # over _coming

    def host_range(self, entry: int) -> tuple[int, int]:
        """Host offset and length of the data that an L2 entry describes; its last sector may hold other data too."""
        host_offset = entry & self._offset_mask
        sectors = ((entry & self._sectors_mask) >> self._sectors_shift) + 1
        return host_offset, sectors * SECTOR_SIZE - host_offset % SECTOR_SIZE

    def cluster(self, entry: int) -> Cluster:
        """The decompressed cluster of an L2 entry. Kept: whoever wants a part of it will soon want another."""
        cluster = self._cache.get(entry)
        if cluster is None and (job := self._begun(entry)):
            job.wait()
            cluster = self._cache.get(entry)
        if cluster is None:
            (cluster,) = self._decompressed([entry])
            self._cache.put(entry, cluster, len(cluster))
        return cluster

    def clusters(self, entries: Sequence[int]) -> Iterator[Cluster]:
        """The decompressed clusters of many entries, in turn, for whoever wants them whole. Kept only if fetched ahead.

        Writers put compressed clusters one behind the other: what lies close together is read at once.
        """
        missing = [entry for entry in entries if entry not in self._cache and self._begun(entry) is None]
        if not missing:
            yield from map(self.cluster, entries)
            return
        decompressed = self._decompressed(missing)
        rest = iter(missing)
        next_missing = next(rest)
        for entry in entries:
            if entry == next_missing:
                yield next(decompressed)
                next_missing = next(rest, -1)
            else:
                yield self.cluster(entry)

    def prefetch(self, entries: Iterable[int]) -> None:
        """Have the pool decompress these, as far as there is room. What fails there fails again where it is read."""
        with self._lock:
            coming = self._coming
            wanted = [entry for entry in entries if entry not in self._cache and entry not in coming]
            del wanted[max(0, self._max_coming - len(coming)) :]
            for start in range(0, len(wanted), self._together):
                together = wanted[start : start + self._together]
                job = thread_pool().submit(partial(self._bring, together))
                coming.update(dict.fromkeys(together, (job, together)))

    def close(self) -> None:
        """Let go of what is asked for ahead, so that nothing reads the file when it is closed."""
        with self._lock:
            jobs = {job for job, _ in self._coming.values()}
            self._coming.clear()
        for job in jobs:
            if not job.take_back():
                job.wait()

    def _begun(self, entry: int) -> Job | None:
        """What the pool is doing about an entry. If it has only meant to: nothing, from now on."""
        coming = self._coming.get(entry)
        if coming is None:
            return None
        job, together = coming
        if not job.take_back():
            return job
        self._forget(together)
        return None

    def _bring(self, entries: Sequence[int]) -> None:
        try:
            for entry, cluster in zip(entries, self._decompressed(entries), strict=True):
                self._cache.put(entry, cluster, len(cluster))
        except Qcow2SnapError:
            pass
        finally:
            self._forget(entries)

    def _forget(self, entries: Sequence[int]) -> None:
        with self._lock:
            for entry in entries:
                self._coming.pop(entry, None)

    def _decompressed(self, entries: Sequence[int]) -> Iterator[Cluster]:
        if len(entries) == 1:
            host_offset, length = self.host_range(entries[0])
            yield self._cluster_of(self._file.pread_available(host_offset, length), host_offset)
            return
        ranges = [self.host_range(entry) for entry in entries]
        datas: list[memoryview | None] = [None] * len(ranges)
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
        for (host_offset, _), each_data in zip(ranges, datas, strict=True):
            assert each_data is not None
            yield self._cluster_of(each_data, host_offset)

    def _cluster_of(self, data: bytes | memoryview, host_offset: int) -> Cluster:
        if not data:
            raise rules.COMPRESSED_IN_FILE.broken(
                host_offset, f"the compressed cluster at {host_offset:#x} lies beyond the end of the file"
            )
        try:
            return self._decompress(data, self._cluster_size)
        except ValueError as error:
            raise rules.COMPRESSED_DATA.broken(
                host_offset, f"the compressed cluster at {host_offset:#x} does not decompress: {error}"
            ) from None


def deflate_decompress(data: bytes | memoryview, cluster_size: int) -> Cluster:
    """`cluster_size` bytes from a raw deflate stream. Damaged or too short: ValueError."""
    import deflate

    try:
        cluster: bytearray = deflate.deflate_decompress(data, cluster_size)
    except deflate.DeflateError:
        return deflate_decompress_slowly(data, cluster_size)
    if len(cluster) != cluster_size:
        raise ValueError(f"the stream ends after {len(cluster)} of {cluster_size} bytes")
    return cluster


def deflate_decompress_slowly(data: bytes | memoryview, cluster_size: int) -> bytes:
    """As deflate_decompress, with zlib: the plain twin, and what reads streams that do not end with the cluster."""
    try:
        cluster = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, cluster_size)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(cluster) != cluster_size:
        raise ValueError(f"the stream ends after {len(cluster)} of {cluster_size} bytes")
    return cluster


_thread = threading.local()


def zstd_decompress(data: bytes | memoryview, cluster_size: int) -> bytes:
    """`cluster_size` bytes from zstd frames. Damaged or too short: ValueError."""
    import zstandard

    try:
        decompressor = _thread.zstd
    except AttributeError:
        decompressor = _thread.zstd = zstandard.ZstdDecompressor()
    try:
        # The decompressor believes a frame that states its size, and allocates that.
        if zstandard.frame_content_size(data) <= cluster_size:
            cluster: bytes = decompressor.decompress(data, max_output_size=cluster_size, allow_extra_data=True)
            if len(cluster) == cluster_size:
                return cluster
    except zstandard.ZstdError:
        pass
    return zstd_decompress_slowly(data, cluster_size)


def zstd_decompress_slowly(data: bytes | memoryview, cluster_size: int) -> bytes:
    """`cluster_size` bytes from one or more zstd frames, streamed: the plain twin, for what one call refuses."""
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
            cluster: bytes = reader.read(cluster_size)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(cluster) != cluster_size:
        raise ValueError(f"the stream ends after {len(cluster)} of {cluster_size} bytes")
    return cluster
