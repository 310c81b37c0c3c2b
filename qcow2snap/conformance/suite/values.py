"""What the kit's parts exchange: sections, cases, files, and what a reader is expected to find. Values only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from qcow2snap.conformance.suite.content import Content


class Section(StrEnum):
    """Parts of QEMU's docs/interop/qcow2.rst, in its order. After the comma: the field or table within a section."""

    HEADER = "Header"
    BACKING_FILE = "Header, backing_file_offset"
    CLUSTER_BITS = "Header, cluster_bits"
    SIZE = "Header, size"
    L1_SIZE = "Header, l1_size"
    INCOMPATIBLE = "Header, incompatible_features"
    DATA_FILE = "Header, External data file bit"
    COMPATIBLE = "Header, compatible_features"
    AUTOCLEAR = "Header, autoclear_features"
    ADDITIONAL = "Additional fields"
    PADDING = "Header padding"
    EXTENSIONS = "Header extensions"
    STRINGS = "String header extensions"
    FEATURE_NAMES = "Feature name table"
    BITMAPS_EXTENSION = "Bitmaps extension"
    ENCRYPTION_POINTER = "Full disk encryption header pointer"
    ENCRYPTION = "Data encryption"
    REFCOUNTS = "Host cluster management"
    MAPPING = "Cluster mapping"
    L1_ENTRY = "Cluster mapping, L1 table entry"
    STANDARD = "Cluster mapping, Standard Cluster Descriptor"
    COMPRESSED = "Cluster mapping, Compressed Clusters Descriptor"
    UNALLOCATED = "Cluster mapping, unallocated clusters"
    EXTENDED_L2 = "Extended L2 Entries"
    SNAPSHOTS = "Snapshots"
    SNAPSHOT_ENTRY = "Snapshots, Snapshot table entry"
    BITMAPS = "Bitmaps"
    BITMAP_DIRECTORY = "Bitmap directory"
    BITMAP_TABLE = "Bitmap table"


class MapEntry(NamedTuple):
    """A run of guest bytes of one status, with the fields of `qemu-img map`, and their meaning there."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool = False
    offset: int | None = None  # of data, in the file in which it lies verbatim; of zeros and holes nothing is said

    @property
    def end(self) -> int:
        return self.start + self.length

    def within(self, start: int, end: int) -> MapEntry:
        """The part of it between two guest offsets."""
        first = max(start, self.start)
        offset = None if self.offset is None else self.offset + first - self.start
        return self._replace(start=first, length=min(end, self.end) - first, offset=offset)

    def json(self) -> dict[str, object]:
        fields = self._asdict()
        if self.offset is None:
            del fields["offset"]
        return fields


class Ref(NamedTuple):
    """A snapshot, as the image's table names it."""

    id: bytes
    name: bytes
    by_name: bool  # the name says which snapshot is meant; not so where it is empty, another's too, or another's id

    def __str__(self) -> str:
        return (self.name if self.by_name else b"id=" + self.id).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Disk:
    """The active disk or a snapshot of a case, and what is right to say of it.

    content      None, as is the map: it has to be refused
    may_refuse   why refusing it is no fault either; None: it is one
    reason       why it has to be refused
    """

    snapshot: Ref | None
    size: int
    content: Content | None
    map: tuple[MapEntry, ...] | None
    may_refuse: str | None = None
    reason: str = ""

    @property
    def must_refuse(self) -> bool:
        return self.content is None

    def json(self) -> dict[str, object]:
        ref = self.snapshot
        fields: dict[str, object] = {
            "snapshot": None if ref is None else {"id": _text(ref.id), "name": _text(ref.name)},
            "expect": "refuse" if self.must_refuse else "open",
        }
        if self.content is None:
            return fields | {"reason": self.reason}
        fields |= {"size": self.size, "sha256": self.content.sha256}
        if self.may_refuse is not None:
            fields["may-refuse"] = self.may_refuse
        if self.map is not None:
            fields["map"] = [entry.json() for entry in self.map]
        return fields


class SparseFile:
    """A file as pieces; between them are zeros. What is put later is on top."""

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[tuple[int, bytes]] = []

    def put(self, offset: int, data: bytes) -> None:
        self._pieces.append((offset, data))
        self.size = max(self.size, offset + len(data))
        self.__dict__.pop("content", None)

    def truncate(self, size: int) -> None:
        self._pieces = [(offset, data[: size - offset]) for offset, data in self._pieces if offset < size]
        self.size = size
        self.__dict__.pop("content", None)

    def is_at(self, path: Path) -> bool:
        """Whether a file on disk is this one, byte by byte."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            return self.content.first_difference(file) is None

    @cached_property
    def content(self) -> Content:
        content = Content(self.size)
        for offset, data in self._pieces:
            content = content.put(offset, data)
        return content

    def write(self, path: Path, *, sparse: bool) -> None:
        """The file on disk. With holes only where asked: QEMU takes images with few blocks for preallocated ones."""
        with path.open("wb") as file:
            if sparse:
                file.truncate(self.size)
                for offset, data in self.content.pieces:
                    file.seek(offset)
                    file.write(data)
            else:
                file.writelines(self.content.chunks())


class Region(NamedTuple):
    """What lies where in the image: for people who look for the fault."""

    offset: int
    length: int
    what: str


@dataclass(frozen=True)
class Built:
    """A case's files, the image first, and what is expected of its disks: the active one first."""

    files: dict[str, SparseFile]
    disks: tuple[Disk, ...]
    layout: tuple[Region, ...]
    sparse: bool = False

    def write(self, directory: Path, image_name: str | None = None) -> Path:
        """All files into a directory; returns the image's path. Other files keep the names by which they are found."""
        image = directory / (image_name or next(iter(self.files)))
        for file, path in zip(self.files.values(), self.paths(image), strict=True):
            file.write(path, sparse=self.sparse)
        return image

    def paths(self, image: Path) -> list[Path]:
        """Where all files are, in their order, if the image is there."""
        return [image, *(image.with_name(name) for name in [*self.files][1:])]

    def digests(self) -> dict[str, str]:
        return {name: file.content.sha256 for name, file in self.files.items()}


@dataclass(frozen=True)
class Case:
    """One thing that a reader can get right or wrong.

    sections  those that it covers; what it is about is the first
    large     needs a disk or a file of some GiB; left out unless asked for
    """

    name: str
    about: str
    sections: tuple[Section, ...]
    make: Callable[[str], Built] = field(repr=False)
    large: bool = False

    def build(self) -> Built:
        """The same bytes each time."""
        return self.make(self.name)

    def json(self, built: Built) -> dict[str, Any]:
        """What it covers, the digests of its files, and what is expected of its disks."""
        return {
            "about": self.about,
            "sections": [*self.sections],
            "large": self.large,
            "files": built.digests(),
            "disks": [disk.json() for disk in built.disks],
        }


def merged(entries: Iterator[MapEntry]) -> tuple[MapEntry, ...]:
    """Neighbours of one status as one entry."""
    result: list[MapEntry] = []
    for entry in entries:
        last = result[-1] if result else None
        if last is not None and last[2:7] == entry[2:7] and _offset_behind(last) == entry.offset:
            result[-1] = last._replace(length=last.length + entry.length)
        else:
            result.append(entry)
    return tuple(result)


def _offset_behind(entry: MapEntry) -> int | None:
    return None if entry.offset is None else entry.offset + entry.length


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")
