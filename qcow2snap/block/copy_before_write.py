"""Copy-before-write: a disk that is written, and beside it what it was when this node was put above it.

The guest reads and writes `file` through this node. Before a cluster of it is changed for the first time, what was
there goes to `target`. The snapshot, that is the moment of insertion, is read from wherever it still is. Options and
meaning are those of QEMU's copy-before-write filter (block/copy-before-write.c and block/block-copy.c). Ranges under
way are `in_flight`'s; that the snapshot is a node of its own is `snapshot_access`'s.

Where a cluster of the snapshot is. QEMU has three bitmaps for that, which can only be in these four states:

    state      copy  done  access   read from                  what changes it
    ON_DISK    1     0     1        file                       copied: ON_TARGET or ZERO; discarded: NONE
    ON_TARGET  0     1     1        target                     discarded: NONE
    ZERO       (QEMU writes zeros)  nowhere, it is zeros       discarded: NONE
    NONE       0     any   0        AccessDenied (EACCES)      nothing

A cluster begins as NONE if `bitmap` was given and does not touch it, else as ON_DISK. A cluster that reads as zeros is
remembered, not copied. The last one may be shorter; it is as whole as the disk has it.

Who waits for whom:

    guest write  until each of its clusters is no longer ON_DISK, whoever copies it: of several writers one does, and
                 the others wait for that. Then until no snapshot read of these clusters from `file` is under way
                 (QEMU's frozen reads): new ones go to the target. Discards and zeros are writes. Then it is written.
    snapshot     for nobody. A read is split where the state changes; each part is entered as under way before the lock
     read        that told its state is given away. So a part is read from one place, which does not change meanwhile.
    snapshot     its clusters are NONE at once, so that nobody begins to copy or read them. Then it waits for the copies
     discard     and reads of the target that are under way there, and gives the target's space back. Parts of clusters
                 at its ends stay, as in QEMU.
    flush        of the guest reaches `file`, and `target` if it was written. (QEMU's reaches `file` only.)

What each failure does. A copy fails if `file` cannot be read, `target` cannot be written or has no room (`max_target`
included), or if it takes longer than `cbw_timeout`, waiting for others' copies included. The cluster is ON_DISK still,
so the snapshot is right in any case:

    break-guest-write  the guest's write fails, and has changed nothing. A later one tries again.
    break-snapshot     the guest's write goes on. The snapshot is lost: every read of it, also one that is under way,
                       is AccessDenied from now on, and nothing is copied any more.

A copy that takes too long is not stopped: it goes on in a thread of its own, and close() waits for it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from qcow2snap.block.block_copy import Clusters, read_clusters
from qcow2snap.block.buffers import Cursor
from qcow2snap.block.in_flight import InFlight, Range
from qcow2snap.block.node import (
    AccessDenied,
    BlockNode,
    Buffer,
    Change,
    ChangedExtent,
    Extent,
    NoSpace,
    OutOfRange,
    Qcow2SnapError,
    ReadOnly,
    SnapshotAccess,
    SnapshotInfo,
    Status,
    UnsupportedFeature,
    merged,
)

DEFAULT_CLUSTER_SIZE = 1 << 16  # bytes: QEMU BLOCK_COPY_CLUSTER_SIZE_DEFAULT
MAX_CLAIM = 1 << 24  # bytes that are claimed for copying at once; who writes there waits for all of it
STATUS_SIZE = 1 << 26  # bytes whose block status is asked for at once, with guest writes held off
MAX_LATE_COPIES = 64  # threads that copy where there is a timeout; beyond that, a copy waits for its turn

ON_DISK, ON_TARGET, ZERO, NONE = range(4)
_RUN = [re.compile(bytes([state]) + b"+") for state in range(4)]  # of clusters in one state
_CHANGED = re.compile(b"[^%c]+" % ON_DISK)
# For translate(): what was on the disk is elsewhere now, all else stays.
_AS_ON_TARGET, _AS_ZERO = (bytes([new, *range(1, 256)]) for new in (ON_TARGET, ZERO))


class OnCbwError(Enum):
    """Who pays for a copy that failed."""

    BREAK_GUEST_WRITE = "break-guest-write"
    BREAK_SNAPSHOT = "break-snapshot"


class CopyTimeout(Qcow2SnapError):
    """A copy took longer than cbw-timeout."""


class Held(NamedTuple):
    """A part of the snapshot that stays where it is while it is read."""

    state: int
    length: int  # bytes
    child: BlockNode  # to be read, unless the state is ZERO
    reads: InFlight | None  # where it is entered as under way
    ticket: Range | None


class CopyBeforeWriteNode(BlockNode, SnapshotAccess):
    """A disk, and its one unnamed snapshot: what it was when this node was made.

    size     that of `file`, in bytes, and the snapshot's too
    threads  any: guests, readers and discarders at once
    errors   of `file`. Of a copy that failed as `on_cbw_error` says. Of the snapshot: AccessDenied
    memory   a byte for each cluster: 16 MiB for a TiB
    owns     nothing: `file` and `target` stay open when this node is closed. Until then nobody else writes either
    """

    snapshot_status_may_change = True

    def __init__(
        self,
        file: BlockNode,
        target: BlockNode,
        *,
        bitmap: Iterable[tuple[int, int]] | None = None,
        on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE,
        cbw_timeout: float = 0,
        min_cluster_size: int = 0,
        max_target: int | None = None,
    ) -> None:
        """`bitmap`: offsets and lengths of what the snapshot keeps, rounded to clusters; default: all.

        `cbw_timeout` in seconds, 0: none. `min_cluster_size` in bytes, a power of 2. `max_target`, which QEMU has not:
        bytes that the target may hold at a time.
        """
        if min_cluster_size < 0 or min_cluster_size & (min_cluster_size - 1):
            raise UnsupportedFeature(f"min-cluster-size {min_cluster_size} is not a power of 2")
        if target.read_only:
            raise ReadOnly("the target of copy-before-write is read-only")
        if target.size < file.size:
            raise OutOfRange(f"the target has {target.size} bytes, fewer than the disk, which has {file.size}")
        self.file = file
        self.target = target
        self.size = file.size
        self.read_only = file.read_only
        self.nb_backing = file.nb_backing
        self.cluster_size = max(DEFAULT_CLUSTER_SIZE, min_cluster_size)
        self.copied = 0  # bytes that were copied to the target so far
        self.held = 0  # bytes that the target holds for the snapshot now, or is about to
        self._clusters = -(-file.size // self.cluster_size)
        self._on_cbw_error = on_cbw_error
        self._cbw_timeout = cbw_timeout
        self._max_target = max_target
        now = time.time_ns()
        self._snapshot = SnapshotInfo("", "", file.size, 0, now // 10**9, now % 10**9, 0, None)
        self._states = bytearray([ON_DISK if bitmap is None else NONE]) * self._clusters
        for offset, length in bitmap or ():
            file.check_range(offset, length)
            first, last = self._touched(offset, length)
            self._states[first:last] = bytes([ON_DISK]) * (last - first)
        # Guards all state. No I/O is done while it is held.
        self._lock = threading.Lock()
        self._copies = InFlight(self._lock)
        self._disk_reads = InFlight(self._lock)
        self._target_reads = InFlight(self._lock)
        self._broken: Qcow2SnapError | None = None
        self._target_is_dirty = False
        self._late_copies = threading.BoundedSemaphore(MAX_LATE_COPIES)

    @property
    def snapshot_error(self) -> Qcow2SnapError | None:
        """What broke the snapshot."""
        return self._broken

    # The guest's side.

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.file.preadv(offset, buffers)

    def preadv_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        return self.file.preadv_nowait(offset, buffers)

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        return self.file.block_status(offset, length, want_zero=want_zero)

    def prefetch(self, offset: int, length: int) -> None:
        self.file.prefetch(offset, length)

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.before_write(offset, sum(map(len, buffers)))
        self.file.pwritev(offset, buffers)

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        self.before_write(offset, length)
        self.file.pwrite_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback)

    def pdiscard(self, offset: int, length: int) -> None:
        self.before_write(offset, length)
        self.file.pdiscard(offset, length)

    def flush(self) -> None:
        self.file.flush()
        with self._lock:
            is_dirty, self._target_is_dirty = self._target_is_dirty and self._broken is None, False
        if is_dirty:
            try:
                self.target.flush()
            except Qcow2SnapError as error:
                with self._lock:
                    self._target_is_dirty = True
                self._failed(error)

    def close(self) -> None:
        """Wait for the copies that nobody waits for any more."""
        with self._lock:
            self._copies.wait(0, self._clusters)

    # The snapshot's side.

    def snapshots(self) -> Sequence[SnapshotInfo]:
        return (self._snapshot,)

    def preadv_snapshot(self, snapshot: SnapshotInfo, offset: int, buffers: Sequence[Buffer]) -> None:
        length = sum(map(len, buffers))
        self.check_range(offset, length)
        end = offset + length
        cursor: Cursor | None = None
        while offset < end:
            held = self._hold(offset, end - offset)
            try:
                if held.length == length and held.state != ZERO:  # as a rule: all of it, from one place
                    held.child.preadv(offset, buffers)
                else:
                    cursor = cursor or Cursor(buffers)
                    if held.state == ZERO:
                        cursor.zero(held.length)
                    else:
                        held.child.preadv(offset, cursor.take(held.length))
            finally:
                self._let_go(held)
            self._check_not_broken()  # guests wait for us no more then: it may not be what was asked for
            offset += held.length

    def preadv_snapshot_nowait(self, snapshot: SnapshotInfo, offset: int, buffers: Sequence[Buffer]) -> bool:
        length = sum(map(len, buffers))
        self.check_range(offset, length)
        held = self._hold(offset, length)
        try:
            done = held.length == length and held.state != ZERO and held.child.preadv_nowait(offset, buffers)
        finally:
            self._let_go(held)
        self._check_not_broken()
        return done

    def snapshot_block_status(
        self, snapshot: SnapshotInfo, offset: int, length: int, *, want_zero: bool = True
    ) -> Iterator[Extent]:
        """In no file: whoever read there would not be held still. Of a range that has no access in it, nothing."""
        self.check_range(offset, length)
        return merged(self._extents(offset, offset + length, want_zero))

    def _extents(self, offset: int, end: int, want_zero: bool) -> Iterator[Extent]:
        while offset < end:
            held = self._hold(offset, min(STATUS_SIZE, end - offset))
            try:
                if held.state == ON_DISK:
                    told = self.file.block_status(offset, held.length, want_zero=want_zero)
                    extents = [extent._replace(file=None, file_offset=0) for extent in told]
                else:
                    status = Status.ZERO if held.state == ZERO else Status.DATA
                    extents = [Extent(offset, held.length, status | Status.ALLOCATED)]
            finally:
                self._let_go(held)
            self._check_not_broken()
            yield from extents
            offset += held.length

    def prefetch_snapshot(self, snapshot: SnapshotInfo, offset: int, length: int) -> None:
        first, _ = self._touched(offset, max(length, 1))
        state = self._states[first] if first < self._clusters else NONE
        if state in (ON_DISK, ON_TARGET):
            (self.file if state == ON_DISK else self.target).prefetch(offset, length)

    def changes(
        self, since: SnapshotInfo | None, state: SnapshotInfo | None, offset: int = 0, length: int | None = None
    ) -> Iterator[ChangedExtent]:
        """What was copied was about to be written; of what the snapshot has lost, or never kept, nothing is known."""
        end = self.size if length is None else offset + length
        self.check_range(offset, end - offset)
        if (since is None) == (state is None):
            return
        first, last = self._touched(offset, end - offset)
        with self._lock:
            states = bytes([NONE]) * (last - first) if self._broken else bytes(self._states[first:last])
        for run in _CHANGED.finditer(states):
            start = max(offset, (first + run.start()) * self.cluster_size)
            stop = min(end, (first + run.end()) * self.cluster_size)
            yield ChangedExtent(start, stop - start, Change.DATA)

    def pdiscard_snapshot(self, snapshot: SnapshotInfo, offset: int, length: int) -> None:
        self.check_range(offset, length)
        first, last = -(-offset // self.cluster_size), (offset + length) // self.cluster_size
        if first >= last:
            return
        with self._lock:
            self.held -= self._states.count(ON_TARGET, first, last) * self.cluster_size
            self._states[first:last] = bytes([NONE]) * (last - first)
            self._copies.wait(first, last)
            self._target_reads.wait(first, last)
        self.target.pdiscard(first * self.cluster_size, (last - first) * self.cluster_size)

    def _hold(self, offset: int, length: int) -> Held:
        """Keep what a range begins with where it is, until _let_go. AccessDenied if any of the range cannot be read."""
        first, last = self._touched(offset, length)
        with self._lock:
            self._check_not_broken()
            states = self._states
            missing = states.find(NONE, first, last)
            if missing >= 0:
                raise AccessDenied(
                    f"the snapshot has no access at byte {missing * self.cluster_size:#x}: not kept, or freed"
                )
            state = states[first]
            run = _RUN[state].match(states, first, last)
            assert run is not None
            stop = run.end()
            length = min(stop * self.cluster_size, offset + length) - offset
            if state == ZERO:
                return Held(state, length, self.file, None, None)
            reads = self._target_reads if state == ON_TARGET else self._disk_reads
            child = self.target if state == ON_TARGET else self.file
            return Held(state, length, child, reads, reads.add(first, stop))

    def _let_go(self, held: Held) -> None:
        if held.reads is not None and held.ticket is not None:
            with self._lock:
                held.reads.end(held.ticket)

    def _check_not_broken(self) -> None:
        if self._broken is not None:
            raise AccessDenied(f"the snapshot is lost: {self._broken}")

    # Between the two: copying.

    def before_write(self, offset: int, length: int) -> None:
        """Return when a range of the disk may be changed."""
        self.check_range(offset, length)
        if not length or self._broken is not None:
            return
        first, last = self._touched(offset, length)
        with self._lock:
            if self._states.find(ON_DISK, first, last) < 0:  # as a rule: guests write again where they wrote before
                self._disk_reads.wait(first, last)
                return
        try:
            self._copy_all(first, last, time.monotonic() + self._cbw_timeout if self._cbw_timeout else None)
        except Qcow2SnapError as error:
            self._failed(error)
        with self._lock:
            if self._broken is None:
                self._disk_reads.wait(first, last)

    def _failed(self, error: Qcow2SnapError) -> None:
        if self._on_cbw_error is OnCbwError.BREAK_GUEST_WRITE:
            raise error
        with self._lock:
            self._broken = self._broken or error

    def _copy_all(self, first: int, last: int, deadline: float | None) -> None:
        """Return when none of these clusters is ON_DISK, whoever copied them."""
        most = max(1, MAX_CLAIM // self.cluster_size)
        while True:
            with self._lock:
                start = self._states.find(ON_DISK, first, last)
                if start < 0 or self._broken is not None:
                    return
                run = _RUN[ON_DISK].match(self._states, start, min(last, start + most))
                assert run is not None
                end = run.end()
                if self._copies.overlap(start, end):
                    if not self._copies.wait(start, end, deadline):
                        raise self._timeout()
                    continue
                claim = self._copies.add(start, end)
            if deadline is None:
                self._copy(claim)
            else:
                self._copy_in_time(claim, deadline)

    def _copy(self, claim: Range) -> None:
        """Copy what was claimed, and end the claim."""
        try:
            for clusters in read_clusters(self.file, claim.first, claim.last, self.cluster_size):
                if clusters.data is None:
                    with self._lock:
                        self._dealt_with(clusters, _AS_ZERO)
                else:
                    self._to_target(clusters, clusters.data)
        finally:
            with self._lock:
                self._copies.end(claim)

    def _to_target(self, clusters: Clusters, data: memoryview) -> None:
        size = (clusters.last - clusters.first) * self.cluster_size
        with self._lock:
            if self._max_target is not None and self.held + size > self._max_target:
                raise NoSpace(f"the target may hold no more than {self._max_target} bytes")
            self.held += size
            self._target_is_dirty = True
        copied = 0
        try:
            self.target.pwritev(clusters.first * self.cluster_size, [data])
            with self._lock:
                copied = self._dealt_with(clusters, _AS_ON_TARGET) * self.cluster_size
                self.copied += copied
        finally:
            with self._lock:
                self.held -= size - copied

    def _dealt_with(self, clusters: Clusters, new_states: bytes) -> int:
        """Clusters are where they are to be; gives their number.

        What was discarded meanwhile stays so: whoever did that waits for us, and gives its space back then.
        """
        old = self._states[clusters.first : clusters.last]
        self._states[clusters.first : clusters.last] = old.translate(new_states)
        return old.count(ON_DISK)

    def _copy_in_time(self, claim: Range, deadline: float) -> None:
        """Copy what was claimed in a thread, so that we can leave it at the deadline."""
        if not self._late_copies.acquire(timeout=max(0.0, deadline - time.monotonic())):
            with self._lock:
                self._copies.end(claim)
            raise self._timeout()
        errors: list[BaseException] = []

        def copy() -> None:
            try:
                self._copy(claim)
            except BaseException as error:
                errors.append(error)
            finally:
                self._late_copies.release()

        thread = threading.Thread(target=copy, name="copy-before-write", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._late_copies.release()
            with self._lock:
                self._copies.end(claim)
            raise Qcow2SnapError(f"no thread is left to copy to the target: {error}") from None
        thread.join(max(0.0, deadline - time.monotonic()))
        if errors:
            raise errors[0]
        if thread.is_alive():
            raise self._timeout()

    def _timeout(self) -> CopyTimeout:
        return CopyTimeout(f"copying to the target took longer than {self._cbw_timeout:g} s")

    def _touched(self, offset: int, length: int) -> tuple[int, int]:
        """The clusters that a range has a part in: from the first up to, not including, the last."""
        if not length:
            return 0, 0
        return offset // self.cluster_size, -(-(offset + length) // self.cluster_size)
