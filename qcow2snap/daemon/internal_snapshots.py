"""Internal snapshots made and deleted over QMP (QEMU blockdev.c), under guests and beside readers of other snapshots.

blockdev-snapshot-delete-internal-sync has `force` as well: a snapshot that a node reads is deleted only so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcow2snap.block.blockdev.edges import NamedNode
from qcow2snap.block.blockdev.named_nodes import Graph
from qcow2snap.block.blockdev.qapi import Boolean, String, Struct, optional
from qcow2snap.block.node import InvalidOption, NotSupported, ReadOnly, SnapshotInfo, SnapshotNotFound
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.forensics.listing import snapshot_json

CREATE_OPTIONS = Struct({"device": String(), "name": String()})
DELETE_OPTIONS = Struct({"device": String(), **optional(id=String(), name=String(), force=Boolean())})

# Nodes that may be above an image: none of them has what the image holds laid out in a way of its own.
_PASSIVE = ("snapshot-access", "copy-before-write", "raw")


def create(graph: Graph, arguments: Mapping[str, Any]) -> None:
    device, name = arguments["device"], arguments["name"]
    named = graph.get(device, device=device)
    node = _writable(
        named, f"Block format '{named.options['driver']}' used by device '{device}' does not support internal snapshots"
    )
    if not name:
        raise InvalidOption("Name is empty")
    if any(each.name == name for each in node.snapshots()):
        raise InvalidOption(f"Snapshot with name '{name}' already exists on device '{device}'")
    node.create_snapshot(name)


def delete(graph: Graph, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of the snapshot that is gone."""
    device, id_, name = arguments["device"], arguments.get("id"), arguments.get("name")
    named = graph.get(device, device=device)
    if id_ is None and name is None:
        raise InvalidOption("Name or id must be provided")
    node = _writable(named, "Failed to get a snapshot list: Operation not supported")
    snapshot = _find(node, id_, name)
    if snapshot is None:
        raise SnapshotNotFound(
            f"Snapshot with id '{_or_null(id_)}' and name '{_or_null(name)}' does not exist on device '{device}'"
        )
    node.delete_snapshot(snapshot, force=arguments.get("force", False))
    return snapshot_json(snapshot)


def _writable(named: NamedNode, unsupported: str) -> Any:
    """The image; a WritableQcow2Node, which is not imported before there is one."""
    if any(edge.parent is not None and edge.parent.options["driver"] not in _PASSIVE for edge in named.parents):
        raise NotSupported("Need a root block node")
    if not isinstance(named.node, Qcow2Node):
        raise NotSupported(unsupported)
    if named.node.read_only:
        raise ReadOnly(f"Device '{named.name}' is read only")
    return named.node


def _find(node: Qcow2Node, id_: str | None, name: str | None) -> SnapshotInfo | None:
    """The first that has what is given, as in QEMU."""
    for snapshot in node.snapshots():
        if id_ in (None, snapshot.id) and name in (None, snapshot.name):
            return snapshot
    return None


def _or_null(text: str | None) -> str:
    return "null" if text is None else text
