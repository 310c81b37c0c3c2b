"""Who may do what to a node beside others: QEMU's permissions (bdrv_child_refresh_perms and its relatives in block.c).

Every parent of a node says what it does with it (`perm`) and what it lets others do (`shared`). What one parent does
and another does not share is a conflict, and whoever comes second is refused. No node and no lock is known here.
"""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple


class Perm(IntFlag):
    """QEMU's BLK_PERM_*."""

    CONSISTENT_READ = 1 << 0
    WRITE = 1 << 1
    WRITE_UNCHANGED = 1 << 2
    RESIZE = 1 << 3


NO_PERM = Perm(0)
ALL = Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE


class Use(NamedTuple):
    """What a parent does with a node, and what it lets others do meanwhile."""

    perm: Perm = NO_PERM
    shared: Perm = ALL


def combined(uses: list[Use]) -> Use:
    """What all of them do, and what every one of them shares."""
    perm, shared = NO_PERM, ALL
    for use in uses:
        perm |= use.perm
        shared &= use.shared
    return Use(perm, shared)


def names(perm: Perm) -> list[str]:
    """As QEMU's schema has them."""
    return [(each.name or "").lower().replace("_", "-") for each in Perm if each & perm]


def of_format_file(writable: bool) -> Use:
    """A format driver's use of the file that holds its metadata, whatever its parents do."""
    perm = Perm.CONSISTENT_READ
    if writable:
        perm |= Perm.WRITE | Perm.RESIZE
    return Use(perm, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)


OF_BACKING = Use(Perm.CONSISTENT_READ, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)


def of_copied_disk(above: Use, has_parents: bool) -> Use:
    """copy-before-write's use of the disk: once somebody uses the filter, nobody may write past it."""
    if not has_parents:
        return above
    return Use(above.perm | Perm.CONSISTENT_READ, above.shared & ~(Perm.WRITE | Perm.RESIZE))


# copy-before-write's use of its target. QEMU lets others write there, too; what they wrote would be taken for the disk.
OF_CBW_TARGET = Use(Perm.WRITE, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)

# snapshot-access needs nothing of its own: what the driver below does for it, it does by its own children.
OF_SNAPSHOTS = Use()
