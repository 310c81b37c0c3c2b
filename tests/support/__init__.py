"""What all tests share: QEMU's tools, images made with them, and the shipped fixtures. Imports nothing of qcow2snap."""

from tests.support.files import copy_with_holes
from tests.support.fixtures import Content, DamagedImage, FixtureImage, FixtureSnapshot, Library
from tests.support.images import Image, Reference, crc32c
from tests.support.table import Entry, read_table
from tests.support.tools import Result, ToolFailed, qemu_img, qemu_info, qemu_io, qemu_map, require, run

__all__ = [
    "Content",
    "DamagedImage",
    "Entry",
    "FixtureImage",
    "FixtureSnapshot",
    "Image",
    "Library",
    "Reference",
    "Result",
    "ToolFailed",
    "copy_with_holes",
    "crc32c",
    "qemu_img",
    "qemu_info",
    "qemu_io",
    "qemu_map",
    "read_table",
    "require",
    "run",
]
