"""What the query-* commands tell: nodes, snapshots and exports, with QEMU's field names. Changes nothing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from qcow2snap.block.file import FileNode
from qcow2snap.block.graph import files_of
from qcow2snap.block.named_nodes import Graph, NamedNode
from qcow2snap.block.node import BlockNode, ChangeTracking, Qcow2SnapError, SnapshotAccess, UnsupportedFeature
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.daemon.exports import BlockExports
from qcow2snap.forensics.describe import describe
from qcow2snap.forensics.listing import snapshot_json

_NO_LIMITS = dict.fromkeys(("iops", "iops_rd", "iops_wr", "bps", "bps_rd", "bps_wr", "write_threshold"), 0)


def exports(all_exports: BlockExports) -> list[dict[str, Any]]:
    return [
        {
            "id": export.id,
            "type": "nbd",
            "node-name": export.root.edge.child.name,
            "shutting-down": export.shutting_down,
        }
        for export in all_exports
    ]


def nodes(graph: Graph, *, flat: bool) -> list[dict[str, Any]]:
    return [_node(each, flat=flat) for each in graph]


def snapshots(node: NamedNode) -> list[dict[str, Any]]:
    """The snapshots of a node, as in query-named-block-nodes, each with its own size as `disk-size`."""
    if not isinstance(node.node, SnapshotAccess):
        raise UnsupportedFeature(f"node '{node.name}' ({node.options['driver']}) has no snapshots")
    return [snapshot_json(info) for info in node.node.snapshots()]


def _node(node: NamedNode, *, flat: bool) -> dict[str, Any]:
    cache = node.options.get("cache", {})
    return {
        **_NO_LIMITS,
        "node-name": node.name,
        "drv": node.options["driver"],
        "file": _filename(node),
        "ro": node.read_only,
        "encrypted": False,
        "detect_zeroes": node.options.get("detect-zeroes", "off"),
        "cache": {"writeback": True, "direct": cache.get("direct", False), "no-flush": cache.get("no-flush", False)},
        "backing_file_depth": node.node.nb_backing,
        "active": True,
        "image": _image(node, flat=flat),
        **_dirty_bitmaps(node.node),
    }


def _image(node: NamedNode, *, flat: bool) -> dict[str, Any]:
    image: dict[str, Any] = {
        "filename": _filename(node),
        "format": node.options["driver"],
        "virtual-size": node.node.size,
        "dirty-flag": False,
    }
    files = [file for each in node.line() for file in _own_files(each.node)][:1]
    if files:
        image["actual-size"] = files[0].allocated_size()
    if isinstance(node.node, FileNode):
        image["format-specific"] = {"type": node.options["driver"], "data": {}}
    if not isinstance(node.node, Qcow2Node):
        return image
    image |= describe(node.node, [])
    if found := node.node.snapshots():
        image["snapshots"] = [_without_size(snapshot_json(info)) for info in found]
    return image


def _without_size(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "disk-size"}


def _dirty_bitmaps(node: BlockNode) -> dict[str, Any]:
    if isinstance(node, ChangeTracking) and isinstance(node, Qcow2Node):
        with suppress(Qcow2SnapError):
            bitmaps = node.dirty_bitmaps()
            if bitmaps:
                return {"dirty-bitmaps": [_bitmap(node, name) for name in bitmaps]}
    return {}


def _bitmap(node: Qcow2Node, name: str) -> dict[str, Any]:
    count = sum(length for _, length in node.dirty_extents(name, 0, node.size))
    return {"name": name, "count": count, "recording": False, "persistent": True, "busy": False}


def _filename(node: NamedNode) -> str:
    for each in node.line():
        if isinstance(name := getattr(each.node, "filename", None), str):
            return name
    return ""


def _own_files(node: BlockNode) -> list[FileNode]:
    return [node] if isinstance(node, FileNode) else files_of(node)
