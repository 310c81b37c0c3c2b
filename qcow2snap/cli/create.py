"""`qcow2snap create`: a new, empty qcow2 image, with the options of `qemu-img create`."""

from __future__ import annotations

import click

from qcow2snap.block.new_image import create_image
from qcow2snap.block.qcow2.creating.create_options import InvalidOption, split_options
from qcow2snap.cli import options
from qcow2snap.cli.signals import ended_by_signals


@click.command("create")
@click.argument("image", metavar="IMAGE")
@click.argument("size", metavar="[SIZE]", type=options.Size(), required=False)
@click.option("-f", "--format", "image_format", type=click.Choice(["qcow2"]), default="qcow2", help="Only qcow2.")
@options.create_options
@click.option("-b", "--backing", "backing", metavar="FILE", help="The backing file, relative to IMAGE's directory.")
@click.option("-F", "--backing-format", "backing_format", metavar="FMT", help="Its format, which has to be stated.")
@click.option("-u", "--unsafe", "unsafe", is_flag=True, help="Do not look at the backing file.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option("-q", "--quiet", is_flag=True, help="Do not say what is made.")
def command(
    image: str,
    size: int | None,
    image_format: str,
    create_options: tuple[str, ...],
    backing: str | None,
    backing_format: str | None,
    unsafe: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Make an empty qcow2 image of SIZE bytes (512, 64k, 1.5G); with a backing file, of its size if none is given.

    The options are those of qemu-img create. Unlike it, this overwrites nothing without --force.
    """
    chosen: dict[str, str] = {}
    for text in create_options:
        chosen |= split_options(text)
    stated = chosen.pop("size", None)
    if stated is not None:
        if size is not None:
            raise InvalidOption("the size is given twice")
        size = options.Size().convert(stated, None, None)
    if backing is not None:
        chosen["backing_file"] = backing
    if backing_format is not None:
        chosen["backing_fmt"] = backing_format
    with ended_by_signals():
        created = create_image(image, size, chosen, force=force, unsafe_backing=unsafe)
    if not quiet:
        print(f"Formatting '{image}', fmt={image_format} {created}")
