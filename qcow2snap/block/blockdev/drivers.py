"""What each block driver makes of its blockdev options, and of its children. The graph itself is `named_nodes`.

The driver for remote exports is not here: it needs a protocol, and whoever has that adds it to the table.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qcow2snap.block.blockdev import permissions
from qcow2snap.block.blockdev.permissions import Use
from qcow2snap.block.copy_before_write import CopyBeforeWriteNode, OnCbwError
from qcow2snap.block.file import FileNode, Locking
from qcow2snap.block.graph import OpenOptions, open_image_in, open_writable_in
from qcow2snap.block.image_lock import ImageLock
from qcow2snap.block.node import (
    BitmapNotFound,
    BlockNode,
    ChangeTracking,
    FileError,
    InvalidOption,
    SnapshotAccess,
    UnsupportedFeature,
)
from qcow2snap.block.null import NullNode
from qcow2snap.block.raw import RawNode
from qcow2snap.block.snapshot_access import SnapshotAccessNode
from qcow2snap.block.writable_file import WritableFileNode

if TYPE_CHECKING:
    from qcow2snap.block.blockdev.edges import NamedNode
    from qcow2snap.block.blockdev.named_nodes import Graph

# What a child whose options stand in its parent's takes over from it (QEMU bdrv_inherited_options).
_INHERITED = ("read-only", "force-share", "cache")


class Driver(ABC):
    """One driver: makes nodes, and knows what they do with their children."""

    child_names: tuple[str, ...] = ()
    may_trim = False  # its read-only nodes let a user who may write discard
    is_filter = False  # it passes requests on, and whether it may write is nobody else's business

    def children(self, options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The children by name: a node's name, or options of one. Without those that are absent or null."""
        for name in self.child_names:
            if options.get(name) is not None:
                yield name, options[name]

    def inherited(self, options: Mapping[str, Any], child: str) -> dict[str, Any]:
        """Options of an inline child, unless it says something else."""
        return {
            "discard": "unmap",
            "auto-read-only": True,
            **{name: options[name] for name in _INHERITED if name in options},
        }

    @abstractmethod
    def open(self, node: NamedNode, graph: Graph) -> BlockNode:
        """The node for these options. Its children are attached; they are not its to close."""

    def use_of(self, node: NamedNode, child: str) -> Use:
        """What the node does with a child, given what is done with it."""
        return node.uses

    def can_exchange(self, child: str) -> bool:
        """Whether another node can take a child's place while requests come."""
        return False

    def set_child(self, node: NamedNode, name: str, child: NamedNode) -> bool:
        """Have the node go by its child's route. False: it goes to that child's node itself, as it did."""
        return False


class FileDriver(Driver):
    """`file` and `host_device`: a file of the host, opened for writing where that is allowed."""

    def __init__(self, *, block_devices: bool) -> None:
        self._block_devices = block_devices

    def open(self, node: NamedNode, graph: Graph) -> BlockNode:
        filename = node.options["filename"]
        self._check_kind(filename)
        try:
            file = self._open(node, filename)
        except FileError as error:
            raise FileError(f"Could not open '{filename}': {str(error).removeprefix(f'{filename}: ')}") from None
        if node.options.get("locking") != "off" and not node.options.get("force-share"):
            node.lock = ImageLock(file.fileno(), filename)
        return file

    def _open(self, node: NamedNode, filename: str) -> FileNode:
        if node.read_only:
            return FileNode(filename, locking=Locking.NONE)
        unsafe = node.options.get("cache", {}).get("no-flush", False)
        try:
            return (_UnflushedFileNode if unsafe else WritableFileNode)(filename, locking=Locking.NONE)
        except FileError as error:
            refusals = (os.strerror(number) for number in (errno.EACCES, errno.EPERM, errno.EROFS))
            if not node.options.get("auto-read-only") or not str(error).endswith(tuple(refusals)):
                raise
        return FileNode(filename, locking=Locking.NONE)

    def _check_kind(self, filename: str) -> None:
        try:
            is_block_device = stat.S_ISBLK(os.stat(filename).st_mode)
        except (OSError, ValueError):
            return  # opening it says what is the matter
        if is_block_device and not self._block_devices:
            raise FileError(f"'file' driver requires '{filename}' to be a regular file; say driver=host_device")
        if self._block_devices and not is_block_device:
            raise FileError(f"'host_device' driver requires '{filename}' to be a block device")


class _UnflushedFileNode(WritableFileNode):
    """With cache.no-flush: who says that does not care what a crash of the host leaves."""

    def flush(self) -> None:
        pass


class RawDriver(Driver):
    child_names = ("file",)
    is_filter = True

    def open(self, node: NamedNode, graph: Graph) -> BlockNode:
        for name in ("offset", "size"):
            if node.options.get(name, 0) < 0:
                raise InvalidOption(f"Parameter '{name}' expects a non-negative number below 2^64")
        offset, size = node.options.get("offset", 0), node.options.get("size")
        return RawNode(node.children["file"].child.node, offset=offset, size=size, owns_file=False)

    def can_exchange(self, child: str) -> bool:
        return True

    def set_child(self, node: NamedNode, name: str, child: NamedNode) -> bool:
        assert isinstance(node.node, RawNode)
        node.node.set_file(child.route)
        return True


class Qcow2Driver(Driver):
    """An image in a file of this host. What it refers to is followed as `references` allows, or given as children."""

    child_names = ("file", "backing", "data-file")

    def __init__(self, opening: OpenOptions) -> None:
        self._opening = opening

    def inherited(self, options: Mapping[str, Any], child: str) -> dict[str, Any]:
        inherited = super().inherited(options, child)
        return {**inherited, "read-only": True} if child == "backing" else inherited

    def open(self, node: NamedNode, graph: Graph) -> BlockNode:
        given: dict[str, BlockNode | None] = {name: edge.child.node for name, edge in node.children.items()}
        file = given.pop("file")
        if not isinstance(file, FileNode):
            name = node.children["file"].child.name
            raise UnsupportedFeature(f"node '{name}' is no file: qcow2 images are read from files only")
        if "backing" in node.options and node.options["backing"] is None:
            given["backing"] = None
        if node.read_only:
            return open_image_in(file, self._opening, given)
        no_unref = node.options.get("discard-no-unref", False)
        return open_writable_in(file, self._opening._replace(discard_no_unref=no_unref), given)

    def use_of(self, node: NamedNode, child: str) -> Use:
        return permissions.OF_BACKING if child == "backing" else permissions.of_format_file(not node.read_only)


class CopyBeforeWriteDriver(Driver):
    child_names = ("file", "target")
    is_filter = True

    def open(self, node: NamedNode, graph: Graph) -> BlockNode:
        options = node.options
        bitmap = options.get("bitmap")
        return CopyBeforeWriteNode(
            node.children["file"].child.node,
            node.children["target"].child.node,
            bitmap=None if bitmap is None else _dirty(graph, bitmap["node"], bitmap["name"]),
            on_cbw_error=OnCbwError(options.get("on-cbw-error", "break-guest-write")),
            cbw_timeout=options.get("cbw-timeout", 0),
            min_cluster_size=options.get("min-cluster-size", 0),
        )

    def use_of(self, node: NamedNode, child: str) -> Use:
        if child == "target":
            return permissions.OF_CBW_TARGET
        return permissions.of_copied_disk(node.uses, has_parents=bool(node.parents))

    def can_exchange(self, child: str) -> bool:
        return child == "file"

    def set_child(self, node: NamedNode, name: str, child: NamedNode) -> bool:
        assert isinstance(node.node, CopyBeforeWriteNode)
        if name == "file":
            node.node.file = child.route
        else:
            node.node.target = child.route
        return True


def _dirty(graph: Graph, name: str, bitmap: str) -> list[tuple[int, int]]:
    node = graph.get(name).node
    if not isinstance(node, ChangeTracking):
        raise BitmapNotFound(f"Bitmap '{bitmap}' is not found: node '{name}' has none")
    return [*node.dirty_extents(bitmap, 0, node.size)]


class SnapshotAccessDriver(Driver):
    """One snapshot of a node that has any. QEMU's has no `snapshot`: there, copy-before-write has the only one."""

    child_names = ("file",)
    may_trim = True

    def open(self, node: NamedNode, graph: Graph) -> BlockNode:
        below = node.children["file"].child
        if not isinstance(below.node, SnapshotAccess):
            raise UnsupportedFeature(f"node '{below.name}' ({below.options['driver']}) has no snapshots to access")
        return SnapshotAccessNode(below.node, node.options.get("snapshot"))

    def use_of(self, node: NamedNode, child: str) -> Use:
        return permissions.OF_SNAPSHOTS


class NullDriver(Driver):
    def open(self, node: NamedNode, graph: Graph) -> BlockNode:
        size = node.options.get("size", 1 << 30)
        if size < 0:
            raise InvalidOption("Parameter 'size' expects a non-negative number below 2^64")
        return NullNode(size, read_only=node.read_only)


def all_drivers(opening: OpenOptions = OpenOptions()) -> dict[str, Driver]:  # noqa: B008
    """By the names that options have for them."""
    return {
        "file": FileDriver(block_devices=False),
        "host_device": FileDriver(block_devices=True),
        "raw": RawDriver(),
        "qcow2": Qcow2Driver(opening),
        "copy-before-write": CopyBeforeWriteDriver(),
        "snapshot-access": SnapshotAccessDriver(),
        "null-co": NullDriver(),
    }
