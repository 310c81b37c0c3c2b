"""A node of the graph with those who use it, and whom it uses. How a graph is made of them is `named_nodes`'s."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qcow2snap.block.before_write import BeforeWriteNode
from qcow2snap.block.blockdev.permissions import Perm, Use, combined
from qcow2snap.block.copy_before_write import CopyBeforeWriteNode
from qcow2snap.block.file import FileNode
from qcow2snap.block.image_lock import ImageLock, Permission
from qcow2snap.block.node import BlockNode

if TYPE_CHECKING:
    from qcow2snap.block.blockdev.drivers import Driver

CBW = "copy-before-write"

_LOCKED = {
    Perm.CONSISTENT_READ: Permission.CONSISTENT_READ,
    Perm.WRITE: Permission.WRITE,
    Perm.WRITE_UNCHANGED: Permission.WRITE_UNCHANGED,
    Perm.RESIZE: Permission.RESIZE,
}


class Edge:
    """One parent's use of one child (QEMU's BdrvChild). `parent` is None for a user from outside: that is a root."""

    def __init__(self, parent: NamedNode | None, name: str, child: NamedNode, use: Use | None = None) -> None:
        self.parent = parent
        self.name = name
        self.child = child
        self.use = use or Use()

    def __str__(self) -> str:
        who = "an unnamed block device" if self.parent is None else f"node '{self.parent.name}'"
        return f"{who} (uses node '{self.child.name}' as '{self.name}' child)"


class NamedNode:
    """A node of the graph, and what it was made from.

    read_only  was asked for; the node may be so without that
    is_owned   it was added by itself, and has to be deleted; otherwise it goes with its last parent
    lock       QEMU's image lock, where the node is a file that has it
    """

    node: BlockNode

    def __init__(self, name: str, driver: Driver, options: Mapping[str, Any], *, is_owned: bool) -> None:
        self.name = name
        self.driver = driver
        self.options = dict(options)
        self.read_only = bool(options.get("read-only", False))
        self.is_owned = is_owned
        self.children: dict[str, Edge] = {}
        self.parents: list[Edge] = []
        self.lock: ImageLock | None = None
        self._route: tuple[tuple[CopyBeforeWriteNode, ...], BeforeWriteNode] | None = None

    @property
    def uses(self) -> Use:
        """What all parents together do with it, and let others do."""
        return combined([edge.use for edge in self.parents])

    @property
    def route(self) -> BlockNode:
        """What its parents are to call: the node, or what tells its copy-before-write filters first."""
        filters = [edge.parent.node for edge in self.parents if _is_filter(edge) and edge.parent]
        if self.node.read_only or not filters or len(self.parents) == 1:
            return self.node
        key = tuple(each for each in filters if isinstance(each, CopyBeforeWriteNode))
        if self._route is None or self._route[0] != key:
            self._route = key, BeforeWriteNode(self.node, key)
        return self._route[1]

    @property
    def depth(self) -> int:
        """Nodes on the longest way down, itself included."""
        return 1 + max((edge.child.depth for edge in self.children.values()), default=0)

    @property
    def height(self) -> int:
        """Nodes on the longest way up, itself included."""
        return 1 + max((edge.parent.height for edge in self.parents if edge.parent is not None), default=0)

    def update_lock(self) -> None:
        """Have the lock on a file say what is done with it now. ImageInUse if another process objects."""
        if self.lock is None or not isinstance(getattr(self, "node", None), FileNode):
            return
        perm, shared = self.uses
        used = [bit for each, bit in _LOCKED.items() if perm & each]
        unshared = [bit for each, bit in _LOCKED.items() if not shared & each]
        is_locked = self.lock.update(used, unshared)
        assert isinstance(self.node, FileNode)
        self.node.set_stable(is_locked and not (perm | shared) & Perm.WRITE)

    def below(self) -> Iterator[NamedNode]:
        """This, and all that is below it; what can be reached in two ways comes twice."""
        yield self
        for edge in self.children.values():
            yield from edge.child.below()

    def line(self) -> Iterator[NamedNode]:
        """This, and what its requests pass on their way down to the file."""
        yield self
        below = self.children.get("file")
        if below is not None:
            yield from below.child.line()


class Root:
    """A user's hold on a node: an export has one. Given back by Graph.release().

    node  to be read and written: a BlockBackend, unless nothing can ever be exchanged below it
    """

    def __init__(self, edge: Edge, node: BlockNode) -> None:
        self.edge = edge
        self.node = node


def _is_filter(edge: Edge) -> bool:
    return edge.parent is not None and edge.parent.options["driver"] == CBW and edge.name == "file"
