"""Nodes that are easy to reason about, and what the tests of the NBD server and client share."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qcow2snap.block.node import BlockNode, Buffer, Extent, FileError, Status
from qcow2snap.nbd.connection import Connection
from qcow2snap.nbd.export import Export, Exports
from qcow2snap.nbd.server import Server

DATA = Status.DATA | Status.ALLOCATED
ZERO = Status.ZERO


class PatchworkNode(BlockNode):
    """Runs of a file's bytes, of bytes that are in no file, of zeros, and of damage, in any order.

    A run is (kind, length): "file", "memory", "zero" or "bad". The bytes are those of `content`, zeros where it is so.
    """

    def __init__(self, path: Path, runs: Sequence[tuple[str, int]], *, stable: bool = True, seed: int = 1) -> None:
        self.filename = str(path)
        self.stable = stable
        self.size = sum(length for _, length in runs)
        self.runs = runs
        self.bad: list[tuple[int, int]] = []
        raw = bytes((i * 7 + i // 251 + seed) % 255 + 1 for i in range(4096)) * (self.size // 4096 + 1)
        content = bytearray(raw[: self.size])
        offset = 0
        for kind, length in runs:
            if kind == "zero":
                content[offset : offset + length] = bytes(length)
            elif kind == "bad":
                self.bad.append((offset, offset + length))
            offset += length
        self.content = bytes(content)
        path.write_bytes(bytes(512) + self.content)  # the file's offsets are not the disk's
        self._fd = os.open(path, os.O_RDONLY)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.check_range(offset, sum(map(len, buffers)))
        for buffer in buffers:
            end = offset + len(buffer)
            if any(start < end and offset < stop for start, stop in self.bad):
                raise FileError(f"{self.filename}: damaged")
            buffer[:] = self.content[offset:end]
            offset = end

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        self.check_range(offset, length)
        start, end = 0, offset + length
        for kind, run in self.runs:
            low, high = max(start, offset), min(start + run, end)
            start += run
            if low >= high:
                continue
            if kind == "zero":
                yield Extent(low, high - low, ZERO)
            elif kind == "file":
                yield Extent(low, high - low, DATA, 0, self, 512 + low)
            else:
                yield Extent(low, high - low, DATA)


class ZeroNode(BlockNode):
    """So many zeros."""

    def __init__(self, size: int) -> None:
        self.size = size

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.check_range(offset, sum(map(len, buffers)))
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        self.check_range(offset, length)
        yield Extent(offset, length, ZERO)


NewNode = Callable[..., PatchworkNode]
Serve = Callable[..., Server]


def exports(**nodes: BlockNode) -> Exports:
    """Exports by name; `default` is the one without."""
    return Exports(
        Export("" if name == "default" else name, lambda node=node: node, f"about {name}")
        for name, node in nodes.items()
    )


@contextmanager
def connected(what: Exports, *, handshake_timeout: float = 10.0) -> Iterator[socket.socket]:
    """A client's end of a connection that is being served."""
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    connection = Connection(theirs, "test", what, handshake_timeout=handshake_timeout)
    thread = threading.Thread(target=connection.run)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(20)
        assert not thread.is_alive()


def run(*command: str | Path, check: bool = True, timeout: float = 60) -> str:
    """A program's standard output."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout
