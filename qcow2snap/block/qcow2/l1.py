"""Reading L1 tables: bytes of the file, whole or an error. What their entries mean is for those who ask for them."""

from __future__ import annotations

from typing import NamedTuple

from qcow2snap.block.file import FileNode
from qcow2snap.block.qcow2 import rules


class RawL1Table(NamedTuple):
    """The bytes of an L1 table, and where in the file they are."""

    host_offset: int
    data: bytes


def read_l1(file: FileNode, host_offset: int, nb_entries: int) -> RawL1Table:
    """An L1 table, whose place and size have been judged. Not in the file: ImageFormatError."""
    data = file.pread_available(host_offset, 8 * nb_entries)
    if len(data) < 8 * nb_entries:
        raise rules.L1_COMPLETE.broken(
            host_offset, f"the L1 table at {host_offset:#x} reaches beyond the end of the file"
        )
    return RawL1Table(host_offset, data)
