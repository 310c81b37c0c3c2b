"""Copying a node to a new qcow2 image: `extract -O qcow2`. Its tables are a SequentialWriter's.

Threads read, find clusters of zeros, and compress; one thread takes their results in the guest's order and gives out
host clusters, so that the image is the same to the last byte however many threads there are; threads write. Zeros get
no cluster, whether the source's tables or only its bytes say so. Benchmark: tests/benchmarks/extract_qcow2.py.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from qcow2snap.block.node import BlockNode
from qcow2snap.block.qcow2.creating.compress import compressor
from qcow2snap.block.qcow2.creating.create import preallocate
from qcow2snap.block.qcow2.creating.create_options import CreateOptions, Preallocation
from qcow2snap.block.qcow2.creating.sequential import SequentialWriter
from qcow2snap.forensics.copy import BATCH_SIZE, WRITE_SIZE, Progress, extents_of, read_into
from qcow2snap.forensics.salvage import Hole

_MOST_RUNS = 256  # in one batch


class Run(NamedTuple):
    """Clusters of the new disk that follow each other: the first one's number, and how many."""

    first: int
    nb_clusters: int


class Piece(NamedTuple):
    """Clusters as they are to be stored: as they are, or one compressed."""

    run: Run
    data: memoryview | bytes
    is_compressed: bool


class Target(NamedTuple):
    """Where the new image goes. The file descriptors stay the caller's."""

    options: CreateOptions
    fd: int
    data_fd: int | None = None  # of the external data file
    in_place: bool = False  # `fd` is no empty file


def copy_qcow2(
    node: BlockNode,
    offset: int,
    length: int,
    target: Target,
    *,
    compress: bool = False,
    skip_damaged: bool = False,
    progress: Progress = lambda _count: None,
    workers: int | None = None,
) -> list[Hole]:
    """Copy a range of a node into a new image. Returns the holes that were left, as copy_sparse does."""
    copy = _Qcow2Copy(node, offset, length, target, compress, skip_damaged)
    workers = workers or min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        try:
            copy.run(pool, 2 * workers + 2, progress)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    copy.finish()
    return sorted(copy.holes)


class _Qcow2Copy:
    """One copy under way. `read` and `write` run in any thread, all else in one."""

    def __init__(
        self, node: BlockNode, base: int, length: int, target: Target, compress: bool, skip_damaged: bool
    ) -> None:
        self._node = node
        self._base = base  # offset in the node of the new disk's first byte
        self._length = length
        self._target = target
        self._skip_damaged = skip_damaged
        self._compress = compressor(target.options.compression_type) if compress else None
        self._cluster_size = target.options.cluster_size
        self._clusters = -(-target.options.size // self._cluster_size)
        self._done = 0  # clusters that are placed, or are zeros
        self._writer = SequentialWriter(target.fd, target.options, in_place=target.in_place)
        self._data_fd = target.fd if target.data_fd is None else target.data_fd
        if target.data_fd is not None:
            os.ftruncate(target.data_fd, target.options.size)
        self.holes: list[Hole] = []

    def run(self, pool: ThreadPoolExecutor, nb_buffers: int, progress: Progress) -> None:
        free = [memoryview(bytearray(BATCH_SIZE)) for _ in range(nb_buffers)]
        reads: deque[tuple[Future[list[Piece]], memoryview]] = deque()
        writes: deque[tuple[Future[None], memoryview]] = deque()

        def settle() -> None:
            """The oldest batch that is being read, on to where it is written."""
            read, buffer = reads.popleft()
            before = self._done
            placed = [(host, piece.data) for piece in read.result() for host in [self._place(piece)]]
            writes.append((pool.submit(self._write, placed), buffer))
            progress((self._done - before) * self._cluster_size)

        for batch in self._batches():
            while not free:
                if len(writes) * 2 < nb_buffers:
                    settle()
                else:
                    write, buffer = writes.popleft()
                    write.result()
                    free.append(buffer)
            buffer = free.pop()
            reads.append((pool.submit(self._read, batch, buffer), buffer))
        while reads:
            settle()
        for write, _ in writes:
            write.result()

    def finish(self) -> None:
        self._skip_to(self._clusters)
        self._writer.finish(flush=self._target.in_place)

    # -- what has to be read ------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[list[Run]]:
        """Runs, so many together as fit into a buffer."""
        batch: list[Run] = []
        room = per_batch = BATCH_SIZE // self._cluster_size
        for run in self._runs():
            first, count = run
            while count:
                taken = min(count, room)
                batch.append(Run(first, taken))
                first, count, room = first + taken, count - taken, room - taken
                if not room or len(batch) == _MOST_RUNS:
                    yield batch
                    batch, room = [], per_batch
        if batch:
            yield batch

    def _runs(self) -> Iterator[Run]:
        """The clusters that are not known to be zeros, each once."""
        start = end = 0
        for extent in extents_of(self._node, self._base, self._length, self._skip_damaged):
            if isinstance(extent, Hole):
                self.holes.append(extent)
                continue
            if not extent.must_read:
                continue
            first = (extent.offset - self._base) // self._cluster_size
            if first > end:
                if end > start:
                    yield Run(start, end - start)
                start = first
            end = -(-(extent.end - self._base) // self._cluster_size)
            if (end - start) * self._cluster_size >= BATCH_SIZE:  # the last one may go on in the next extent
                yield Run(start, end - start)
                start = end
        if end > start:
            yield Run(start, end - start)

    # -- in threads ---------------------------------------------------------------------------------------------------

    def _read(self, batch: list[Run], buffer: memoryview) -> list[Piece]:
        """The clusters of a batch that are no zeros."""
        pieces: list[Piece] = []
        for run in batch:
            data, buffer = (
                buffer[: run.nb_clusters * self._cluster_size],
                buffer[run.nb_clusters * self._cluster_size :],
            )
            start = run.first * self._cluster_size
            count = min(len(data), self._length - start)
            self.holes += read_into(self._node, self._base + start, data[:count], self._skip_damaged)
            data[count:] = bytes(len(data) - count)
            pieces += self._pieces(run, data)
        return pieces

    def _pieces(self, run: Run, data: memoryview) -> Iterator[Piece]:
        words = np.frombuffer(data, dtype=np.uint64).reshape(run.nb_clusters, -1)
        is_data = words.any(axis=1)
        if self._compress is not None:
            for index in np.flatnonzero(is_data).tolist():
                cluster = data[index * self._cluster_size : (index + 1) * self._cluster_size]
                compressed = self._compress(cluster)
                is_smaller = len(compressed) < self._cluster_size
                yield Piece(Run(run.first + index, 1), compressed if is_smaller else cluster, is_smaller)
            return
        edges = np.flatnonzero(np.diff(is_data, prepend=False, append=False)).tolist()
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            stored = data[first * self._cluster_size : end * self._cluster_size]
            yield Piece(Run(run.first + first, end - first), stored, False)

    def _write(self, placed: list[tuple[int, memoryview | bytes]]) -> None:
        """At their host offsets; what lies side by side there, together."""
        index = 0
        while index < len(placed):
            host, data = placed[index]
            together, size, index = [data], len(data), index + 1
            while index < len(placed) and placed[index][0] == host + size and size < WRITE_SIZE:
                together.append(placed[index][1])
                size, index = size + len(together[-1]), index + 1
            view = memoryview(b"".join(together) if len(together) > 1 else data)
            if self._target.data_fd is not None:  # which is no longer than the disk
                view = view[: self._target.options.size - host]
            while view:
                count = os.pwrite(self._data_fd, view[:WRITE_SIZE], host)
                view, host = view[count:], host + count

    # -- in order -----------------------------------------------------------------------------------------------------

    def _place(self, piece: Piece) -> int:
        """Where in the file it goes."""
        run = piece.run
        self._skip_to(run.first)
        self._done = run.first + run.nb_clusters
        offset = run.first * self._cluster_size
        if piece.is_compressed:
            return self._writer.allocate_compressed(offset, len(piece.data))
        return self._writer.allocate(offset, run.nb_clusters * self._cluster_size)

    def _skip_to(self, cluster: int) -> None:
        """Zeros up to a cluster: nothing, unless everything is to have its space."""
        options = self._target.options
        while options.is_preallocated and self._done < cluster:
            count = min(cluster - self._done, options.l2_entries)
            offset, length = self._done * self._cluster_size, count * self._cluster_size
            host = self._writer.allocate(offset, length, holds_data=False)
            if options.preallocation is not Preallocation.OFF:
                end = host + length if self._target.data_fd is None else min(host + length, options.size)
                preallocate(self._data_fd, host, end - host, options.preallocation)
            self._done += count
        self._done = max(self._done, cluster)
