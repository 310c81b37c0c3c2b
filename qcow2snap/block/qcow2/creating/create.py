"""New, empty images: what `qemu-img create -f qcow2` makes (QEMU block/qcow2.c: qcow2_co_create)."""

from __future__ import annotations

import os

from qcow2snap.block.qcow2.creating.create_options import CreateOptions, Preallocation
from qcow2snap.block.qcow2.creating.sequential import SequentialWriter

_ZEROS = memoryview(bytes(1 << 20))


def create(fd: int, options: CreateOptions, data_fd: int | None = None, *, in_place: bool = False) -> None:
    """Write an empty image to `fd`, an empty file or `in_place` of what a device holds, and make it durable.

    With options.data_file, `data_fd` is that file, which gets the disk's size. Raises OSError, InvalidOption.
    """
    writer = SequentialWriter(fd, options, in_place=in_place)
    if data_fd is not None:
        os.ftruncate(data_fd, options.size)
    if options.is_preallocated:
        step = options.l2_entries * options.cluster_size
        for offset in range(0, options.size, step):
            length = min(step, -(-options.size // options.cluster_size) * options.cluster_size - offset)
            host = writer.allocate(offset, length, holds_data=False)
            if data_fd is None:
                preallocate(fd, host, length, options.preallocation)
            else:
                preallocate(data_fd, host, min(length, options.size - offset), options.preallocation)
    if data_fd is not None:
        os.fdatasync(data_fd)
    writer.finish(flush=True)
    os.fdatasync(fd)


def preallocate(fd: int, offset: int, length: int, mode: Preallocation) -> None:
    """Have a range of a new file take the space that the mode says. It reads as zeros before and after."""
    if mode is Preallocation.FALLOC:
        os.posix_fallocate(fd, offset, length)
    elif mode is Preallocation.FULL:
        end = offset + length
        while offset < end:
            offset += os.pwrite(fd, _ZEROS[: end - offset], offset)
