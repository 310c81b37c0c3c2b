"""`qcow2snap extract`: the active disk, a snapshot or a VM state as a raw file, whole or in part."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from qcow2snap.block.node import BlockNode, FileError, ImageFormatError, OutOfRange
from qcow2snap.cli import options
from qcow2snap.cli.progress import ProgressBar
from qcow2snap.forensics.copy import copy_sparse, copy_stream
from qcow2snap.forensics.output import OutputFile
from qcow2snap.forensics.salvage import Hole


class Range(click.ParamType[tuple[int, int | None]]):
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
@options.sharing_options
def command(
    image: str,
    out: str,
    snapshot: str | None,
    vm_state: bool,
    wanted: tuple[int, int | None] | None,
    skip_damaged: bool,
    force: bool,
    force_share: bool,
    allow_paths: tuple[str, ...],
) -> None:
    """Copy a disk, a snapshot or a VM state of IMAGE to the raw, sparse file OUT; - is standard output."""
    disk = options.open_for(image, force_share=force_share, allow_paths=allow_paths)
    node = options.choose(disk, snapshot, vm_state)
    start, length = wanted or (0, None)
    if start > node.size or (length is not None and start + length > node.size):
        raise OutOfRange(f"the range ends beyond the end, which is at {node.size}")
    length = node.size - start if length is None else length
    try:
        with _terminable(), ProgressBar(f"extract {os.path.basename(image)}", length) as bar:
            if out == "-" or _is_stream(out):
                holes = _to_stream(node, start, length, out, skip_damaged, bar)
            else:
                holes = _to_file(node, start, length, out, skip_damaged, force, bar)
    except ImageFormatError as error:
        error.message += "; --skip-damaged extracts what can be read"
        raise
    if skip_damaged:
        _tell(holes, out)
    disk.close()


def _to_file(
    node: BlockNode, start: int, length: int, out: str, skip_damaged: bool, force: bool, bar: ProgressBar
) -> list[Hole]:
    with OutputFile(out, length, force=force) as output:
        try:
            return copy_sparse(
                node,
                start,
                length,
                output.fd,
                skip_damaged=skip_damaged,
                write_zeros=not output.reads_as_zeros,
                progress=bar.advance,
            )
        except OSError as error:
            raise FileError(f"{out}: {error.strerror}; nothing was left there") from None


def _to_stream(node: BlockNode, start: int, length: int, out: str, skip_damaged: bool, bar: ProgressBar) -> list[Hole]:
    if out == "-" and sys.stdout.isatty():
        raise FileError("standard output is a terminal; redirect it, or name a file")
    fd = sys.stdout.fileno() if out == "-" else os.open(out, os.O_WRONLY)

    def write(data: memoryview) -> None:
        while data:
            data = data[os.write(fd, data) :]

    return copy_stream(node, start, length, write, skip_damaged=skip_damaged, progress=bar.advance)


def _is_stream(out: str) -> bool:
    """A pipe or character device that exists: it is written, not replaced."""
    try:
        mode = os.stat(out).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _tell(holes: list[Hole], out: str) -> None:
    """The list of holes beside the output; where that is a pipe, on stderr."""
    if out != "-" and not _is_stream(out):
        with open(f"{out}.holes.json", "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump([hole._asdict() for hole in holes], file, indent=4)
            file.write("\n")
    else:
        for hole in holes:
            print(f"qcow2snap: hole: {hole.length} bytes at {hole.offset}: {hole.message}", file=sys.stderr)
    if holes:
        missing = sum(hole.length for hole in holes)
        print(f"qcow2snap: {missing} bytes in {len(holes)} holes could not be read", file=sys.stderr)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as an exception, so that what is half written is taken away."""

    def leave(signum: int, _frame: object) -> None:
        sys.exit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
