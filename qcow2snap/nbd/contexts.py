"""Metadata contexts: what BLOCK_STATUS can tell of an export, by the context's name. No protocol messages, no driver.

base:allocation              as NBD has it
qemu:allocation-depth        as QEMU has it: 0 where nothing is allocated, 1 here, 2 in the backing file, and so on
qemu:dirty-bitmap:NAME       flag 1: dirty. Bitmaps record the writes of the active disk, so only its export has them
qcow2snap:changed-since:REF  flag 1: bytes may differ from snapshot REF. What reads dirty bitmaps reads this

An export may be given frozen bitmaps under names of the last two kinds; they come before what its node can tell.

REF is a snapshot's name where that is its alone, and in any case `id=` with its id, as for exports.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

from formats.nbd import State
from qcow2snap.block.frozen_bitmap import FrozenBitmap
from qcow2snap.block.node import BlockNode, ChangeTracking, Qcow2SnapError, SnapshotInfo, Status
from qcow2snap.nbd.names import SnapshotNames
from qcow2snap.nbd.strings import is_string

logger = logging.getLogger(__name__)

# Length in bytes and flags of each run from a given place on, without gap.
Runs = Iterator[tuple[int, int]]

# Of one reply: 256 KiB of descriptors, and what is looked at for them. A client asks again from where they end.
MAX_DESCRIPTORS = 1 << 15
MAX_EXTENTS = 1 << 16
PATIENCE = 0.25  # seconds, after which no further step begins
FIRST_STEP = 32 << 20  # bytes: at the smallest cluster size, of 1,024 tables

DIRTY = 1  # the flag of qemu:dirty-bitmap and of changed-since
DIRTY_BITMAP = "qemu:dirty-bitmap:"
CHANGED_SINCE = "qcow2snap:changed-since:"
_HOLE, _ZERO = int(State.HOLE), int(State.ZERO)
_WILDCARDS = ("base:", "qemu:", DIRTY_BITMAP, "qcow2snap:", CHANGED_SINCE)


class MetaContext(NamedTuple):
    """One context, and how a range of a node looks in it."""

    name: str
    runs: Callable[[BlockNode, int, int], Runs]

    def descriptors(self, node: BlockNode, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """At most `limit` descriptors. They end where the range ends, or before: never beyond, never at 0 bytes."""
        runs = islice(self._in_steps(node, offset, offset + length), MAX_EXTENTS)
        return list(islice(_merged(runs), min(limit, MAX_DESCRIPTORS)))

    def _in_steps(self, node: BlockNode, offset: int, end: int) -> Runs:
        """A node may look at much before it tells of it: it is asked by steps, that double while they are quick."""
        step, began, elapsed = FIRST_STEP, time.monotonic(), 0.0
        while offset < end and elapsed < PATIENCE:
            length = min(step, end - offset)
            yield from self.runs(node, offset, length)
            offset += length
            elapsed = time.monotonic() - began
            step = step * 2 if elapsed < PATIENCE / 4 else step


def _merged(runs: Iterable[tuple[int, int]]) -> Runs:
    """Neighbours of the same flags as one."""
    length, flags = 0, -1
    for more, its_flags in runs:
        if its_flags != flags:
            if length:
                yield length, flags
            length, flags = 0, its_flags
        length += more
    if length:
        yield length, flags


class Contexts:
    """The contexts of one export. Looked up, and listed, without making those that nobody asked for."""

    def __init__(
        self,
        node: BlockNode,
        snapshots: SnapshotNames | None = None,
        bitmaps: Mapping[str, FrozenBitmap] = MappingProxyType({}),
        dirty_bitmaps: Sequence[str] | None = None,
    ) -> None:
        """`bitmaps`: further contexts of the kind of qemu:dirty-bitmap, by their whole names.

        `dirty_bitmaps`: the names of those of the node that are to be known; None: all.
        """
        self._shown = dirty_bitmaps
        self._frozen = {name: _frozen(name, bitmap) for name, bitmap in bitmaps.items()}
        self._tracking = node if isinstance(node, ChangeTracking) else None
        self._snapshots = snapshots if snapshots is not None and self._tracking is not None else SnapshotNames(())

    def __iter__(self) -> Iterator[MetaContext]:
        yield from self._under("")

    def find(self, name: str) -> MetaContext | None:
        """The context of exactly this name."""
        if name in _PLAIN:
            return _PLAIN[name]
        if name in self._frozen:
            return self._frozen[name]
        if name.startswith(DIRTY_BITMAP):
            return self._dirty_bitmap(name.removeprefix(DIRTY_BITMAP))
        if name.startswith(CHANGED_SINCE):
            snapshot = self._snapshots.find(name.removeprefix(CHANGED_SINCE))
            return None if snapshot is None else _changed_since(name, snapshot)
        return None

    def matching(self, queries: Iterable[str], *, wildcards: bool) -> Iterator[MetaContext]:
        """The contexts that queries mean, each once. `base:` and the like mean all below only with `wildcards`."""
        asked: set[str] = set()
        covered: tuple[str, ...] = ()
        for query in queries:
            if query in asked or (covered and query.startswith(covered)):
                continue
            if wildcards and query in _WILDCARDS:
                for context in self._under(query):
                    if context.name not in asked and not (covered and context.name.startswith(covered)):
                        yield context
                covered = (*covered, query)
            elif (found := self.find(query)) is not None:
                yield found
            asked.add(query)

    def _under(self, prefix: str) -> Iterator[MetaContext]:
        for name, context in _PLAIN.items():
            if name.startswith(prefix):
                yield context
        for name, context in self._frozen.items():
            if name.startswith(prefix):
                yield context
        if DIRTY_BITMAP.startswith(prefix):
            for name in self._bitmaps():
                if is_string(DIRTY_BITMAP + name) and DIRTY_BITMAP + name not in self._frozen:
                    yield _bitmap(name)
        if CHANGED_SINCE.startswith(prefix):
            for name, snapshot in self._snapshots.shown(CHANGED_SINCE):
                if CHANGED_SINCE + name not in self._frozen:
                    yield _changed_since(CHANGED_SINCE + name, snapshot)

    def _bitmaps(self) -> Sequence[str]:
        try:
            known = () if self._tracking is None else self._tracking.dirty_bitmaps()
            return [name for name in known if self._shown is None or name in self._shown]
        except Qcow2SnapError as error:  # the disk can be read all the same
            logger.warning("dirty bitmaps are not offered: %s", error)
            return ()

    def _dirty_bitmap(self, name: str) -> MetaContext | None:
        """The context of a bitmap that can be read. The log says why one cannot; the protocol has no words for it."""
        if self._tracking is None or (self._shown is not None and name not in self._shown):
            return None
        try:
            self._tracking.dirty_extents(name, 0, 0)
        except Qcow2SnapError as error:
            logger.info("%s%s is not offered: %s", DIRTY_BITMAP, name, error)
            return None
        return _bitmap(name)


# One function for each kind of context: flags as QEMU's server sets them.


def _allocation(node: BlockNode, offset: int, length: int) -> Runs:
    """A hole where no space is taken, zero where zeros are read."""
    for extent in node.block_status(offset, length):
        flags = (0 if extent.status & Status.DATA else _HOLE) | (0 if extent.must_read else _ZERO)
        yield extent.length, flags


def _allocation_depth(node: BlockNode, offset: int, length: int) -> Runs:
    """The layer that has the bytes, counted from 1. Beyond the end of one, QEMU takes zeros for allocated there."""
    for extent in node.block_status(offset, length, want_zero=False):
        if extent.status & Status.ALLOCATED:
            yield extent.length, extent.depth + 1
        else:
            yield extent.length, extent.depth + 2 if extent.depth < node.nb_backing else 0


def _bitmap(name: str) -> MetaContext:
    def runs(node: BlockNode, offset: int, length: int) -> Runs:
        assert isinstance(node, ChangeTracking)
        return _dirty(node.dirty_extents(name, offset, length), offset, offset + length)

    return MetaContext(DIRTY_BITMAP + name, runs)


def _frozen(name: str, bitmap: FrozenBitmap) -> MetaContext:
    return MetaContext(name, lambda node, offset, length: _dirty(bitmap.dirty(offset, length), offset, offset + length))


def _changed_since(name: str, snapshot: SnapshotInfo) -> MetaContext:
    def runs(node: BlockNode, offset: int, length: int) -> Runs:
        assert isinstance(node, ChangeTracking)
        changes = node.changes_since(snapshot, offset, length)
        return _dirty(((extent.offset, extent.length) for extent in changes), offset, offset + length)

    return MetaContext(name, runs)


def _dirty(extents: Iterable[tuple[int, int]], position: int, end: int) -> Runs:
    """What is dirty, and what is clean between."""
    for offset, length in extents:
        if offset > position:
            yield offset - position, 0
        yield length, DIRTY
        position = offset + length
    if position < end:
        yield end - position, 0


ALLOCATION = MetaContext("base:allocation", _allocation)
ALLOCATION_DEPTH = MetaContext("qemu:allocation-depth", _allocation_depth)
_PLAIN = {context.name: context for context in (ALLOCATION, ALLOCATION_DEPTH)}
