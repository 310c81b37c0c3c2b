"""Internal snapshots made and deleted over QMP (QEMU blockdev.c), under guests and beside readers of other snapshots.

blockdev-snapshot-delete-internal-sync has `force` as well: a snapshot that a node reads is deleted only so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcow2snap.block.named_nodes import Graph
from qcow2snap.block.node import InvalidOption, NotSupported, ReadOnly, SnapshotInfo, SnapshotNotFound
from qcow2snap.block.qapi import Boolean, String, Struct, optional
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.forensics.listing import snapshot_json

CREATE_OPTIONS = Struct({"device": String(), "name": String()})
DELETE_OPTIONS = Struct({"device": String(), **optional(id=String(), name=String(), force=Boolean())})


def create(graph: Graph, arguments: Mapping[str, Any]) -> None:
    device, name = arguments["device"], arguments["name"]
    node = _writable(graph, device)
    if not name:
        raise InvalidOption("Name is empty")
    if any(each.name == name for each in node.snapshots()):
        raise InvalidOption(f"Snapshot with name '{name}' already exists on device '{device}'")
    node.create_snapshot(name)


def delete(graph: Graph, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of the snapshot that is gone."""
    device, id_, name = arguments["device"], arguments.get("id"), arguments.get("name")
    node = _writable(graph, device)
    if id_ is None and name is None:
        raise InvalidOption("Name or id must be provided")
    snapshot = _find(node, id_, name)
    if snapshot is None:
        raise SnapshotNotFound(
            f"Snapshot with id '{_or_null(id_)}' and name '{_or_null(name)}' does not exist on device '{device}'"
        )
    node.delete_snapshot(snapshot, force=arguments.get("force", False))
    return snapshot_json(snapshot)


def _writable(graph: Graph, device: str) -> Any:
    """The image; a WritableQcow2Node, which is not imported before there is one."""
    named = graph.get(device, device=device)
    node = named.node
    if not isinstance(node, Qcow2Node):
        driver = named.options["driver"]
        raise NotSupported(f"Block format '{driver}' used by device '{device}' does not support internal snapshots")
    if node.read_only:
        raise ReadOnly(f"Device '{device}' is read only")
    return node


def _find(node: Qcow2Node, id_: str | None, name: str | None) -> SnapshotInfo | None:
    """The first that has what is given, as in QEMU."""
    for snapshot in node.snapshots():
        if id_ in (None, snapshot.id) and name in (None, snapshot.name):
            return snapshot
    return None


def _or_null(text: str | None) -> str:
    return "null" if text is None else text
