"""--bitmap and --changed-since: what is dirty of a disk, from the words that say where that is known.

A WHAT of --bitmap is, whatever fits first:

    name=NAME   dirty bitmap NAME of the disk itself
    FILE        that is there: the JSON of `nbdinfo --map`, `qcow2snap diff` or `qemu-img map` (block/dirty_json.py)
    IMAGE:NAME  persistent dirty bitmap NAME of a qcow2 image that is there
    NAME        dirty bitmap NAME of the disk itself
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import click

from qcow2snap.block.dirty_json import read_dirty_json
from qcow2snap.block.file import FileNode, Locking
from qcow2snap.block.frozen_bitmap import FrozenBitmap
from qcow2snap.block.graph import open_image, probe
from qcow2snap.block.node import BitmapNotFound, BlockNode, OutOfRange
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.cli.options import together
from qcow2snap.nbd.contexts import CHANGED_SINCE, DIRTY_BITMAP
from qcow2snap.nbd.remote_node import RemoteNode
from qcow2snap.nbd.strings import is_string

bitmap_options = together(
    click.option("--bitmap", "bitmaps", metavar="WHAT", multiple=True,
                 help="Keep only what is dirty by: NAME, a bitmap of DISK, qcow2 or an NBD URI; IMAGE:NAME, one of "
                      "another image; FILE, extents in JSON (nbdinfo --map, qcow2snap diff). Repeatable: any of them."),
    click.option("--changed-since", "references", metavar="REF", multiple=True,
                 help="Keep only what was changed since snapshot REF of DISK, qcow2 or an NBD URI. Repeatable."),
)  # fmt: skip


class Source(NamedTuple):
    """Where one of the bitmaps comes from."""

    context: str  # the name of the metadata context under which it is shown
    is_of_disk: bool  # the disk knows it under this name
    read: Callable[[int], FrozenBitmap] = lambda size: FrozenBitmap((), size)  # where the disk does not


def sources(bitmaps: Iterable[str], references: Iterable[str]) -> list[Source]:
    """What the options name. Two that would be shown under one name: BitmapNotFound."""
    found = [_source(word) for word in bitmaps]
    found += [Source(CHANGED_SINCE + reference, True) for reference in references]
    names = [source.context for source in found]
    for name in names:
        if names.count(name) > 1:
            raise BitmapNotFound(f"two of --bitmap and --changed-since would be shown as {name}: rename one")
        if not is_string(name):
            raise BitmapNotFound(f"{name!a} is no name that NBD can carry")
    return found


def read(sources: Sequence[Source], disk: BlockNode) -> dict[str, FrozenBitmap]:
    """The bitmaps as they are now, by the names of their contexts. BitmapNotFound, or OutOfRange: of another disk."""
    return {
        source.context: _of_disk(source, disk) if source.is_of_disk else source.read(disk.size) for source in sources
    }


def union(bitmaps: Iterable[FrozenBitmap]) -> list[tuple[int, int]]:
    """All that is dirty in any of them."""
    return [extent for bitmap in bitmaps for extent in bitmap.dirty(0, bitmap.size)]


def _source(word: str) -> Source:
    if word.startswith("name="):
        return Source(DIRTY_BITMAP + word.removeprefix("name="), True)
    if os.path.exists(word):
        stem = os.path.basename(word).removesuffix(".json")
        return Source(DIRTY_BITMAP + stem, False, partial(_of_file, word))
    for at in (at for at, letter in enumerate(word) if letter == ":"):
        image, name = word[:at], word[at + 1 :]
        if os.path.isfile(image):
            return Source(DIRTY_BITMAP + name, False, partial(_of_image, image, name))
    return Source(DIRTY_BITMAP + word, True)


def _of_disk(source: Source, disk: BlockNode) -> FrozenBitmap:
    if isinstance(disk, RemoteNode):
        return FrozenBitmap(disk.dirty(source.context, 0, disk.size), disk.size)
    name = source.context.removeprefix(DIRTY_BITMAP)
    reference = source.context.removeprefix(CHANGED_SINCE)
    if not isinstance(disk, Qcow2Node):
        what = name if name != source.context else reference
        raise BitmapNotFound(
            f'"{what}": no such file, and a raw disk has no bitmaps: say IMAGE:NAME, or FILE with extents in JSON'
        )
    if name != source.context:
        return FrozenBitmap(disk.dirty_extents(name, 0, disk.size), disk.size)
    changes = disk.changes_since(disk.find_snapshot(reference), 0, disk.size)
    return FrozenBitmap(((extent.offset, extent.length) for extent in changes), disk.size)


def _of_file(filename: str, size: int) -> FrozenBitmap:
    if os.path.isfile(filename):
        file = FileNode(filename, locking=Locking.NONE)
        looks_like = probe(file)
        file.close()
        if looks_like == "qcow2":
            raise BitmapNotFound(f"{filename}: is a qcow2 image: say {filename}:NAME, with the name of a bitmap of it")
    return read_dirty_json(filename, size)


def _of_image(filename: str, name: str, size: int) -> FrozenBitmap:
    image = open_image(filename, with_children=False)
    try:
        if image.size != size:
            raise OutOfRange(f"{filename}: has {image.size} bytes, the disk {size}: its bitmaps are of another disk")
        return FrozenBitmap(image.dirty_extents(name, 0, size), size)
    finally:
        image.close()
