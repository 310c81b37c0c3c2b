"""`qcow2snap extract`: the active disk, a snapshot or a VM state as a raw file or qcow2 image, whole or in part."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import NamedTuple

import click

from qcow2snap.block.file import FileNode
from qcow2snap.block.graph import OpenOptions, files_of
from qcow2snap.block.node import BlockNode, FileError, ImageFormatError, OutOfRange
from qcow2snap.block.output import OutputFile, in_one_go, is_stream
from qcow2snap.cli import options
from qcow2snap.cli.progress import ProgressBar
from qcow2snap.cli.signals import ended_by_signals
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
@click.option("-O", "--output-format", type=click.Choice(["raw", "qcow2"]), default="raw", help="[default: raw]")
@click.option("-c", "--compress", is_flag=True, help="Compress the clusters of a qcow2 image.")
@options.create_options
@click.option("--skip-damaged", is_flag=True, help="Go on at damage; list what is missing in OUT.holes.json.")
@click.option("-f", "--force", is_flag=True, help="Overwrite OUT.")
@options.opening_options
def command(
    image: str,
    out: str,
    snapshot: str | None,
    vm_state: bool,
    wanted: tuple[int, int | None] | None,
    output_format: str,
    compress: bool,
    create_options: tuple[str, ...],
    skip_damaged: bool,
    force: bool,
    opening: OpenOptions,
) -> None:
    """Copy a disk, a snapshot or a VM state of IMAGE to the raw, sparse file OUT; - is standard output.

    With -O qcow2, to a new qcow2 image without snapshots; -o takes the options of `qcow2snap create`.
    """
    if output_format == "raw" and (compress or create_options):
        raise click.UsageError("-c and -o are for qcow2 images: add -O qcow2")
    disk = options.open_for(image, opening)
    node = options.choose(disk, snapshot, vm_state)
    start, length = wanted or (0, None)
    if start > node.size or (length is not None and start + length > node.size):
        raise OutOfRange(f"the range ends beyond the end, which is at {node.size}")
    length = node.size - start if length is None else length
    part = _Part(node, start, length, skip_damaged)
    try:
        with ended_by_signals(), ProgressBar(f"extract {os.path.basename(image)}", length) as bar:
            if output_format == "qcow2":
                inputs = files_of(disk)
                _to_qcow2(part, out, create_options, compress=compress, force=force, inputs=inputs, bar=bar)
            elif out == "-" or is_stream(out):
                _to_stream(part, out, bar)
            else:
                _to_file(part, OutputFile(out, length, force=force, inputs=files_of(disk)), bar)
    except ImageFormatError as error:
        error.message += "; --skip-damaged extracts what can be read"
        raise
    disk.close()


class _Part(NamedTuple):
    """What is to be copied."""

    node: BlockNode
    start: int
    length: int
    skip_damaged: bool


def _to_file(part: _Part, output: OutputFile, bar: ProgressBar) -> None:
    def copy() -> list[Hole]:
        return copy_sparse(
            part.node,
            part.start,
            part.length,
            output.fd,
            skip_damaged=part.skip_damaged,
            write_zeros=not output.reads_as_zeros,
            progress=bar.advance,
        )

    _with_holes(part, output, copy)


def _to_qcow2(
    part: _Part,
    out: str,
    create_options: tuple[str, ...],
    *,
    compress: bool,
    force: bool,
    inputs: Sequence[FileNode],
    bar: ProgressBar,
) -> None:
    from qcow2snap.block.new_image import data_output, image_output
    from qcow2snap.block.qcow2.creating.create_options import InvalidOption, made, split_options
    from qcow2snap.forensics.copy_qcow2 import Target, copy_qcow2

    if out == "-" or is_stream(out):
        raise FileError("a qcow2 image cannot be written to a pipe: its header is written last; name a file")
    chosen = made(part.length, chain.from_iterable(split_options(text).items() for text in create_options))
    if chosen.backing_file is not None:
        raise InvalidOption("a copy is whole, and has no backing file")
    if compress and chosen.data_file is not None:
        raise InvalidOption("clusters in an external data file cannot be compressed")
    if chosen.size != part.length:
        chosen = chosen._replace(size=part.length)
        print(
            f"qcow2snap: {out}: QEMU reads whole sectors, and so not its last {part.length % 512} bytes",
            file=sys.stderr,
        )
    output = image_output(out, chosen, force=force, inputs=inputs)
    data = None
    if chosen.data_file is not None:
        data = data_output(out, chosen.data_file, force=force, inputs=inputs)

    def copy() -> list[Hole]:
        target = Target(chosen, output.fd, data.fd if data else None, in_place=not output.reads_as_zeros)
        return copy_qcow2(
            part.node,
            part.start,
            part.length,
            target,
            compress=compress,
            skip_damaged=part.skip_damaged,
            progress=bar.advance,
        )

    _with_holes(part, output, copy, data=data)


def _with_holes(
    part: _Part, output: OutputFile, copy: Callable[[], list[Hole]], *, data: OutputFile | None = None
) -> None:
    """A file that appears when it is whole, after its data file, and its list of holes, where one is wanted."""
    with ExitStack() as stack:
        stack.enter_context(output)
        if data is not None:
            stack.enter_context(data)
        holes_file = stack.enter_context(output.beside(".holes.json")) if part.skip_damaged else None
        try:
            holes = copy()
            if holes_file is not None:
                text = json.dumps([hole._asdict() for hole in holes], indent=4) + "\n"
                os.write(holes_file.fd, text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise FileError(f"{output.filename}: {error.strerror}; nothing was left there") from None
        with in_one_go:
            stack.close()
    _tell_sum(holes)


def _to_stream(part: _Part, out: str, bar: ProgressBar) -> None:
    """To a pipe or device, in order; holes are told on stderr."""
    if out == "-" and sys.stdout.isatty():
        raise FileError("standard output is a terminal; redirect it, or name a file")

    def write(data: memoryview) -> None:
        while data:
            data = data[os.write(fd, data) :]

    try:
        fd = sys.stdout.fileno() if out == "-" else os.open(out, os.O_WRONLY)
        holes = copy_stream(
            part.node, part.start, part.length, write, skip_damaged=part.skip_damaged, progress=bar.advance
        )
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
