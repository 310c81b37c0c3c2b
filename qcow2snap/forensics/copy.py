"""Copying a node to a file descriptor: the fast path of `extract`, and its plain twin for pipes.

The extents are cut into batches of about 2 MiB, which threads copy: bytes that lie verbatim in a file go inside the
kernel with copy_file_range (a reflink file system shares them), all others through preadv, where decompression lets go
of the GIL. Zeros and holes are skipped: the output is new and sparse. Figures: tests/benchmarks/; tests compare this
with copy_stream.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from qcow2snap.block.node import BlockNode, Extent, ImageFormatError
from qcow2snap.forensics.salvage import Hole, hole_of, readable_extents

BATCH_SIZE = 2 << 20  # bytes
_STREAM_SIZE = 1 << 20  # bytes
_BATCH_EXTENTS = 256
_ZEROS = memoryview(bytes(_STREAM_SIZE))
# copy_file_range does not do it between these files; read and write do.
_NOT_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EIO, errno.ETXTBSY}

Progress = Callable[[int], None]


def copy_sparse(
    node: BlockNode,
    offset: int,
    length: int,
    fd: int,
    *,
    skip_damaged: bool = False,
    write_zeros: bool = False,
    progress: Progress = lambda _count: None,
    workers: int | None = None,
) -> list[Hole]:
    """Copy a range of a node to the start of a seekable file, which reads as zeros already unless `write_zeros`.

    Returns the holes that were left, in order; without `skip_damaged` the first damage is raised.
    """
    holes: list[Hole] = []
    pending: deque[Future[list[Hole]]] = deque()
    workers = workers or min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in _batches(node, offset, length, skip_damaged, write_zeros, holes, progress):
                pending.append(pool.submit(_copy_batch, node, batch, offset, fd, skip_damaged))
                while len(pending) > 2 * workers:
                    holes += pending.popleft().result()
            while pending:
                holes += pending.popleft().result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return sorted(holes)


def copy_stream(
    node: BlockNode,
    offset: int,
    length: int,
    write: Callable[[memoryview], None],
    *,
    skip_damaged: bool = False,
    progress: Progress = lambda _count: None,
) -> list[Hole]:
    """Copy a range of a node in order, zeros and all: for pipes. Holes of damaged parts are written as zeros."""
    holes: list[Hole] = []
    buffer = memoryview(bytearray(_STREAM_SIZE))
    for extent in _extents(node, offset, length, skip_damaged):
        if isinstance(extent, Hole):
            holes.append(extent)
        for start, count in _pieces(extent.offset, extent.length, _STREAM_SIZE):
            if isinstance(extent, Extent) and extent.must_read:
                holes += _read(node, start, buffer[:count], skip_damaged)
                write(buffer[:count])
            else:
                write(_ZEROS[:count])
            progress(count)
    return holes


def _extents(node: BlockNode, offset: int, length: int, skip_damaged: bool) -> Iterator[Extent | Hole]:
    return readable_extents(node, offset, length) if skip_damaged else node.block_status(offset, length)


def _pieces(offset: int, length: int, size: int) -> Iterator[tuple[int, int]]:
    """Offset and length of pieces that end at multiples of `size`, so that no cluster is read twice."""
    end = offset + length
    while offset < end:
        count = min(size - offset % size, end - offset)
        yield offset, count
        offset += count


def _batches(
    node: BlockNode,
    offset: int,
    length: int,
    skip_damaged: bool,
    write_zeros: bool,
    holes: list[Hole],
    progress: Progress,
) -> Iterator[list[Extent]]:
    """What has to be written, in batches of bounded size; holes are put aside, progress counts what is passed by."""
    batch: list[Extent] = []
    size = 0
    for extent in _extents(node, offset, length, skip_damaged):
        if isinstance(extent, Hole):
            holes.append(extent)
            progress(extent.length)
            continue
        if not (extent.must_read or write_zeros):
            progress(extent.length)
            continue
        for start, count in _pieces(extent.offset, extent.length, BATCH_SIZE):
            file_offset = extent.file_offset + start - extent.offset
            batch.append(extent._replace(offset=start, length=count, file_offset=file_offset))
            size += count
            if size >= BATCH_SIZE or len(batch) >= _BATCH_EXTENTS:
                progress(size)
                yield batch
                batch, size = [], 0
    if batch:
        progress(size)
        yield batch


def _copy_batch(node: BlockNode, batch: Iterable[Extent], base: int, fd: int, skip_damaged: bool) -> list[Hole]:
    """Write these extents to their places; `base` is the guest offset of the output's first byte."""
    holes: list[Hole] = []
    for extent in batch:
        if not extent.must_read:
            _write_at(fd, _zeros(extent.length), extent.offset - base)
        elif not _copy_in_kernel(extent, fd, extent.offset - base):
            buffer = memoryview(bytearray(extent.length))
            holes += _read(node, extent.offset, buffer, skip_damaged)
            _write_at(fd, buffer, extent.offset - base)
    return holes


def _zeros(length: int) -> memoryview:
    return _ZEROS[:length] if length <= len(_ZEROS) else memoryview(bytes(length))


def _copy_in_kernel(extent: Extent, fd: int, position: int) -> bool:
    """copy_file_range; False if the bytes do not lie verbatim in a file, or not all could be copied so."""
    if extent.file is None:
        return False
    source, file_offset, rest = extent.file.fileno(), extent.file_offset, extent.length
    try:
        while rest:
            count = os.copy_file_range(source, fd, rest, file_offset, position)
            if count == 0:  # the file ends within its last cluster: the rest are zeros, which preadv knows
                return False
            file_offset, position, rest = file_offset + count, position + count, rest - count
    except OSError as error:
        if error.errno in _NOT_IN_KERNEL:
            return False
        raise
    return True


def _read(node: BlockNode, offset: int, buffer: memoryview, skip_damaged: bool) -> list[Hole]:
    """Fill the buffer; with `skip_damaged` what cannot be read is zeros, and told."""
    holes: list[Hole] = []
    position, end = offset, offset + len(buffer)
    while position < end:
        try:
            node.preadv(position, [buffer[position - offset :]])
            break
        except ImageFormatError as error:
            if not skip_damaged:
                raise
            hole = hole_of(error, position, end)
            if hole.offset > position:
                node.preadv(position, [buffer[position - offset : hole.offset - offset]])
            position = hole.offset + hole.length
            buffer[hole.offset - offset : position - offset] = bytes(hole.length)
            holes.append(hole)
    return holes


def _write_at(fd: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(fd, data, position)
        data, position = data[count:], position + count
