"""What all tests share: QEMU's tools, images made with them, and the shipped fixtures. Imports nothing of qcow2snap."""

from tests.support.fixtures import FixtureImage, Library
from tests.support.images import Image, Reference
from tests.support.table import Entry, read_table
from tests.support.tools import Result, qemu_img, qemu_info, qemu_io, qemu_map, require, run

__all__ = [
    "Entry",
    "FixtureImage",
    "Image",
    "Library",
    "Reference",
    "Result",
    "qemu_img",
    "qemu_info",
    "qemu_io",
    "qemu_map",
    "read_table",
    "require",
    "run",
]
