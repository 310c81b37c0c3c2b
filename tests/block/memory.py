"""A disk in memory that can be stopped, or made to fail, at any point of what it does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qcow2snap.block.node import BlockNode, Buffer, Extent, Qcow2SnapError, Status, merged

BLOCK = 4096  # bytes that are allocated and freed together
WAIT = 20  # seconds, after which a test has failed

# What a disk does, in the places where it can be stopped; "-half" lies between the two halves of the bytes.
Hook = Callable[[str, int, int], None]


class MemoryDisk(BlockNode):
    """Its content, which of its blocks take space, and a hook that is called before each step, with its range."""

    read_only = False
    filename = "memory"
    stable = False

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.size = len(content)
        self.allocated = {n for n in range(-(-self.size // BLOCK)) if any(content[n * BLOCK : (n + 1) * BLOCK])}
        self.calls: list[tuple[str, int, int]] = []
        self.hook: Hook = lambda *step: None

    def fileno(self) -> int:
        raise AssertionError("there is none")

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        length = sum(map(len, buffers))
        self.check_range(offset, length)
        self._step("read", offset, length)
        middle = offset + length // 2
        data = bytes(self.content[offset:middle])
        self._step("read-half", offset, length)
        data += bytes(self.content[middle : offset + length])
        for buffer in buffers:
            buffer[:] = data[: len(buffer)]
            data = data[len(buffer) :]

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(map(bytes, buffers))
        self.check_range(offset, len(data))
        self._step("write", offset, len(data))
        middle = len(data) // 2
        self.content[offset : offset + middle] = data[:middle]
        self._step("write-half", offset, len(data))
        self.content[offset + middle : offset + len(data)] = data[middle:]
        self.allocated |= {*range(offset // BLOCK, -(-(offset + len(data)) // BLOCK))}

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        self.pdiscard(offset, length)

    def pdiscard(self, offset: int, length: int) -> None:
        self.check_range(offset, length)
        self._step("discard", offset, length)
        self.content[offset : offset + length] = bytes(length)
        self.allocated -= {*range(-(-offset // BLOCK), (offset + length) // BLOCK)}

    def flush(self) -> None:
        self._step("flush", 0, 0)

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        self.check_range(offset, length)
        self._step("status", offset, length)
        return merged(self._extents(offset, offset + length))

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        while offset < end:
            stop = min(end, (offset // BLOCK + 1) * BLOCK)
            status = Status.DATA if offset // BLOCK in self.allocated else Status.ZERO
            yield Extent(offset, stop - offset, status | Status.ALLOCATED, 0, self, offset)
            offset = stop

    def _step(self, what: str, offset: int, length: int) -> None:
        self.calls.append((what, offset, length))
        self.hook(what, offset, length)


class Gate:
    """Stops who comes to one step of a disk, until it is opened."""

    def __init__(self, what: str, at: int | None = None) -> None:
        self._what, self._at = what, at
        self._came, self._open = threading.Semaphore(0), threading.Event()

    def __call__(self, what: str, offset: int, length: int) -> None:
        if what == self._what and (self._at is None or offset <= self._at < offset + length):
            self._came.release()
            assert self._open.wait(WAIT)

    def wait_for_one(self) -> None:
        assert self._came.acquire(timeout=WAIT)

    def open(self) -> None:
        self._open.set()


class Task(threading.Thread):
    """Something done in a thread: a moment is enough to see that it waits, or ends."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        super().__init__(daemon=True)
        self._call = lambda: function(*args)
        self.error: BaseException | None = None
        self._result: object = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self.error = error

    def waits(self) -> bool:
        self.join(0.1)
        return self.is_alive()

    def result(self) -> object:
        self.join(WAIT)
        assert not self.is_alive(), "it hangs"
        if self.error is not None:
            raise self.error
        return self._result


def failing(what: str, error: Qcow2SnapError) -> Hook:
    def hook(step: str, offset: int, length: int) -> None:
        if step == what:
            raise error

    return hook


@contextmanager
def stopped(disk: MemoryDisk, what: str, at: int | None = None) -> Iterator[Gate]:
    """Who comes to that step while this lasts is stopped there; all go on at its end."""
    gate = Gate(what, at)
    disk.hook = gate
    try:
        yield gate
    finally:
        gate.open()
        disk.hook = lambda *step: None
