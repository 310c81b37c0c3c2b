"""Metadata contexts: what BLOCK_STATUS can tell of an export, by the context's name. No protocol messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from formats.nbd import State
from qcow2snap.block.node import BlockNode, Status

# Length in bytes and flags of each run from a given place on, without gap; neighbours differ in their flags.
Descriptors = Iterator[tuple[int, int]]

# Of one reply: 256 KiB of descriptors, and half a second's work for them. A client asks again from where they end.
MAX_DESCRIPTORS = 1 << 15
MAX_EXTENTS = 1 << 16


class MetaContext(NamedTuple):
    """One context, and how a range of a node looks in it."""

    name: str
    status: Callable[[BlockNode, int, int], Descriptors]

    def descriptors(self, node: BlockNode, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """At most `limit` descriptors. They end where the range ends, or before: never beyond, never at 0 bytes."""
        return list(islice(self.status(node, offset, length), min(limit, MAX_DESCRIPTORS)))


def _allocation(node: BlockNode, offset: int, length: int) -> Descriptors:
    """Flags as QEMU's server sets them: a hole where no space is taken, zero where zeros are read."""
    run, run_flags = 0, -1
    for extent in islice(node.block_status(offset, length), MAX_EXTENTS):
        flags = (0 if extent.status & Status.DATA else State.HOLE) | (0 if extent.must_read else State.ZERO)
        if flags != run_flags:
            if run:
                yield run, run_flags
            run, run_flags = 0, int(flags)
        run += extent.length
    if run:
        yield run, run_flags


ALLOCATION = MetaContext("base:allocation", _allocation)


def contexts_of(node: BlockNode) -> Sequence[MetaContext]:
    """All contexts that a client may select on this node."""
    return (ALLOCATION,)


def matching(query: str, contexts: Sequence[MetaContext], *, wildcards: bool) -> list[MetaContext]:
    """The contexts that a query means. `base:` means all of its namespace where `wildcards` are allowed, else none."""
    if wildcards and query.endswith(":") and query.count(":") == 1:
        return [context for context in contexts if context.name.startswith(query)]
    return [context for context in contexts if context.name == query]
