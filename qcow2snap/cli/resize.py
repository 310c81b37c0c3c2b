"""`qcow2snap resize`: a larger disk, whose snapshots keep their sizes."""

from __future__ import annotations

import click

from qcow2snap.block.graph import OpenOptions, open_writable
from qcow2snap.block.sizes import parse_size
from qcow2snap.cli import options


@click.command("resize")
@options.image_argument
@click.argument("size", metavar="[+]SIZE")
@options.allow_path_option
def command(image: str, size: str, allow_paths: tuple[str, ...]) -> None:
    """Make the disk of IMAGE larger: SIZE bytes, or as many more with a plus. What is new reads as zeros.

    Snapshots keep the sizes that they have. Only images that nobody has open; none is made smaller.
    """
    try:
        number = parse_size(size.removeprefix("+"))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    node = open_writable(image, OpenOptions(allow_paths=allow_paths))
    try:
        wanted = node.size + number if size.startswith("+") else number
        node.resize(-(-wanted // 512) * 512)
    finally:
        node.close()
