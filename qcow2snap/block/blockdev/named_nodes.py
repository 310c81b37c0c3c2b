"""A graph of named nodes: blockdev options make them, parents keep them, permissions hold them apart (QEMU block.c).

What each driver does with its options is in `drivers`; who asks for all this, and in which protocol, is not known here.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import permutations
from typing import TYPE_CHECKING, Any

from qcow2snap.block.blockdev.backend import BlockBackend
from qcow2snap.block.blockdev.edges import CBW, Edge, NamedNode, Root
from qcow2snap.block.blockdev.permissions import ALL, Perm, Use, names
from qcow2snap.block.node import (
    BlockNode,
    InvalidOption,
    NodeInUse,
    NodeNotFound,
    NotSupported,
    PermissionConflict,
    Qcow2SnapError,
    ReadOnly,
)

if TYPE_CHECKING:
    from qcow2snap.block.blockdev.drivers import Driver

logger = logging.getLogger(__name__)

MAX_NODES = 1 << 10
MAX_DEPTH = 64  # nodes above each other
MAX_NAME = 31  # characters of a node's name
DRAIN_TIMEOUT = 60.0  # seconds that requests under way get before a change of the graph is given up

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


class Graph:
    """All named nodes.

    threads  one at a time, and none that has a request under way in a node of the graph
    errors   Qcow2SnapError, in QEMU's words where it has them; what failed has changed nothing
    owns     all its nodes: close() it when no user is left
    """

    def __init__(self, drivers: Mapping[str, Driver]) -> None:
        self._drivers = drivers
        self._nodes: dict[str, NamedNode] = {}
        self._roots: list[Root] = []
        self._anonymous = 0

    def __iter__(self) -> Iterator[NamedNode]:
        """The newest first, as QEMU lists them."""
        return iter([*reversed(self._nodes.values())])

    @property
    def roots(self) -> Sequence[Root]:
        return tuple(self._roots)

    def get(self, name: str, *, device: str = "") -> NamedNode:
        """`device` is the name as well, where QEMU's command or option takes one of either."""
        found = self._nodes.get(name)
        if found is None:
            raise NodeNotFound(f"Cannot find device='{device}' nor node-name='{name}'")
        return found

    def _named(self, name: str) -> NamedNode:
        """As get(), in the words of QEMU's commands that take nothing but a node's name."""
        found = self._nodes.get(name)
        if found is None:
            raise NodeNotFound(f"Failed to find node with node-name='{name}'")
        return found

    def add(self, options: Mapping[str, Any]) -> NamedNode:
        """A node by options that `options.BLOCKDEV_OPTIONS` read. A snapshot of copy-before-write begins now."""
        if "node-name" not in options:
            raise InvalidOption("'node-name' must be specified for the root node")
        # With no request under way, there is no write that could be half in the snapshot.
        with self._drained_for(options), self._all_or_nothing() as undo:
            added = self._open(options, undo, is_owned=True)
            self._reroute()
        return added

    def delete(self, name: str) -> None:
        found = self._named(name)
        if any(edge.parent is None for edge in found.parents):
            raise NodeInUse(f"Node {name} is in use")
        if not found.is_owned:
            raise NodeInUse(f"Node {name} is not owned by the monitor")
        if found.parents:
            raise NodeInUse(f"Block device {name} is in use")
        if not found.node.read_only:
            found.node.flush()  # closing cannot be refused, so what can fail is done before
        # Whoever writes to its disk may be about to tell a filter of it. All others are known to nobody any more.
        with self._drained_for(found.options):
            found.is_owned = False
            self._drop_unused(found)
            self._reroute()

    def reopen(self, all_options: Sequence[Mapping[str, Any]]) -> None:
        """Change options of nodes, all of them or none: the child `file` of a raw or copy-before-write node.

        Requests wait meanwhile, and go by the new child after it.
        """
        with self._drained():
            left: list[NamedNode] = []
            with self._all_or_nothing() as undo:
                for options in all_options:
                    left += self._reopen(options, undo)
                self._reroute()
            for each in left:
                self._drop_unused(each)

    def replace_child(self, parent: str, child: str, new: str) -> None:
        """Have another node in the place of a child of a node."""
        found = self._named(parent)
        if child not in found.children:
            raise NodeNotFound(f"Node '{parent}' has no child named '{child}'")
        with self._drained():
            with self._all_or_nothing() as undo:
                old = self._exchange(found, child, self.get(new), undo)
                self._reroute()
            self._drop_unused(old)

    def attach(self, name: str, *, writable: bool) -> Root:
        """A hold on a node for a user, who may write if it is `writable`."""
        found = self.get(name)
        if writable and found.read_only:
            raise ReadOnly("Cannot export read-only node as writable")
        if writable and found.node.read_only and not found.driver.may_trim:
            raise ReadOnly("Block node is read-only")
        perm = Perm.CONSISTENT_READ | Perm.WRITE if writable else Perm.CONSISTENT_READ
        edge = Edge(None, "root", found, Use(perm, ALL & ~Perm.RESIZE))
        with self._all_or_nothing() as undo:
            self._attach(edge, undo)
            root = Root(edge, self._as_seen(found, writable=writable))
            self._roots.append(root)
            undo.callback(self._roots.remove, root)
            self._reroute()
        return root

    def release(self, root: Root) -> None:
        """Give a hold back. Its user has no request under way any more."""
        self._roots.remove(root)
        self._detach(root.edge)
        self._drop_unused(root.edge.child)
        self._reroute()

    def replace_root(self, root: Root, name: str) -> None:
        """Have another node of the same size for the same user."""
        new = self.get(name)
        if not isinstance(root.node, BlockBackend):
            raise NotSupported(f"{root.edge} cannot be changed: it was made to read the same for ever")
        self._check_replacement(root.edge.child, new)
        if root.edge.use.perm & Perm.WRITE and new.node.read_only:
            raise ReadOnly("Block node is read-only")
        with self._drained():
            with self._all_or_nothing() as undo:
                old = self._move(root.edge, new, undo)
                self._reroute()
            self._drop_unused(old)

    def close(self) -> None:
        """Close all nodes, parents before their children, whoever still has a hold on them."""
        for root in [*self._roots]:
            self.release(root)
        while self._nodes:
            for each in self:
                if not each.parents:
                    each.is_owned = False
                    self._drop_unused(each)

    # Making nodes.

    def _open(self, options: Mapping[str, Any], undo: ExitStack, *, is_owned: bool) -> NamedNode:
        name = options.get("node-name") or self._new_name()
        if not name.startswith("#") and not _NAME.fullmatch(name):
            raise InvalidOption(f"Invalid node-name: '{name[:200]}'")
        if len(name) > MAX_NAME:
            raise InvalidOption(f"Node name too long: '{name[:200]}'")
        if name in self._nodes:
            raise InvalidOption(f"Duplicate nodes with node-name='{name}'")
        if len(self._nodes) >= MAX_NODES:
            raise NotSupported(f"{MAX_NODES} nodes are all there can be")
        driver = self._drivers.get(options["driver"])
        if driver is None:
            raise InvalidOption(f"Parameter 'driver' does not accept value '{options['driver']}'")
        if options.get("force-share") and not options.get("read-only"):
            raise InvalidOption("force-share=on can only be used with read-only images")
        made = NamedNode(name, driver, options, is_owned=is_owned)
        for child_name, reference in driver.children(options):
            if isinstance(reference, str):
                child = self.get(reference, device=reference)
            else:
                child = self._open({**driver.inherited(options, child_name), **reference}, undo, is_owned=False)
            self._attach(Edge(made, child_name, child), undo)
        made.node = driver.open(made, self)
        undo.callback(made.node.close)
        self._nodes[name] = made
        undo.callback(self._nodes.pop, name)
        return made

    def _new_name(self) -> str:
        self._anonymous += 1
        return f"#block{self._anonymous:03d}"

    def _drop_unused(self, node: NamedNode) -> None:
        """Close a node that nobody has any more, and then what only it had."""
        if node.is_owned or node.parents or self._nodes.get(node.name) is not node:
            return
        del self._nodes[node.name]
        try:
            node.node.close()
        except Qcow2SnapError as error:
            logger.error("%s: closed, but not all of it is on disk: %s", node.name, error)
        for edge in [*node.children.values()]:
            self._detach(edge)
            self._drop_unused(edge.child)

    # Changing them.

    def _reopen(self, options: Mapping[str, Any], undo: ExitStack) -> list[NamedNode]:
        """Gives the children that a node has no more."""
        name = options.get("node-name")
        if name is None:
            raise InvalidOption("node-name not specified")
        found = self._named(name)
        children = dict(found.driver.children(found.options))
        left = []
        for option in sorted({*options, *found.options}):
            old, new = found.options.get(option), options.get(option)
            if option in children and isinstance(new, str) and new != found.children[option].child.name:
                left.append(self._exchange(found, option, self.get(new), undo))
            elif option == "read-only" and found.driver.is_filter:
                self._set_read_only(found, bool(new), undo)
            elif old != new and not (option in children and isinstance(new, str)):
                raise InvalidOption(f"Cannot change the option '{option}'")
        undo.callback(setattr, found, "options", found.options)
        found.options = dict(options)
        return left

    def _set_read_only(self, node: NamedNode, read_only: bool, undo: ExitStack) -> None:
        undo.callback(setattr, node, "read_only", node.read_only)
        node.read_only = read_only
        self._check(node)

    def _exchange(self, parent: NamedNode, name: str, new: NamedNode, undo: ExitStack) -> NamedNode:
        """Have another child in the place of one, which is given back."""
        edge = parent.children[name]
        if not parent.driver.can_exchange(name):
            raise NotSupported(f"Block format '{parent.options['driver']}' used by node '{parent.name}' does not "
                               f"support exchanging its child '{name}'")  # fmt: skip
        if any(each is parent for each in new.below()):
            raise InvalidOption(f"Making '{new.name}' a {name} child of '{parent.name}' would create a cycle")
        self._check_replacement(edge.child, new)
        for root in self._roots:
            if not isinstance(root.node, BlockBackend) and any(each is parent for each in root.edge.child.below()):
                raise NotSupported(f"{root.edge} cannot be changed: it was made to read the same for ever")
        return self._move(edge, new, undo)

    def _check_replacement(self, old: NamedNode, new: NamedNode) -> None:
        if new.node.size != old.node.size:
            raise InvalidOption(
                f"node '{new.name}' has {new.node.size} bytes, and cannot take the place of '{old.name}', which has "
                f"{old.node.size}: its users would not learn of it"
            )

    def _move(self, edge: Edge, new: NamedNode, undo: ExitStack) -> NamedNode:
        old = edge.child
        self._detach(edge)
        edge.child = new
        with ExitStack() as back:
            back.callback(self._attach_again, edge, old)
            self._attach(edge, back)
            undo.push(back.pop_all())
        return old

    def _attach_again(self, edge: Edge, old: NamedNode) -> None:
        edge.child = old
        self._attach(edge, ExitStack())

    @contextmanager
    def _all_or_nothing(self) -> Iterator[ExitStack]:
        """Undo what was entered there if the block fails, and have all go by the graph that is left."""
        with ExitStack() as undo:
            undo.callback(self._reroute)  # the last of all
            yield undo
            undo.pop_all()

    def _reroute(self) -> None:
        """Have every parent call what it is to call, now that the graph is another one."""
        for node in self._nodes.values():
            for edge in node.parents:
                if edge.parent is None or self._nodes.get(edge.parent.name) is not edge.parent:
                    continue
                follows = edge.parent.driver.set_child(edge.parent, edge.name, node)
                if not follows and edge.use.perm & Perm.WRITE and node.route is not node.node:
                    raise NotSupported(f"{edge} writes, and cannot tell copy-before-write of it")
        for root in self._roots:
            if isinstance(root.node, BlockBackend):
                root.node.set_node(root.edge.child.route)

    def _as_seen(self, node: NamedNode, *, writable: bool) -> BlockNode:
        """What a user is to have. Where it can never change, that is the node itself, whose reads are faster."""
        if node.node.read_only and not any(each.options["driver"] == CBW for each in node.below()):
            return node.node
        line = [*node.line()]
        zeroes = next((each.options["detect-zeroes"] for each in line if each.options.get("detect-zeroes")), "off")
        return BlockBackend(
            node.route,
            read_only=not writable or node.node.read_only,
            may_trim=writable and node.driver.may_trim,
            ignores_discard=any(each.options.get("discard") != "unmap" for each in line),
            detect_zeroes=zeroes != "off",
            unmap_zeroes=zeroes == "unmap",
        )

    def _drained_for(self, options: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Where a node of these options comes or goes: drained, if others have to do with it at once."""
        return self._drained() if options["driver"] == CBW else nullcontext()

    @contextmanager
    def _drained(self) -> Iterator[None]:
        """With no request under way, and none let in."""
        deadline = time.monotonic() + DRAIN_TIMEOUT
        backends = [root.node for root in self._roots if isinstance(root.node, BlockBackend)]
        try:
            for backend in backends:
                if not backend.drain(deadline):
                    raise NotSupported(
                        f"requests under way did not end within {DRAIN_TIMEOUT:g} s; nothing was changed"
                    )
            yield
        finally:
            for backend in backends:
                backend.resume()

    # Permissions.

    def _attach(self, edge: Edge, undo: ExitStack) -> None:
        """Give a child a parent, if all others agree."""
        if edge.parent is not None:
            if edge.parent.height + edge.child.depth > MAX_DEPTH:
                raise NotSupported(f"{MAX_DEPTH} nodes above each other are all there can be")
            edge.use = edge.parent.driver.use_of(edge.parent, edge.name)
            edge.parent.children[edge.name] = edge
        edge.child.parents.append(edge)
        undo.callback(self._detach, edge)
        self._refresh(edge.child)

    def _detach(self, edge: Edge) -> None:
        edge.child.parents.remove(edge)
        if edge.parent is not None:
            edge.parent.children.pop(edge.name, None)
        self._refresh(edge.child)

    def _refresh(self, node: NamedNode) -> None:
        """Work out what is done with a node and all below it. If that cannot be, all is as before."""
        edges = [edge for each in node.below() for edge in each.children.values()]
        before = [edge.use for edge in edges]
        try:
            self._update(node)
        except Qcow2SnapError:
            for edge, use in zip(edges, before, strict=True):
                edge.use = use
            for each in node.below():
                each.update_lock()
            raise

    def _update(self, node: NamedNode) -> None:
        self._check(node)
        node.update_lock()
        for edge in node.children.values():
            edge.use = node.driver.use_of(node, edge.name)
            self._update(edge.child)

    def _check(self, node: NamedNode) -> None:
        for user, other in permutations(node.parents, 2):
            if conflict := user.use.perm & ~other.use.shared:
                permissions = ", ".join(names(conflict)).replace("-", " ")
                raise PermissionConflict(
                    f"Permission conflict on node '{node.name}': permissions '{permissions}' are both required by "
                    f"{user} and unshared by {other}."
                )
        is_read_only = node.read_only or (hasattr(node, "node") and node.node.read_only and not node.driver.may_trim)
        if is_read_only and node.uses.perm & (Perm.WRITE | Perm.RESIZE):
            raise ReadOnly("Block node is read-only")
