"""The comparisons themselves: each takes an image and fails where qcow2snap and QEMU do not say the same."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import qcow2snap
from qcow2snap.block.node import Change, ChangedExtent, Status
from qcow2snap.block.snapshot_access import SnapshotAccessNode
from qcow2snap.forensics.diff import verified
from tests.cli.support import here
from tests.support import Content, Image, Reference, copy_with_holes, qemu_img, qemu_info, qemu_map, read_table

QEMU_NAME_LIMIT = 255  # bytes; qemu-img cuts longer names and ids
SECTOR = 512
PIECE = 1 << 20


def lists_agree(path: Path) -> None:
    """`list --json` is `snapshots` of `qemu-img info`, with the disk size of the table added."""
    ours = here("list", "--json", path).json()
    theirs = qemu_info(path).get("snapshots", [])
    table = read_table(path)
    assert len(ours) == len(theirs) == len(table)
    for our, their, entry in zip(ours, theirs, table, strict=True):
        size = entry.disk_size
        assert our.pop("disk-size") == (qemu_info(path)["virtual-size"] if size is None else size)
        for key, stored in (("id", entry.id), ("name", entry.name)):
            if len(stored) > QEMU_NAME_LIMIT or not _is_text(stored):  # QEMU shows these mutilated
                their[key] = our[key]
        assert our == their


def maps_agree(path: Path, ref: str | None = None, *, judged_by: Path | None = None) -> None:
    """`map --json` is that of qemu-img: of the active disk, or of a snapshot by way of a copy reverted to it."""
    ours = here("map", "--json", *(["-s", ref] if ref else []), path).json()
    # QEMU drops the part of a sector at the end of a disk, and says of an empty disk that it is one empty entry.
    theirs = [entry for entry in qemu_map(judged_by or path) if entry["length"]]
    if ours:
        ours[-1]["length"] -= (ours[-1]["start"] + ours[-1]["length"]) % SECTOR
    assert ours == theirs


def snapshot_maps_agree(path: Path) -> list[str]:
    """The same for every snapshot that qemu-img can revert to; returns the ids of those it cannot."""
    left_out = []
    for entry in read_table(path):
        with reverted(path, entry.id) as copy:
            if copy is None:
                left_out.append(entry.id.decode(errors="surrogateescape"))
            else:
                maps_agree(path, f"id={entry.id.decode(errors='surrogateescape')}", judged_by=copy)
    return left_out


@contextlib.contextmanager
def reverted(path: Path, id_: bytes) -> Iterator[Path | None]:
    """A copy, in the same directory, that qemu-img has reverted to a snapshot. None if it cannot."""
    copy = copy_with_holes(path, path.with_name(f"{path.name}.reverted"))
    try:
        done = qemu_img("snapshot", "-a", id_, copy, check=False)
        yield copy if done.returncode == 0 else None
    finally:
        copy.unlink()


def disk_holds(disk: qcow2snap.Disk, expected: Content | Reference) -> None:
    """A disk has the size that was recorded, and every byte of the content."""
    assert disk.size == expected.size
    with disk.open() as file:
        if digest(file) != expected.sha256:
            _show_difference(disk, expected)


def image_holds(image: Image) -> None:
    """Active disk, snapshots and their VM states hold what QEMU's tools recorded while the image was made."""
    path, active = image.path, image.active
    with qcow2snap.open(path) as opened:
        disk_holds(opened.active, active)
        extents_are_true(opened.active)
        assert [snapshot.id for snapshot in opened.snapshots] == [reference.id for reference in image.references]
        for snapshot, reference in zip(opened.snapshots, image.references, strict=True):
            disk_holds(snapshot, reference)
            extents_are_true(snapshot)
            if snapshot.vm_state_size:
                with snapshot.open_vm_state() as state:
                    assert state.read() == reference.vm_state
    digests_agree(path, [active, *image.references])
    disks = [(f"id={reference.id}", reference) for reference in image.references]
    extracts_agree(path, [(None, active), *disks], path.with_suffix(".raw"))


def digests_agree(path: Path, expected: Sequence[Content | Reference]) -> None:
    """`digest --json` of all: the active disk, then the snapshots in the order of the table."""
    entries = here("digest", "--json", path).json()["entries"]
    assert [(entry["size"], entry["digests"]) for entry in entries] == [
        (disk.size, {"sha256": disk.sha256, "crc32c": disk.crc32c}) for disk in expected
    ]


def extracts_agree(path: Path, disks: Sequence[tuple[str | None, Content | Reference]], raw: Path) -> None:
    """`extract` of each reference (None: the active disk) writes the content and its size."""
    for ref, expected in disks:
        result = here("extract", "--force", *([] if ref is None else ["-s", ref]), path, raw)
        assert result.returncode == 0, result.stderr
        written = Reference(raw)
        assert (written.size, written.sha256) == (expected.size, expected.sha256)


def extents_are_true(disk: qcow2snap.Disk) -> None:
    """Extents cover the disk without gap; zeros read as zeros; verbatim bytes are where they are said to be."""
    position = 0
    with disk.open() as file:
        for extent in disk.extents():
            assert extent.offset == position
            assert extent.length > 0
            position = extent.end
            content = _read_at(file, extent.offset, extent.length)
            if extent.status & Status.ZERO:
                assert content.count(0) == extent.length
            elif extent.file is not None:
                assert os.pread(extent.file.fileno(), extent.length, extent.file_offset) == content
    assert position == disk.size


def diffs_agree(path: Path, contents: Sequence[bytes] | None = None) -> None:
    """Between any two states, each byte that differs is in what `changes` tells, and only such when it is verified.

    contents  what the active disk and the snapshots hold; by default what is read of them
    """
    with qcow2snap.open(path) as opened:
        node, snapshots = opened.node, [None, *opened.node.snapshots()]
        nodes = [node if snapshot is None else SnapshotAccessNode(node, snapshot) for snapshot in snapshots]
        if contents is None:
            contents = [disk.pread(0, disk.size) for disk in nodes]
        for old, new in itertools.permutations(range(len(nodes)), 2):
            told = list(node.changes(snapshots[old], snapshots[new]))
            certain = list(verified(told, nodes[old], nodes[new], node.header.subcluster_size))
            for extents in (told, certain):
                _lead_from(extents, contents[old], contents[new])
            for start, stop in _units(certain, node.header.subcluster_size):
                assert contents[old][start:stop] != contents[new][start:stop]


def _lead_from(extents: Sequence[ChangedExtent], old: bytes, new: bytes) -> None:
    """The older state becomes the newer if it gets the extents, and they are what they are said to be."""
    both, largest = min(len(old), len(new)), max(len(old), len(new))
    rebuilt, position = bytearray(old[: len(new)]), 0
    for offset, length, change in extents:
        assert offset >= position
        assert length > 0
        position = offset + length
        rebuilt[offset:position] = new[offset:position]
        if change is Change.SIZE:
            assert (offset, position) == (both, largest)
        elif change is not Change.DATA:
            zeros = new if change is Change.BECAME_ZERO else old
            assert zeros.count(0, offset, position) == length
    assert rebuilt == new


def _units(extents: Sequence[ChangedExtent], unit: int) -> Iterator[tuple[int, int]]:
    """The units, or parts of units, that extents inside both states are made of."""
    for extent in extents:
        start = extent.offset
        while start < extent.end and extent.change is not Change.SIZE:
            stop = min(start + unit - start % unit, extent.end)
            yield start, stop
            start = stop


def digest(file: io.RawIOBase) -> str:
    """SHA-256 of all that a file gives, in reads of one size."""
    result = hashlib.sha256()
    while piece := file.read(PIECE):
        result.update(piece)
    return result.hexdigest()


def _show_difference(disk: qcow2snap.Disk, expected: Content | Reference) -> None:
    if isinstance(expected, Content):
        raise AssertionError(f"SHA-256 is not {expected.sha256}")
    with disk.open() as ours, expected.raw.open("rb") as theirs:
        for offset in itertools.count(0, SECTOR):
            our, their = _read_at(ours, offset, SECTOR), theirs.read(SECTOR)
            assert our == their, f"the content differs at byte {offset}"
            if not their:
                raise AssertionError("the content was not the same twice")


def _read_at(file: io.RawIOBase, offset: int, length: int) -> bytes:
    file.seek(offset)
    data = file.read(length)
    assert data is not None
    return data


def _is_text(stored: bytes) -> bool:
    try:
        stored.decode()
    except UnicodeDecodeError:
        return False
    return True
