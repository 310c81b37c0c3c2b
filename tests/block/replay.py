"""An image that changes under a reader exactly as QEMU changed it, one write at a time, whenever the test says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qcow2snap.block.file import FileNode
from qcow2snap.block.node import Buffer, SnapshotInfo
from qcow2snap.block.qcow2 import in_use
from tests.support import qemu_img, table
from tests.support.qmp import RunningQemu
from tests.support.write_log import Write, logged, read_log

Key = tuple[bytes, bytes, int, int, int]  # id, name, date and VM clock: what no two snapshots share


def key_of(snapshot: SnapshotInfo) -> Key:
    return (
        snapshot.id.encode(), snapshot.name.encode(), snapshot.date_sec, snapshot.date_nsec, snapshot.vm_clock_nsec
    )  # fmt: skip


def keys_in(image: Path) -> list[Key]:
    """The snapshots of an image's table, by a reader that is not under test."""
    return [(e.id, e.name, e.date_sec, e.date_nsec, e.vm_clock_nsec) for e in table.read_table(image)]


@dataclass
class History:
    """A disk while QEMU writes it: what each of its snapshots holds."""

    qemu: RunningQemu
    path: Path
    content: bytearray
    snapshots: dict[Key, bytes] = field(default_factory=dict)

    def write(self, offset: int, length: int, value: int, *, compressed: bool = False) -> None:
        """Compressed: one cluster at a time, and only where nothing else was ever written."""
        step = table.cluster_size(self.path) if compressed else length
        for start in range(offset, offset + length, step):
            self.qemu.io(f"write {'-c ' if compressed else ''}-P {value} {start} {step}")
        self.content[offset : offset + length] = bytes([value]) * length

    def discard(self, offset: int, length: int) -> None:
        self.qemu.io(f"write -zu {offset} {length}")
        self.content[offset : offset + length] = bytes(length)

    def snapshot(self, name: str) -> None:
        self.qemu.snapshot(name)
        self.snapshots[keys_in(self.path)[-1]] = bytes(self.content)

    def delete(self, name: str) -> None:
        self.qemu.delete(name)

    def resize(self, size: int) -> None:
        self.qemu.resize(size)
        self.content += bytes(size - len(self.content))


class Replay:
    """The file as it was before the first of the logged writes, and the writes to come."""

    def __init__(self, path: Path, before: bytes, writes: Sequence[Write], contents: dict[Key, bytes]) -> None:
        self.path = path
        self.writes = writes
        self.contents = contents  # of each snapshot that ever was
        content, self._states = bytearray(before), [before]
        for offset, data in writes:
            content += bytes(max(0, offset + len(data) - len(content)))
            content[offset : offset + len(data)] = data
            self._states.append(bytes(content))
        self.standing = []
        for position in range(len(writes) + 1):
            self.go_to(position)
            self.standing.append(set(keys_in(path)))

    def go_to(self, position: int) -> None:
        """The file as it was after so many writes."""
        self.position = position
        with self.path.open("r+b") as file:
            file.write(self._states[position])
            file.truncate()

    def advance(self, count: int = 1) -> None:
        """The next writes, as far as there are any."""
        writes = self.writes[self.position : self.position + count]
        with self.path.open("r+b", buffering=0) as file:
            for offset, data in writes:
                file.seek(offset)
                file.write(data)
        self.position += len(writes)

    @contextmanager
    def ticking(self, monkeypatch: pytest.MonkeyPatch, tick: Callable[[], None]) -> Iterator[None]:
        """Around reads during which the file may change."""
        read, readv = FileNode.pread_available, FileNode.preadv_available

        def pread_available(file: FileNode, offset: int, length: int) -> bytes:
            tick()
            return read(file, offset, length)

        def preadv_available(file: FileNode, offset: int, buffers: Sequence[Buffer]) -> int:
            tick()
            return readv(file, offset, buffers)

        with monkeypatch.context() as patch:
            patch.setattr(FileNode, "pread_available", pread_available)
            patch.setattr(FileNode, "preadv_available", preadv_available)
            patch.setattr(in_use.time, "sleep", lambda _seconds: tick())
            yield


def record(directory: Path, size: int, events: Callable[[History], None], *, discard: str, **options: object) -> Replay:
    """What QEMU writes while `events` happen to a new image of `size` bytes."""
    path, log = directory / "disk.qcow2", directory / "log"
    qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(f"{k}={v}" for k, v in options.items()), path, str(size))
    before = path.read_bytes()
    with RunningQemu(logged(path, log), discard=discard, flush=True) as qemu:
        history = History(qemu, path, bytearray(size))
        events(history)
    return Replay(path, before, list(read_log(log)), history.snapshots)
