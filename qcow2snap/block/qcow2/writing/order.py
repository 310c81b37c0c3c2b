"""What must be on disk before what, when an image is written. What a guest changes of the tables goes this way.

A crash leaves the file with all that was written before the last flush that ended, and with any part of what was
written since, in whatever order; one sector is old or new as a whole. It must then be a sound image that lacks nothing
which was flushed to it. Space that nobody uses but the refcounts say so (a leak) is the worst that may be left. Hence:

1. What a reference leads to is on disk before the reference: data before the L2 entry, an L2 table before the L1
   entry, a refcount block before the entry of the refcount table, all tables before the header's pointer.
2. So is the refcount that counts the reference. A refcount on disk may be too high, never too low.
3. A cluster is used for nothing else, and its refcount does not sink, before the last reference to it is gone from the
   disk; nor while somebody reads or writes it who has looked up where it is (users.py).
4. A cluster that a snapshot shares is never written: its entries on disk have no COPIED flag when the header has the
   snapshot. So snapshots come and go in one step, from one whole state of all tables to another (shadow.py).

Tables are changed in memory. A commit takes what has changed at one moment, and writes it in stages, a flush between
any two of them (QEMU orders its two metadata caches to the same end, table by table: block/qcow2-cache.c):

    UNSEEN      new refcount blocks, or a whole new refcount table: nothing in the file refers to them
    COUNTS      the refcount table's entries, or the header's pointer to the new one; refcounts; tables that are new.
                With the flush after this, all data is on disk that L2 entries of this moment lead to
    REFERENCES  changes of L2 tables and of the L1 table that the file has already
    POINTERS    the header's fields for what is on disk by then, such as the disk's size

When the last of them is flushed, what was released before the commit began can be used again: its refcounts sink, in
memory; the next commit writes them. So refcounts in memory may be written at any moment, L2 and L1 tables may not.

What goes on meanwhile is for the next commit. So guests write and allocate while a commit waits for the disk. A stage
of which there is nothing costs no flush: if only data was written, a flush of the disk is one flush of the file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from qcow2snap.block.node import NotSupported, Qcow2SnapError
from qcow2snap.block.qcow2.writing.image_file import ImageFile
from qcow2snap.block.qcow2.writing.overlap import Section, Sections
from qcow2snap.block.qcow2.writing.users import Users

MAX_RELEASED = 1 << 14  # entries: more do not wait for the guest to flush, or the file would grow for ever
_PATIENCE = 10.0  # seconds for which still() waits for readers
_PAUSE = 0.001
_PUNCH = 64 << 20  # bytes: no longer holes are made at once


class Stage(IntEnum):
    """When something is written; each is on disk before the next begins."""

    UNSEEN = 0
    COUNTS = 1
    REFERENCES = 2
    POINTERS = 3


class TableWrite(NamedTuple):
    """Bytes for the file, and the section that they belong to: they may overwrite no other."""

    offset: int
    data: bytes
    section: Section | None


class Batch:
    """What one commit writes."""

    def __init__(self) -> None:
        self.writes: dict[Stage, list[TableWrite]] = {stage: [] for stage in Stage}
        self._undo: list[Callable[[], None]] = []
        self._before: dict[Stage, list[Callable[[], None]]] = {stage: [] for stage in Stage}

    def add(
        self, stage: Stage, offset: int, data: bytes, section: Section | None, undo: Callable[[], None] = lambda: None
    ) -> None:
        """`undo`: the same has to be in the next batch again, as this one failed. Called with the lock held."""
        self.writes[stage].append(TableWrite(offset, data, section))
        self._undo.append(undo)

    def before(self, stage: Stage, call: Callable[[], None]) -> None:
        """Have something called, with the lock held, when all stages before this one are on disk."""
        self._before[stage].append(call)

    def begin(self, stage: Stage) -> None:
        for call in self._before[stage]:
            call()

    def undo(self) -> None:
        for undo in self._undo:
            undo()


class Source(Protocol):
    """Tables in memory that differ from the file."""

    @property
    def is_dirty(self) -> bool: ...

    def collect(self, batch: Batch) -> None:
        """Put all that differs into a batch, as it is now. Called with the lock held."""


class Counts(Protocol):
    """What the order asks of refcounts, with the lock held."""

    def add_many(self, clusters: NDArray[np.uint64], addends: NDArray[np.int64]) -> None: ...

    def last_references(
        self, clusters: NDArray[np.uint64], addends: NDArray[np.int64]
    ) -> NDArray[np.uint64]: ...  # those of the clusters that nothing refers to any more after add_many


class Release(NamedTuple):
    """Clusters of each of which one reference is gone. `punch`: the file system may have the space back."""

    clusters: range
    punch: bool

    def arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The clusters, and what is to be added to the refcount of each."""
        return np.asarray(self.clusters, dtype=np.uint64), np.full(len(self.clusters), -1, dtype=np.int64)


class WriteOrder:
    """Commits of what has changed, one at a time.

    lock     over everything in memory that the sources have; commits take it for moments
    threads  commit() and flush() from any, without the lock; the others with it
    errors   FileError, NoSpace. What could not be written is still to be written then, and nothing is released
    """

    def __init__(
        self, file: ImageFile, data_file: ImageFile | None, cluster_bits: int, sections: Sections, users: Users
    ) -> None:
        self.lock = threading.Lock()
        self._file = file
        self._data_file = data_file
        self._cluster_bits = cluster_bits
        self._sections = sections
        self._users = users
        self._sources: list[Source] = []
        self._counts: Counts | None = None
        self._committing = threading.Lock()
        self._queued: list[tuple[Stage, TableWrite]] = []
        self._released: list[Release] = []
        # Released by what is committed, but perhaps still used by those who began before a generation.
        self._waiting: list[tuple[int, list[Release]]] = []
        # Gives what to raise when a table would overwrite another one, and marks the image: host offset, what happened.
        self.corrupt: Callable[[int, str], Qcow2SnapError] = lambda offset, what: Qcow2SnapError(
            f"{what} ({offset:#x})"
        )

    def set_sources(self, counts: Counts, sources: Iterable[Source]) -> None:
        self._counts = counts
        self._sources = list(sources)

    @property
    def is_due(self) -> bool:
        """Whether so much was released that it should not wait for a flush."""
        return len(self._released) > MAX_RELEASED

    def queue(self, stage: Stage, offset: int, data: bytes, section: Section | None = None) -> None:
        """Have the next commit write this as well."""
        self._queued.append((stage, TableWrite(offset, data, section)))

    def release(self, clusters: range, *, punch: bool = False) -> None:
        """One reference to each of these clusters is gone from tables in memory; it counts until the file has that."""
        if len(clusters):
            self._released.append(Release(clusters, punch))

    def commit(self) -> None:
        """Bring all that has changed to the disk. When this returns, all data written before it is there, too."""
        with self._committing:
            with self.lock:
                batch = self._collect()
                released, self._released = self._released, []
                queued, self._queued = self._queued, []
                generation = self._users.next_generation()
            try:
                self._write(batch)
            except BaseException:
                with self.lock:
                    batch.undo()
                    self._queued = queued + self._queued
                    self._released = released + self._released
                raise
            if released:
                self._waiting.append((generation, released))
            if self._waiting:
                self._reuse()

    @property
    def is_clean(self) -> bool:
        """Whether the file has all that is in memory, as far as tables go, and nothing waits to be free."""
        return not (self._released or self._waiting or self._queued or any(source.is_dirty for source in self._sources))

    @contextmanager
    def still(self) -> Iterator[None]:
        """With the lock held, the file has all that is in memory, nothing waits to be free, and no commit is under way.

        Writers have to be stopped, or it may never be so. It waits for readers who are in the middle of a read.
        """
        deadline = time.monotonic() + _PATIENCE
        while True:
            self.write_back()
            with self._committing, self.lock:
                if self.is_clean:
                    yield
                    return
            if time.monotonic() > deadline:
                raise NotSupported("the image is being read and written without a pause; try again")
            time.sleep(_PAUSE)

    def write_back(self) -> None:
        """Bring what has changed of the tables to the file, if anything has."""
        if not self.is_clean:
            self.commit()

    def _collect(self) -> Batch:
        batch = Batch()
        for source in self._sources:
            source.collect(batch)
        for stage, write in self._queued:
            batch.writes[stage].append(write)
        return batch

    def _write(self, batch: Batch) -> None:
        written = False  # what the next stage has to wait for; data is, for those who refer to it
        for stage in Stage:
            writes = batch.writes[stage]
            if not writes:
                continue
            if written or stage >= Stage.REFERENCES:
                self._barrier()
            with self.lock:
                batch.begin(stage)
                self._check(writes)
            for write in _joined(writes):
                self._file.pwritev(write.offset, [memoryview(write.data)])
            written = True
        self._barrier()

    def _check(self, writes: Iterable[TableWrite]) -> None:
        for write in writes:
            found = self._sections.overlap(write.offset, len(write.data), write.section)
            if found is not None:
                what = "other metadata" if write.section is None else f"the {write.section.value}"
                raise self.corrupt(write.offset, f"{what} would be written over the {found.value}")

    def _barrier(self) -> None:
        if self._data_file is not None:
            self._data_file.flush()
        self._file.flush()

    def _reuse(self) -> None:
        """Make free what nobody refers to on disk, and nobody uses who came before that."""
        assert self._counts is not None
        oldest = self._users.oldest()
        ready = [release for generation, batch in self._waiting if generation < oldest for release in batch]
        self._waiting = [each for each in self._waiting if each[0] >= oldest]
        for release in ready:
            clusters, addends = release.arrays()
            if release.punch:
                with self.lock:
                    last = self._counts.last_references(clusters, addends)
                self._punch(last)
            with self.lock:
                self._counts.add_many(clusters, addends)

    def _punch(self, clusters: NDArray[np.uint64]) -> None:
        """Give the space of clusters that are free now, but not yet to be found so, back to the file system."""
        if not len(clusters):
            return
        ends = np.flatnonzero(np.diff(clusters) != 1)
        starts, stops = np.append(0, ends + 1), np.append(ends + 1, len(clusters))
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            offset = int(clusters[start]) << self._cluster_bits
            end = min(offset + ((stop - start) << self._cluster_bits), self._file.size)
            for part in range(offset, end, _PUNCH):
                self._file.pdiscard(part, min(_PUNCH, end - part))


def _joined(writes: list[TableWrite]) -> Iterable[TableWrite]:
    """Writes that follow each other in the file as one."""
    pending: list[TableWrite] = []
    end = -1
    for write in sorted(writes, key=lambda write: write.offset):
        if write.offset != end and pending:
            yield _one(pending)
            pending = []
        pending.append(write)
        end = write.offset + len(write.data)
    if pending:
        yield _one(pending)


def _one(writes: list[TableWrite]) -> TableWrite:
    if len(writes) == 1:
        return writes[0]
    return TableWrite(writes[0].offset, b"".join(write.data for write in writes), None)
