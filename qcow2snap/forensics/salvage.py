"""Reading on through damage: what of a node can be read, and the holes where it cannot. Never guesses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from qcow2snap.block.node import BlockNode, Extent, ImageFormatError


class Hole(NamedTuple):
    """Guest bytes that cannot be read, and the rule whose breach is the reason."""

    offset: int
    length: int
    rule: str
    message: str


def hole_of(error: ImageFormatError, offset: int, end: int) -> Hole:
    """The part of offset..end that an error makes unreadable: all of it, if the error does not say how much."""
    start, stop = offset, end
    if error.guest_range is not None:
        first, length = error.guest_range
        if first < end and first + length > offset:
            start, stop = max(offset, first), min(end, first + length)
    return Hole(start, stop - start, error.rule, str(error))


def readable_extents(node: BlockNode, offset: int, length: int) -> Iterator[Extent | Hole]:
    """As node.block_status, with a Hole in place of each damage. Ends: every step goes on behind the last."""
    end = offset + length
    while offset < end:
        try:
            for extent in node.block_status(offset, end - offset):
                yield extent
                offset = extent.end
        except ImageFormatError as error:
            hole = hole_of(error, offset, end)
            # What comes before the hole was told before the error; whatever was not belongs to it.
            hole = hole._replace(offset=offset, length=hole.offset + hole.length - offset)
            yield hole
            offset += hole.length
