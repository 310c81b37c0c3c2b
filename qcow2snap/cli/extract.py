"""`qcow2snap extract`: the active disk, a snapshot or a VM state as a raw file, whole or in part."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack

import click

from qcow2snap.block.graph import OpenOptions, files_of
from qcow2snap.block.node import BlockNode, FileError, ImageFormatError, OutOfRange
from qcow2snap.block.output import OutputFile, is_stream
from qcow2snap.cli import options
from qcow2snap.cli.progress import ProgressBar
from qcow2snap.cli.terminable import terminable
from qcow2snap.forensics.copy import copy_sparse, copy_stream
from qcow2snap.forensics.salvage import Hole


class Range(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """START:LENGTH, both as sizes; either may be left out."""

    name = "START:LENGTH"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int | None]:
        start, colon, length = str(value).partition(":")
        if not colon:
            self.fail(f"{value!r} is not START:LENGTH, such as 1M:64k", param, ctx)
        size = options.Size()
        return size.convert(start or "0", param, ctx), size.convert(length, param, ctx) if length else None


@click.command("extract")
@options.image_argument
@click.argument("out", metavar="OUT")
@options.snapshot_option
@click.option("--vm-state", is_flag=True, help="The VM state saved with the snapshot, not its disk.")
@click.option("--range", "wanted", type=Range(), help="Only these bytes, such as 1M:64k.")
@click.option("--skip-damaged", is_flag=True, help="Go on at damage; list what is missing in OUT.holes.json.")
@click.option("-f", "--force", is_flag=True, help="Overwrite OUT.")
@options.opening_options
def command(
    image: str,
    out: str,
    snapshot: str | None,
    vm_state: bool,
    wanted: tuple[int, int | None] | None,
    skip_damaged: bool,
    force: bool,
    opening: OpenOptions,
) -> None:
    """Copy a disk, a snapshot or a VM state of IMAGE to the raw, sparse file OUT; - is standard output."""
    disk = options.open_for(image, opening)
    node = options.choose(disk, snapshot, vm_state)
    start, length = wanted or (0, None)
    if start > node.size or (length is not None and start + length > node.size):
        raise OutOfRange(f"the range ends beyond the end, which is at {node.size}")
    length = node.size - start if length is None else length
    try:
        with terminable(), ProgressBar(f"extract {os.path.basename(image)}", length) as bar:
            if out == "-" or is_stream(out):
                _to_stream(node, start, length, out, skip_damaged, bar)
            else:
                output = OutputFile(out, length, force=force, inputs=files_of(disk))
                _to_file(node, start, length, output, skip_damaged, bar)
    except ImageFormatError as error:
        error.message += "; --skip-damaged extracts what can be read"
        raise
    disk.close()


def _to_file(
    node: BlockNode, start: int, length: int, output: OutputFile, skip_damaged: bool, bar: ProgressBar
) -> None:
    """To a file, which appears when it is whole; its list of holes, where one is wanted, appears before it."""
    with ExitStack() as stack:
        stack.enter_context(output)
        holes_file = stack.enter_context(output.beside(".holes.json")) if skip_damaged else None
        try:
            holes = copy_sparse(
                node,
                start,
                length,
                output.fd,
                skip_damaged=skip_damaged,
                write_zeros=not output.reads_as_zeros,
                progress=bar.advance,
            )
            if holes_file is not None:
                text = json.dumps([hole._asdict() for hole in holes], indent=4) + "\n"
                os.write(holes_file.fd, text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise FileError(f"{output.filename}: {error.strerror}; nothing was left there") from None
    _tell_sum(holes)


def _to_stream(node: BlockNode, start: int, length: int, out: str, skip_damaged: bool, bar: ProgressBar) -> None:
    """To a pipe or device, in order; holes are told on stderr."""
    if out == "-" and sys.stdout.isatty():
        raise FileError("standard output is a terminal; redirect it, or name a file")

    def write(data: memoryview) -> None:
        while data:
            data = data[os.write(fd, data) :]

    try:
        fd = sys.stdout.fileno() if out == "-" else os.open(out, os.O_WRONLY)
        holes = copy_stream(node, start, length, write, skip_damaged=skip_damaged, progress=bar.advance)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FileError(f"{'standard output' if out == '-' else out}: {error.strerror}") from None
    for hole in holes:
        print(f"qcow2snap: hole: {hole.length} bytes at {hole.offset}: {hole.message}", file=sys.stderr)
    _tell_sum(holes)


def _tell_sum(holes: list[Hole]) -> None:
    if holes:
        missing = sum(hole.length for hole in holes)
        places = "one hole" if len(holes) == 1 else f"{len(holes)} holes"
        print(f"qcow2snap: {missing} bytes in {places} could not be read", file=sys.stderr)
