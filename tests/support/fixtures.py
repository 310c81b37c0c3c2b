"""The images of fixtures/, unpacked to a directory where tests may read them, and what the manifest says of them.

Big images are packed with gzip: they are mostly zeros, and a checkout has no holes. Unpacking puts the holes back.
Damaged images are stored as the bytes in which they differ from a sound one.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.files import copy_with_holes
from tests.support.table import patch
from tests.support.tools import REPOSITORY

FIXTURES = REPOSITORY / "fixtures"
HOLE = 4096  # bytes of zeros from which on a hole is made


@dataclass(frozen=True)
class Content:
    """What a disk holds: the active one, or a snapshot's."""

    size: int
    crc32c: str
    sha256: str


@dataclass(frozen=True)
class FixtureSnapshot:
    """A snapshot as the manifest knows it. Id and name are bytes: not each is text."""

    id: bytes
    name: bytes
    content: Content
    vm_state_size: int = 0
    vm_state_sha256: str | None = None


@dataclass(frozen=True)
class FixtureImage:
    """One image of the manifest. `others` are the files it refers to."""

    name: str
    file: str
    about: str
    active: Content
    snapshots: list[FixtureSnapshot] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    passphrase: str | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class DamagedImage:
    """A sound image of which some bytes were changed. `intact` lists what still has to read as it did there."""

    name: str
    about: str
    of: str
    changes: list[dict[str, Any]]  # offset, was, now (the last two in hexadecimal)
    truncate: int | None = None
    intact: list[str] = field(default_factory=list)  # "active", "id=1", ...

    def __str__(self) -> str:
        return self.name


class Library:
    """The manifest, read once. `directory` is where the images are unpacked when first asked for."""

    def __init__(self, directory: Path, fixtures: Path = FIXTURES) -> None:
        self.directory = directory
        self.source = fixtures / "images"
        manifest = json.loads((fixtures / "manifest.json").read_text())
        self.images = {image["name"]: _image(image) for image in manifest["images"]}
        self.damaged = {image["name"]: DamagedImage(**image) for image in manifest["damaged"]}

    def path(self, name: str) -> Path:
        """An image and all it refers to, in one directory; do not write there. Damaged ones by their names too."""
        if name in self.damaged:
            return self._damage(self.damaged[name])
        image = self.images[name]
        for file in [image.file, *image.others]:
            self._unpack(file)
        return self.directory / image.file

    def _unpack(self, file: str) -> None:
        target = self.directory / file
        if target.exists():
            return
        plain, packed = self.source / file, self.source / f"{file}.gz"
        with plain.open("rb") if plain.exists() else gzip.open(packed, "rb") as source, target.open("wb") as out:
            while piece := source.read(HOLE):
                if piece.count(0) == len(piece):
                    out.seek(len(piece), 1)
                else:
                    out.write(piece)
            out.truncate()

    def _damage(self, damaged: DamagedImage) -> Path:
        sound = self.path(damaged.of)
        target = sound.with_name(f"{damaged.name}{sound.suffix}")
        if not target.exists():
            copy_with_holes(sound, target)
            for change in damaged.changes:
                patch(target, change["offset"], bytes.fromhex(change["now"]))
            if damaged.truncate is not None:
                with target.open("r+b") as file:
                    file.truncate(damaged.truncate)
        return target


def _image(entry: dict[str, Any]) -> FixtureImage:
    snapshots = [
        FixtureSnapshot(
            _text(snapshot, "id"),
            _text(snapshot, "name"),
            _content(snapshot),
            snapshot["vm-state-size"],
            snapshot.get("vm-state-sha256"),
        )
        for snapshot in entry["snapshots"]
    ]
    return FixtureImage(
        entry["name"],
        entry["file"],
        entry["about"],
        _content(entry["active"]),
        snapshots,
        entry.get("others", []),
        entry.get("passphrase"),
    )


def _text(entry: dict[str, Any], key: str) -> bytes:
    hexadecimal = entry.get(f"{key}-hex")
    return entry[key].encode() if hexadecimal is None else bytes.fromhex(hexadecimal)


def _content(entry: dict[str, Any]) -> Content:
    return Content(entry["size"], entry["crc32c"], entry["sha256"])
