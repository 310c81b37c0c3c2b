"""A new image under its name: the files that it needs, and what it may not be made over. What is in it is create's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from qcow2snap.block.file import FileNode
from qcow2snap.block.graph import OpenOptions, open_image, open_raw
from qcow2snap.block.node import FileError, ImageInUse
from qcow2snap.block.output import OutputFile, in_one_go
from qcow2snap.block.qcow2.creating.create_options import CreateOptions, InvalidOption, made
from qcow2snap.block.writable_file import WritableFileNode


def create_image(
    filename: str, size: int | None, options: Mapping[str, str], *, force: bool = False, unsafe_backing: bool = False
) -> CreateOptions:
    """Make an empty image, as `qemu-img create -f qcow2 -o options` does, and return what was made.

    size            bytes of the disk; None: the backing file's
    options         of `-o`, under QEMU's names
    force           replace a file that is there, and an external data file
    unsafe_backing  do not look at the backing file
    Raises InvalidOption, FileError, ImageInUse, and what opening the backing file raises. Nothing is left then.
    """
    from qcow2snap.block.qcow2.creating.create import create  # and with it numpy

    backing = options.get("backing_file")
    if backing is not None and not unsafe_backing:
        found = _backing_size(filename, backing, options.get("backing_fmt"))
        size = found if size is None else size
    if size is None:
        raise InvalidOption(f"{filename}: the size is missing: only a backing file that is looked at can give it")
    chosen = made(size, options)
    with ExitStack() as stack:
        output = stack.enter_context(image_output(filename, chosen, force=force))  # appears last
        data_fd = None
        if chosen.data_file is not None:
            data_fd = stack.enter_context(data_output(filename, chosen.data_file, force=force)).fd
        try:
            create(output.fd, chosen, data_fd, in_place=not output.reads_as_zeros)
        except OSError as error:
            raise FileError(f"{filename}: {error.strerror}; nothing was left there") from None
        with in_one_go:
            stack.close()
    return chosen


def image_output(filename: str, options: CreateOptions, *, force: bool, inputs: Sequence[FileNode] = ()) -> OutputFile:
    """Where the image goes. One that somebody has open is not replaced."""
    output = OutputFile(filename, 0, force=force, inputs=inputs)
    if not output.reads_as_zeros and options.is_preallocated and options.data_file is None:
        raise InvalidOption(f"{filename}: a block device is not preallocated; leave preallocation off")
    if force and os.path.isfile(filename):
        try:
            WritableFileNode(filename).close()
        except ImageInUse:
            raise
        except FileError:
            pass  # what cannot be read or written may still be replaced
    return output


def data_output(filename: str, data_file: str, *, force: bool, inputs: Sequence[FileNode] = ()) -> OutputFile:
    """Where the external data file of an image goes."""
    if data_file.startswith("json:") or "://" in data_file:
        raise InvalidOption(f"data_file={data_file}: only a local file can be made")
    directory = os.path.realpath(os.path.dirname(os.path.abspath(filename)))
    if not os.path.isabs(data_file) and directory != os.path.realpath(os.curdir):
        raise InvalidOption(
            f"data_file={data_file}: QEMU looks for a relative name in the directory that it runs in, others beside "
            f"the image; give the whole path, or run this in {directory}"
        )
    if os.path.realpath(data_file) == os.path.realpath(filename):
        raise InvalidOption(f"data_file={data_file}: is the image itself")
    return OutputFile(data_file, 0, force=force, inputs=inputs)


def _backing_size(filename: str, backing: str, image_format: str | None) -> int:
    """Bytes of the disk that the new image is to be over. It has to be there, in the format that is stated."""
    if not backing:
        raise InvalidOption("the name of the backing file is empty")
    if backing.startswith("json:") or "://" in backing or image_format not in ("raw", "qcow2", None):
        raise InvalidOption(
            f"backing file {backing!r} of format {image_format!r} cannot be looked at here; -u does not look, and "
            "needs a SIZE"
        )
    path = os.path.join(os.path.dirname(filename), backing.removeprefix("file:"))
    if os.path.realpath(path) == os.path.realpath(filename):
        raise InvalidOption(f"{filename}: the backing file would be the image itself")
    share = OpenOptions(force_share=True)
    if image_format is None:
        raise InvalidOption(f"the format of the backing file {backing!r} is missing: -F qcow2, or -F raw")
    node = open_raw(path, share) if image_format == "raw" else open_image(path, share, with_children=False)
    size = node.size
    node.close()
    return size
