"""Every write and flush that reaches an image's files, and the states that a crash may leave of them.

A crash leaves what was written before the last flush that had ended, and of what was written since, each sector as it
was at some moment: none, some or all of a write, in any order. The size of a file is that of what is left.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from qcow2snap.block.graph import open_raw
from qcow2snap.block.node import Buffer
from qcow2snap.block.qcow2.header import as_text, read_header
from qcow2snap.block.qcow2.writing.image_file import ImageFile
from qcow2snap.block.qcow2.writing.node import WritableQcow2Node

SECTOR = 512


@dataclass(frozen=True)
class Write:
    """Bytes that reached a file."""

    path: Path
    offset: int
    data: bytes


@dataclass(frozen=True)
class Flush:
    """A flush of one file that ended here; `since`: what was written before the event of that number is durable."""

    path: Path
    since: int


@dataclass(frozen=True)
class Mark:
    """What each sector of the disk may hold from here on, as a guest has it."""

    allowed: list[tuple[bytes, ...]]
    guest: int


@dataclass
class Log:
    """All events, in their order, and the files before the first of them."""

    before: dict[Path, bytes]
    events: list[Write | Flush | Mark] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, event: Write | Flush | Mark) -> None:
        with self.lock:
            self.events.append(event)

    def mark(self, allowed: list[tuple[bytes, ...]], guest: int = 0) -> None:
        self.add(Mark(list(allowed), guest))

    def durable(self, position: int) -> dict[Path, int]:
        """Up to which event the writes to each file are durable, when so many events have happened."""
        result = dict.fromkeys(self.before, 0)
        for event in self.events[:position]:
            if isinstance(event, Flush):
                result[event.path] = max(result[event.path], event.since)
        return result

    def state(self, position: int) -> dict[Path, bytes]:
        """The files as they were after so many events: what a process leaves that is killed."""
        files = {path: bytearray(data) for path, data in self.before.items()}
        for event in self.events[:position]:
            if isinstance(event, Write):
                _apply(files[event.path], event.offset, event.data)
        return {path: bytes(content) for path, content in files.items()}

    def crashed(self, position: int, chosen: random.Random) -> dict[Path, bytes]:
        """One of the states that a power cut may leave after so many events."""
        files = {path: bytearray(data) for path, data in self.before.items()}
        durable = self.durable(position)
        keep = chosen.choice([0.1, 0.5, 0.9])
        tear = chosen.choice([0.0, 0.5])
        for number, event in enumerate(self.events[:position]):
            if not isinstance(event, Write):
                continue
            if number < durable[event.path]:
                _apply(files[event.path], event.offset, event.data)
            elif tear and chosen.random() < tear:
                for offset, part in _sectors(event):
                    if chosen.random() < keep:
                        _apply(files[event.path], offset, part)
            elif chosen.random() < keep:
                _apply(files[event.path], event.offset, event.data)
        return {path: bytes(content) for path, content in files.items()}


def _apply(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        content += bytes(offset - len(content))
    content[offset : offset + len(data)] = data


def _sectors(write: Write) -> list[tuple[int, bytes]]:
    first = write.offset // SECTOR * SECTOR
    cuts = [
        write.offset,
        *range(first + SECTOR, write.offset + len(write.data), SECTOR),
        write.offset + len(write.data),
    ]
    return [(start, write.data[start - write.offset : end - write.offset]) for start, end in pairwise(cuts)]


class RecordedFile(ImageFile):
    """A file of an image whose writes are logged. Nothing waits for the disk: the log knows what is durable."""

    def __init__(self, path: Path, log: Log) -> None:
        self.path = path
        self._log = log
        super().__init__(str(path))

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        super().pwritev(offset, buffers)
        self._log.add(Write(self.path, offset, b"".join(map(bytes, buffers))))

    def pdiscard(self, offset: int, length: int) -> None:
        super().pdiscard(offset, length)
        self._log.add(Write(self.path, offset, bytes(length)))

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        super().pwrite_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback)
        self._log.add(Write(self.path, offset, bytes(length)))

    def flush(self) -> None:
        since = len(self._log.events)
        self._log.add(Flush(self.path, since))


def open_recorded(
    path: Path, *, data_file: Path | None = None, discard_no_unref: bool = False
) -> tuple[WritableQcow2Node, Log]:
    """An image open for writing, and the log of what is written to it."""
    log = Log({each: each.read_bytes() for each in (path, data_file) if each is not None})
    file = RecordedFile(path, log)
    header = read_header(file)
    backing = None
    if header.backing_file is not None:
        backing = open_raw(str(path.parent / as_text(header.backing_file)))
    node = WritableQcow2Node(
        file,
        header,
        data_file=None if data_file is None else RecordedFile(data_file, log),
        backing=backing,
        discard_no_unref=discard_no_unref,
    )
    return node, log
