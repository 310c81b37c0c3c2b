"""Exports that come and go: by id, each with its hold on a node, until its last client has left (QEMU block/export)."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from formats.nbd import MAX_STRING
from qcow2snap.block.blockdev.edges import NamedNode, Root
from qcow2snap.block.blockdev.named_nodes import Graph
from qcow2snap.block.blockdev.qapi import Alternate, Boolean, ListOf, String, Struct, Type, Union, optional
from qcow2snap.block.node import (
    BitmapNotFound,
    ChangeTracking,
    InvalidOption,
    NBDError,
    Qcow2SnapError,
    SnapshotAccess,
)
from qcow2snap.block.snapshot_access import SnapshotAccessNode
from qcow2snap.nbd.export import Export, LiveExports
from qcow2snap.nbd.names import SnapshotNames
from qcow2snap.nbd.strings import is_string

PATIENCE = 5.0  # seconds that a command waits for clients which it has cut off

_ID = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_BITMAP = Alternate("BlockDirtyBitmapOrStr", string=String(), obj=Struct({"node": String(), "name": String()}))

# What the same export is told by, in --export and block-export-add, and in nbd-server-add.
_NBD_MEMBERS: dict[str, Type] = optional(name=String(), description=String())
EXPORT_OPTIONS = Union(
    {
        "id": String(),
        "node-name": String(),
        **optional(writable=Boolean(), writethrough=Boolean(), iothread=String(), fixed_iothread=Boolean()),
    },
    "type",
    {"nbd": Struct(_NBD_MEMBERS | optional(bitmaps=ListOf(_BITMAP), bitmap=String(), allocation_depth=Boolean()))},
)
SERVER_ADD_OPTIONS = Struct({"device": String(), **_NBD_MEMBERS, **optional(writable=Boolean(), bitmap=String())})


class BlockExport:
    """One export. Its hold on the node is given back when the last client has left."""

    def __init__(self, name: str, root: Root, export: Export) -> None:
        self.id = name
        self.root = root
        self.export = export
        self.shutting_down = False
        self.gone = threading.Event()


class BlockExports:
    """All exports, and what the NBD server shows of them.

    threads  one, the daemon's; what clients' threads have to say comes there by `call_soon`
    """

    def __init__(
        self,
        graph: Graph,
        call_soon: Callable[[Callable[[], None]], None],
        event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.live = LiveExports()
        self._graph = graph
        self._call_soon = call_soon
        self._event = event
        self._exports: dict[str, BlockExport] = {}

    def __iter__(self) -> Iterator[BlockExport]:
        """The newest first, as QEMU lists them."""
        return iter([*reversed(self._exports.values())])

    def get(self, name: str) -> BlockExport:
        found = self._exports.get(name)
        if found is None:
            raise InvalidOption(f"Export '{name}' is not found")
        return found

    def add(self, options: Mapping[str, Any], *, is_served: bool) -> None:
        """An export by options of EXPORT_OPTIONS. `is_served`: there is an NBD server."""
        name = options["id"]
        if not _ID.fullmatch(name):
            raise InvalidOption("Invalid block export id")
        if name in self._exports:
            raise InvalidOption(f"Block export id '{name}' is already in use")
        node = self._graph.get(options["node-name"])
        if not is_served:
            raise NBDError("NBD server not running")
        shown = options.get("name", options["node-name"])
        description = options.get("description", "")
        _check_string("export name", shown)
        _check_string("description", description)
        if self.live.find(shown) is not None:
            raise InvalidOption(f"NBD server already has export named '{shown}'")
        bitmaps = _bitmaps(node, options)
        writable = options.get("writable", False)
        root = self._graph.attach(node.name, writable=writable)
        try:
            export = Export(
                shown,
                partial(_node_of, root),
                description,
                snapshots=_snapshots(node),
                may_trim=writable and root.node.read_only,
                dirty_bitmaps=bitmaps,
            )
            self.live.add(export)
        except BaseException:
            self._graph.release(root)
            raise
        self._exports[name] = BlockExport(name, root, export)

    def delete(self, name: str, *, hard: bool) -> None:
        """Let no client in any more, and cut off those that are in; without `hard`, refuse if there is any."""
        self._close(self.get(name), hard=hard)

    def delete_all(self) -> None:
        for export in self:
            self._close(export, hard=True)

    def _close(self, export: BlockExport, *, hard: bool) -> None:
        if export.shutting_down:
            raise InvalidOption(f"Export '{export.id}' is already shutting down")
        if not export.export.clients.close(only_if_unused=not hard, when_gone=export.gone.set):
            raise InvalidOption(f"export '{export.id}' still in use")
        export.shutting_down = True
        self.live.remove(export.export)
        if export.gone.wait(PATIENCE):
            self._finish(export)
        else:  # a client's request hangs below; the daemon goes on
            threading.Thread(target=self._finish_later, args=[export], daemon=True).start()

    def _finish_later(self, export: BlockExport) -> None:
        export.gone.wait()
        self._call_soon(partial(self._finish, export))

    def _finish(self, export: BlockExport) -> None:
        del self._exports[export.id]
        self._graph.release(export.root)
        self._event("BLOCK_EXPORT_DELETED", {"id": export.id})


def _check_string(what: str, text: str) -> None:
    """NBD can carry it."""
    if len(text.encode(errors="replace")) > MAX_STRING:
        raise InvalidOption(f"{what} '{text[:64]}...' too long")
    if not is_string(text):
        raise InvalidOption(f"{what} {text[:64]!a} is no UTF-8 without NUL, and NBD has nothing else")


def _node_of(root: Root) -> Any:
    return root.node


def _snapshots(node: NamedNode) -> SnapshotNames | None:
    """The snapshots with which a node can be compared: those of its image."""
    image = node.node.file if isinstance(node.node, SnapshotAccessNode) else node.node
    if isinstance(image, SnapshotAccess) and isinstance(image, ChangeTracking):
        return SnapshotNames(image.snapshots())
    return None


def _bitmaps(node: NamedNode, options: Mapping[str, Any]) -> list[str]:
    """The names of the dirty bitmaps to show, each of which has to be there and to be known."""
    asked = [*options.get("bitmaps", ()), *([options["bitmap"]] if "bitmap" in options else ())]
    names = [bitmap if isinstance(bitmap, str) else bitmap["name"] for bitmap in asked]
    for bitmap in asked:
        if not isinstance(bitmap, str) and bitmap["node"] != node.name:
            raise BitmapNotFound(f"Bitmap '{bitmap['name']}' is not found: of node '{node.name}' only, not of others")
    for name in names:
        try:
            known = node.node.dirty_bitmaps() if isinstance(node.node, ChangeTracking) else ()
        except Qcow2SnapError as error:
            raise BitmapNotFound(f"Bitmap '{name}' is not found: {error}") from None
        if name not in known:
            raise BitmapNotFound(f"Bitmap '{name}' is not found")
    return names
