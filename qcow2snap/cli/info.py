"""`qcow2snap info`: what `qemu-img info` says, plus sizes of snapshots, features, extensions, chain and sharing.

With --usage, the space that the states of the image take, which costs a walk over all L2 tables.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from qcow2snap.block.graph import OpenOptions, backing_chain
from qcow2snap.block.node import ImageFormatError
from qcow2snap.block.snapshot_ref import shown
from qcow2snap.cli import options, text
from qcow2snap.cli.list import snapshot_lines, usage_columns, usage_json
from qcow2snap.forensics import describe
from qcow2snap.forensics.listing import snapshot_json

if TYPE_CHECKING:
    from qcow2snap.conformance.usage import ImageUsage


@click.command("info")
@options.image_argument
@options.json_option
@options.usage_option
@options.opening_options
def command(image: str, as_json: bool, usage: bool, opening: OpenOptions) -> int:
    """Describe IMAGE. Backing and data files need not be there."""
    node = options.open_for(image, opening, with_children=False)
    damages: list[ImageFormatError] = []
    used: ImageUsage | None = None
    if usage:
        from qcow2snap.conformance.usage import usage_of

        used = usage_of(node)
    fields = describe.describe(node, damages)
    snapshots = list(node.snapshots())
    fields["snapshots"] = [snapshot_json(snapshot) for snapshot in snapshots]
    fields["features"] = describe.features(node)
    fields["extensions"] = describe.extensions(node)
    fields["sharing"] = describe.sharing(node)
    if used is not None:
        for entry, each in zip(fields["snapshots"], used.snapshots, strict=True):
            entry |= usage_json(each)
        fields["usage"] = {"active": usage_json(used.active), "used-by-snapshots": used.by_snapshots}
    links = backing_chain(image, opening)
    fields["backing-chain"] = describe.chain(links)
    if as_json:
        import json

        print(json.dumps(_printable(fields), indent=4))
    else:
        lines = _lines(fields, snapshot_lines(snapshots, None if used is None else used.snapshots))
        print("\n".join(lines + ([] if used is None else _usage_lines(used))))
    for link in links:
        if link.node is not None:
            link.node.close()
    node.close()
    for damage in damages:
        print(f"qcow2snap: warning: {damage}", file=sys.stderr)
    return 1 if damages or node.snapshot_table.damage else 0


def _printable(value: Any) -> Any:
    """The same with every text fit for JSON."""
    if isinstance(value, str):
        return text.json_text(value)
    if isinstance(value, dict):
        return {key: _printable(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_printable(below) for below in value]
    return value


def _lines(fields: dict[str, Any], snapshots: list[str]) -> list[str]:
    """For people: qemu-img's order and words, then what is ours."""
    lines = [
        f"image: {shown(fields['filename'])}",
        "file format: qcow2",
        f"virtual size: {text.size(fields['virtual-size'])} ({fields['virtual-size']} bytes)",
        f"disk size: {text.size(fields['actual-size'])}",
        f"cluster_size: {fields['cluster-size']}",
    ]
    if fields["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if fields.get("encrypted"):
        lines.append("encrypted: yes")
    if "backing-filename" in fields:
        full = fields["full-backing-filename"]
        actual = f" (actual path: {shown(full)})" if full != fields["backing-filename"] else ""
        lines.append(f"backing file: {shown(fields['backing-filename'])}{actual}")
    if "backing-filename-format" in fields:
        lines.append(f"backing file format: {shown(fields['backing-filename-format'])}")
    if fields["snapshots"]:
        lines += ["Snapshot list:", *snapshots]
    lines += ["Format specific information:", *_tree(fields["format-specific"]["data"], 1)]
    lines += ["Features:", *_tree({kind: ", ".join(bits) or "none" for kind, bits in fields["features"].items()}, 1)]
    if fields["extensions"]:
        lines.append("Header extensions:")
        for e in fields["extensions"]:
            lines.append(f"    {e['name']} ({e['type']}): {e['length']} bytes at {e['offset']:#x}")
    if fields["backing-chain"]:
        lines.append("Backing chain:")
        for depth, link in enumerate(fields["backing-chain"], start=1):
            state = link.get("error") or f"{link['format']}, {text.size(link['virtual-size'])}"
            lines.append(f"    {depth}: {shown(link['filename'])}: {shown(state)}")
    if fields["snapshots"]:
        lines.append("L2 tables (exclusive of all):")
        for state in fields["sharing"]:
            name = shown(f'"{state["name"]}" (id {state["id"]})') if "id" in state else "active disk"
            lines.append(f"    {name}: {state['l2-tables-exclusive']} of {state['l2-tables']}")
    return lines


def _usage_lines(usage: ImageUsage) -> list[str]:
    """What the table of snapshots has no row for."""
    active = ", ".join(f"{name.lower()} {size}" for name, (size,) in usage_columns([usage.active]).items())
    return ["Usage:", f"    active disk: {active}", f"    used by snapshots: {text.size(usage.by_snapshots)}"]


def _tree(value: dict[str, Any], depth: int) -> list[str]:
    """Nested fields, indented, in qemu-img's manner."""
    lines = []
    for key, below in value.items():
        label = "    " * depth + key.replace("-", " ") + ":"
        if isinstance(below, dict):
            lines += [label, *_tree(below, depth + 1)]
        elif isinstance(below, list):
            lines.append(label)
            for index, item in enumerate(below):
                head = "    " * (depth + 1) + f"[{index}]:"
                lines += [head, *_tree(item, depth + 2)] if isinstance(item, dict) else [f"{head} {shown(str(item))}"]
        else:
            lines.append(f"{label} {str(below).lower() if isinstance(below, bool) else shown(str(below))}")
    return lines
