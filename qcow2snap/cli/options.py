"""Options that commands share, and the image that they open. Each means the same everywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qcow2snap.block.node import BlockNode, OutOfRange
from qcow2snap.block.sizes import parse_size

if TYPE_CHECKING:  # loaded where images are opened: a command that opens none by these is quicker without
    from qcow2snap.block.graph import OpenOptions
    from qcow2snap.block.qcow2.driver import Qcow2Node

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A number of bytes, with QEMU's suffixes: 512, 64k, 10M, 1G, 2T, 0x200."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def image_argument(function: F) -> F:
    return click.argument("image", metavar="IMAGE")(function)


def snapshot_option(function: F) -> F:
    return click.option(
        "-s",
        "--snapshot",
        "-l",
        "snapshot",
        metavar="REF",
        help="NAME, name=NAME, id=ID, or both (id=3,name=x). Default: the active disk.",
    )(function)


def force_share_option(function: F) -> F:
    return click.option(
        "-U", "--force-share", is_flag=True, help="Read an image that another process has open for writing."
    )(function)


def usage_option(function: F) -> F:
    return click.option(
        "--usage",
        is_flag=True,
        help="Also the space of each snapshot: alone (USED), in all (REFER), with others (SHARED).",
    )(function)


def allow_path_option(function: F) -> F:
    return click.option(
        "--allow-path",
        "allow_paths",
        metavar="DIR",
        multiple=True,
        help="Also follow backing and data files in this directory. Repeatable.",
    )(function)


def opening_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How images are opened; the command gets them as one argument, `opening`."""
    from qcow2snap.block.graph import OpenOptions
    from qcow2snap.block.qcow2.driver import TABLE_CACHE_SIZE

    @force_share_option
    @allow_path_option
    @click.option(
        "--l2-cache-size",
        type=Size(),
        default=TABLE_CACHE_SIZE,
        help="Bytes of decoded L2 tables to keep.  [default: 32M]",
    )
    @wraps(function)
    def with_opening(
        *args: Any, force_share: bool, allow_paths: tuple[str, ...], l2_cache_size: int, **others: Any
    ) -> Any:
        return function(*args, opening=OpenOptions(force_share, allow_paths, l2_cache_size), **others)

    return with_opening


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--json, and qemu-img's --output=json for those who know it; the command gets `as_json`."""

    @click.option("--json", "as_json", is_flag=True, help="JSON, with qemu-img's field names.")
    @click.option("--output", type=click.Choice(["human", "json"]), hidden=True)
    @wraps(function)
    def with_json(*args: Any, as_json: bool, output: str | None, **others: Any) -> Any:
        return function(*args, as_json=as_json or output == "json", **others)

    return with_json


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which `--help` is to show them."""

    def decorated(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorated


# As of `qemu-img map`; `length_within` says what they come to.
range_options = together(
    click.option("--start-offset", type=Size(), default=0, help="Start there."),
    click.option("--max-length", type=Size(), default=None, help="No more than that."),
)


# As of `qemu-img create` and `convert`; the command gets `create_options`, each as it was given.
create_options = click.option(
    "-o",
    "create_options",
    metavar="OPTIONS",
    multiple=True,
    help="NAME=VALUE, more after commas: cluster_size, compat, compression_type, data_file, ...",
)


def length_within(size: int, start_offset: int, max_length: int | None) -> int:
    """How many of so many bytes range_options select. OutOfRange if they begin beyond the end."""
    if start_offset > size:
        raise OutOfRange(f"--start-offset {start_offset} is beyond the end, which is at {size}")
    return size - start_offset if max_length is None else min(size - start_offset, max_length)


def open_for(image: str, opening: OpenOptions, *, with_children: bool = True) -> Qcow2Node:
    """Open the image of a command, with its warnings on stderr."""
    from qcow2snap.block.graph import open_image

    node = open_image(image, opening, with_children=with_children)
    for warning in node.warnings:
        print(f"qcow2snap: warning: {image}: {warning}", file=sys.stderr)
    return node


def choose(image: Qcow2Node, snapshot: str | None, vm_state: bool) -> BlockNode:
    """What -s and --vm-state select: the active disk, a snapshot, or its VM state."""
    if snapshot is not None:
        from qcow2snap.block.snapshot_access import SnapshotAccessNode

        access = SnapshotAccessNode(image, snapshot)
        return image.vm_state(access.snapshot) if vm_state else access
    if vm_state:
        raise click.UsageError("--vm-state needs -s: a VM state belongs to a snapshot")
    return image
