"""`qcow2snap snapshot`: make, delete, apply and rename the internal snapshots of an image that nobody has open."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from qcow2snap.block.graph import OpenOptions, open_writable
from qcow2snap.block.node import ImageInUse
from qcow2snap.cli import options
from qcow2snap.cli.list import command as list_command
from qcow2snap.forensics.listing import snapshot_json

if TYPE_CHECKING:
    from qcow2snap.block.qcow2.writing.node import WritableQcow2Node


@click.group("snapshot", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Make, delete, apply and rename snapshots of an image that is not in use.

    Each happens whole or not at all, also if the machine stops in the middle of it.
    """


command.add_command(list_command, "list")


def _command(name: str, short_help: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A command on an image, with the option that lets backing and data files be followed."""

    def decorated(function: Callable[..., Any]) -> click.Command:
        return command.command(name, short_help=short_help)(options.image_argument(options.allow_path_option(function)))

    return decorated


@_command("create", "Keep the disk as it is now.")
@click.argument("name")
@options.json_option
def create(image: str, name: str, allow_paths: tuple[str, ...], as_json: bool) -> None:
    """Keep what the disk of IMAGE is now as snapshot NAME, with its size and the date, and no VM state."""
    with _writable(image, allow_paths) as node:
        made = node.create_snapshot(name)
    if as_json:
        print(json.dumps(snapshot_json(made), indent=4))


@_command("delete", "Forget a snapshot, and free what only it has.")
@click.argument("ref")
def delete(image: str, ref: str, allow_paths: tuple[str, ...]) -> None:
    """Delete the snapshot REF of IMAGE, and free what only it has.

    REF is NAME, name=NAME, id=ID, or both (id=3,name=x).
    """
    with _writable(image, allow_paths) as node:
        node.delete_snapshot(node.find_snapshot(ref))


@_command("apply", "Make the disk what a snapshot is.")
@click.argument("ref")
def apply(image: str, ref: str, allow_paths: tuple[str, ...]) -> None:
    """Make the disk of IMAGE what snapshot REF is, with the snapshot's size. What the disk was is lost.

    The snapshot stays, and so do all others, with their own sizes. A VM state is not loaded.
    """
    with _writable(image, allow_paths) as node:
        node.apply_snapshot(node.find_snapshot(ref))


@_command("rename", "Give a snapshot another name.")
@click.argument("ref")
@click.argument("name")
def rename(image: str, ref: str, name: str, allow_paths: tuple[str, ...]) -> None:
    """Give the snapshot REF of IMAGE the name NAME. Its id, date and contents stay."""
    with _writable(image, allow_paths) as node:
        node.rename_snapshot(node.find_snapshot(ref), name)


@contextmanager
def _writable(image: str, allow_paths: tuple[str, ...]) -> Iterator[WritableQcow2Node]:
    try:
        node = open_writable(image, OpenOptions(allow_paths=allow_paths))
    except ImageInUse as error:
        raise ImageInUse(
            f"{error}; or have who runs it do it: blockdev-snapshot-internal-sync and "
            "blockdev-snapshot-delete-internal-sync over QMP"
        ) from None
    try:
        yield node
    finally:
        node.close()
