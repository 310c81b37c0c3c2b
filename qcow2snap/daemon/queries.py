"""What the query-* commands tell: nodes, snapshots and exports, with QEMU's field names. Changes nothing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from qcow2snap.block.blockdev import permissions
from qcow2snap.block.blockdev.edges import NamedNode
from qcow2snap.block.blockdev.named_nodes import Graph
from qcow2snap.block.file import FileNode
from qcow2snap.block.graph import files_of
from qcow2snap.block.node import BlockNode, Qcow2SnapError, SnapshotAccess, UnsupportedFeature
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


def block_graph(graph: Graph) -> dict[str, Any]:
    """x-debug-query-block-graph: nodes and their users, and what each does with which and lets others do."""
    numbers: dict[object, int] = {}
    listed, edges = [], []
    for root in graph.roots:
        numbers[root.edge] = len(numbers) + 1
        listed.append({"id": numbers[root.edge], "type": "block-backend", "name": ""})
    for node in graph:
        numbers[node] = len(numbers) + 1
        listed.append({"id": numbers[node], "type": "block-driver", "name": node.name})
    for node in graph:
        for edge in node.parents:
            edges.append(
                {
                    "parent": numbers[edge.parent or edge],
                    "child": numbers[node],
                    "name": edge.name,
                    "perm": permissions.names(edge.use.perm),
                    "shared-perm": permissions.names(edge.use.shared),
                }
            )
    return {"nodes": listed, "edges": edges}


def snapshots(node: NamedNode) -> list[dict[str, Any]]:
    """The snapshots of a node, as in query-named-block-nodes, each with its own size as `disk-size`."""
    if not isinstance(node.node, SnapshotAccess):
        raise UnsupportedFeature(f"node '{node.name}' ({node.options['driver']}) has no snapshots")
    return [snapshot_json(info) for info in node.node.snapshots()]


def _node(node: NamedNode, *, flat: bool) -> dict[str, Any]:
    cache = node.options.get("cache", {})
    files = [file for each in node.line() for file in _own_files(each.node)]
    image = _image(node.node, node.options["driver"], files, flat=flat)
    backing = node.node.backing if isinstance(node.node, Qcow2Node) else None
    return {
        **_NO_LIMITS,
        "node-name": node.name,
        "drv": node.options["driver"],
        "file": image["filename"],
        "ro": node.read_only,
        "encrypted": False,
        "detect_zeroes": node.options.get("detect-zeroes", "off"),
        "cache": {"writeback": True, "direct": cache.get("direct", False), "no-flush": cache.get("no-flush", False)},
        "backing_file_depth": node.node.nb_backing,
        **({} if backing is None else {"backing_file": _filename(backing)}),
        "active": True,
        "image": image,
        **_dirty_bitmaps(node.node, image),
    }


def _image(node: BlockNode, image_format: str, files: list[FileNode], *, flat: bool) -> dict[str, Any]:
    """ImageInfo. `files`: those at the bottom, the nearest first; without `flat`, with the image below, and so on."""
    image: dict[str, Any] = {
        "filename": getattr(node, "filename", "") or next((file.filename for file in files), ""),
        "format": image_format,
        "virtual-size": node.size,
        "dirty-flag": False,
    }
    if files:
        image["actual-size"] = files[0].allocated_size()
    if isinstance(node, FileNode):
        image["format-specific"] = {"type": image_format, "data": {}}
    if not isinstance(node, Qcow2Node):
        return image
    image |= describe(node, [])
    if found := node.snapshots():
        image["snapshots"] = [_without_size(snapshot_json(info)) for info in found]
    if node.backing is not None and not flat:
        below = "qcow2" if isinstance(node.backing, Qcow2Node) else "raw"
        image["backing-image"] = _image(node.backing, below, _own_files(node.backing), flat=flat)
    return image


def _without_size(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "disk-size"}


def _dirty_bitmaps(node: BlockNode, image: dict[str, Any]) -> dict[str, Any]:
    """The bitmaps that can be read; image has the granularity of each."""
    if not isinstance(node, Qcow2Node):
        return {}
    listed = image["format-specific"]["data"].get("bitmaps", ())
    known = {bitmap["name"]: bitmap for bitmap in listed}
    found = []
    with suppress(Qcow2SnapError):
        for name in node.dirty_bitmaps():
            count = sum(length for _, length in node.dirty_extents(name, 0, node.size))
            info = known.get(name, {"granularity": 0, "flags": []})
            flags = {"recording": "auto" in info["flags"], "persistent": True, "busy": False}
            found.append({"name": name, "granularity": info["granularity"], "count": count, **flags})
    return {"dirty-bitmaps": found} if found else {}


def _filename(node: BlockNode) -> str:
    return getattr(node, "filename", "") or next((file.filename for file in _own_files(node)), "")


def _own_files(node: BlockNode) -> list[FileNode]:
    return [node] if isinstance(node, FileNode) else files_of(node)
