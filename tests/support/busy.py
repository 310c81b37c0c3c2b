"""A disk that QEMU writes as fast as it can, making and deleting snapshots under the same names all the time."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tests.support import table
from tests.support.qmp import RunningQemu, file_node
from tests.support.tools import TIME_LIMIT, qemu_img

BLOCK = 4096  # bytes that are written by one generation
_WORDS = BLOCK // 8
_PERIOD = 512  # bytes of a pattern file
_MAX_SIZE = 48 << 20


class Key(NamedTuple):
    """What no two snapshots share."""

    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int


class BusyDisk:
    """An image in use, and what each of its snapshots holds: every 8 bytes say in which generation they were written.

    "kept" is there all the time; the others come and go. A context manager: at its exit nobody writes any more.
    """

    def __init__(self, path: Path, *, discard: str, size: int = 8 << 20, seed: int = 1) -> None:
        self.path = path
        self.deleted: set[Key] = set()  # or about to be
        self.generations = 0
        self._contents: dict[Key, NDArray[np.uint64]] = {}
        self._blocks = np.zeros(size // BLOCK, dtype=np.uint64)
        self._discard = discard
        self._random = random.Random(seed)
        self._pattern = path.with_name("pattern")
        self._standing: dict[str, Key] = {}
        self._making = threading.Lock()  # held until what is in the table is known here
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        options = "cluster_size=4096,compat=1.1"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))

    def __enter__(self) -> Self:
        self._qemu = RunningQemu(file_node(self.path), discard=self._discard).__enter__()
        self._write(0, len(self._blocks))
        for name in ("kept", "daily", "hourly", "now"):
            self._write_somewhere()
            self._create(name)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(TIME_LIMIT)
        self._qemu.__exit__(kind, error, traceback)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def expected(self, key: Key, offset: int, length: int) -> bytes:
        """What a snapshot of the table holds."""
        with self._making:
            blocks = self._contents[key]
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        data = np.repeat(blocks[first:last], _WORDS).astype(">u8").tobytes()
        return data[offset - first * BLOCK :][:length]

    def keys_named(self, name: str) -> list[Key]:
        """All snapshots that ever had a name, up to now."""
        with self._making:
            return [key for key in self._contents if key.name == name]

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                name = self._random.choice(["daily", "hourly", "now"])
                for _ in range(self._random.randrange(3)):
                    self._write_somewhere()
                self.deleted.add(self._standing.pop(name))
                self._qemu.delete(name)
                for _ in range(self._random.randrange(3)):
                    self._write_somewhere()
                self._create(name)
                if self._random.random() < 0.05 and len(self._blocks) * BLOCK < _MAX_SIZE:
                    self._blocks = np.append(self._blocks, np.zeros((1 << 20) // BLOCK, dtype=np.uint64))
                    self._qemu.resize(len(self._blocks) * BLOCK)
        except BaseException as failure:
            self._failure = failure

    def _create(self, name: str) -> None:
        with self._making:
            self._qemu.snapshot(name)
            entry = table.read_table(self.path)[-1]
            key = Key(entry.id.decode(), entry.name.decode(), entry.date_sec, entry.date_nsec, entry.vm_clock_nsec)
            self._standing[name] = key
            self._contents[key] = self._blocks.copy()

    def _write_somewhere(self) -> None:
        first = self._random.randrange(len(self._blocks))
        count = min(self._random.choice([1, 16, 256]), len(self._blocks) - first)
        if self._random.random() < 0.1:
            self._qemu.io(f"write -zu {first * BLOCK} {count * BLOCK}")
            self._blocks[first : first + count] = 0
        else:
            self._write(first, count)

    def _write(self, first: int, count: int) -> None:
        self.generations += 1
        self._pattern.write_bytes(self.generations.to_bytes(8, "big") * (_PERIOD // 8))
        self._qemu.io(f"write -s {self._pattern} {first * BLOCK} {count * BLOCK}")
        self._blocks[first : first + count] = self.generations
