"""A disk in memory, its copy-before-write, and its snapshot: what the tests of that begin with."""

from __future__ import annotations

import random

from qcow2snap.block.copy_before_write import CopyBeforeWriteNode
from qcow2snap.block.snapshot_access import SnapshotAccessNode
from tests.block.memory import BLOCK, MemoryDisk

K = 1024
CLUSTER = 64 * K
SIZE = 5 * CLUSTER + 3 * BLOCK + 512  # the last cluster is short


class Fleecing:
    """A disk and a target in memory, the node between them, and its snapshot."""

    def __init__(self, content: bytes | None = None, target: MemoryDisk | None = None, **options: object) -> None:
        self.before = content if content is not None else random.Random(1).randbytes(SIZE)
        self.disk = MemoryDisk(self.before)
        self.target = target or MemoryDisk(bytes(len(self.before)))
        self.node = CopyBeforeWriteNode(self.disk, self.target, **options)  # type: ignore[arg-type]
        self.snapshot = SnapshotAccessNode(self.node)

    def write(self, offset: int, length: int, fill: bytes = b"!") -> None:
        self.node.pwritev(offset, [bytearray(fill * length)])

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        return self.snapshot.pread(offset, self.node.size - offset if length is None else length)

    def is_intact(self) -> bool:
        return self.read() == self.before
