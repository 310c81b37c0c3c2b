"""Images made step by step by qemu-img and qemu-io, with a copy of what each snapshot held when it was taken."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import crcmod.predefined

from tests.support import table
from tests.support.files import copy_with_holes
from tests.support.tools import ToolFailed, qemu_img, qemu_io
from tests.support.vm import savevm

PIECE = 1 << 20
LINE = 16  # bytes; each line of what `write` stores by default differs from all others of the image

crc32c: Callable[..., int] = crcmod.predefined.mkCrcFun("crc-32c")


@dataclass(frozen=True)
class Reference:
    """What a disk holds, as qemu-img converted it to a raw file at that moment, and the VM state as qemu-io read it.

    qcow2snap has no part in either.
    """

    raw: Path
    id: str = ""
    name: bytes = b""
    vm_state: bytes = b""

    @cached_property
    def size(self) -> int:
        return self.raw.stat().st_size

    @cached_property
    def sha256(self) -> str:
        with self.raw.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def crc32c(self) -> str:
        crc = crc32c(b"")
        with self.raw.open("rb") as file:
            while piece := file.read(PIECE):
                crc = crc32c(piece, crc)
        return f"{crc:08x}"

    def read(self) -> bytes:
        return self.raw.read_bytes()

    def cut(self, size: int) -> Reference:
        """The first `size` bytes of it."""
        with self.raw.open("r+b") as file:
            file.truncate(size)
        return replace(self)


class Image:
    """A qcow2 image under construction. Every step returns the image, so that steps form a sentence.

    Writes wait until something else needs the file, and then run in one qemu-io process.
    """

    def __init__(self, path: Path) -> None:
        self.file = path
        self.references: list[Reference] = []  # in the order of the snapshot table
        self.tolerant = False  # qemu-io's failures are no errors: it does not compress what already has space
        self._active: Reference | None = None
        self._commands: list[str] = []
        self._lines = 0
        self.taken = 0  # snapshots so far, deleted ones too
        self._beside = path.with_name(f".{path.name}")  # a directory for references and sources of writes

    @classmethod
    def create(
        cls,
        path: Path,
        size: str | int,
        *,
        backing: Image | Path | str | None = None,
        backing_fmt: str | None = None,
        **options: object,
    ) -> Self:
        """`qemu-img create`; the options are those of its `-o`."""
        arguments = ["-o", ",".join(f"{key}={_option(value)}" for key, value in options.items())] if options else []
        if isinstance(backing, Image):
            backing, backing_fmt = backing.path, backing_fmt or "qcow2"
        if isinstance(backing, Path):  # stored relative, as users do who keep a chain in one directory
            backing = os.path.relpath(backing, path.parent)
        if backing is not None:
            # -u: QEMU would refuse to store a name without a format, or one that it cannot open.
            arguments += ["-u", "-b", backing, *(["-F", backing_fmt] if backing_fmt else [])]
        qemu_img("create", "-q", "-f", "qcow2", *arguments, path, str(size))
        return cls(path)

    @property
    def path(self) -> Path:
        """The file, with everything written to it."""
        self._flush()
        return self.file

    # Steps on the active disk

    def write(self, offset: int, length: int, pattern: int | None = None, *, compressed: bool = False) -> Self:
        """Bytes of one value, or, without a pattern, numbered lines none of which occurs twice."""
        flags = "-c " if compressed else ""
        if pattern is not None:
            return self.io(f"write {flags}-P {pattern:#x} {offset} {length}")
        self._beside.mkdir(exist_ok=True)
        source = self._beside / f"write-{len(self._commands)}"
        lines = range(self._lines, self._lines + -(-length // LINE))
        source.write_bytes(b"".join(b"%0*x\n" % (LINE - 1, number) for number in lines)[:length])
        self._lines = lines.stop
        return self.io(f"write {flags}-s {source} {offset} {length}")

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> Self:
        return self.io(f"write {'-zu' if unmap else '-z'} {offset} {length}")

    def discard(self, offset: int, length: int) -> Self:
        return self.io(f"discard {offset} {length}")

    def io(self, *commands: str) -> Self:
        """Any qemu-io commands."""
        self._commands += commands
        return self

    def resize(self, size: str | int) -> Self:
        qemu_img("resize", "-q", "--shrink", "-f", "qcow2", self.path, str(size))
        return self

    # Steps on snapshots

    def snapshot(self, name: str | bytes) -> Self:
        """A snapshot by qemu-img."""
        with self._kept(name):
            qemu_img("snapshot", "-c", name, self.path)
        return self

    def savevm(self, name: str, *, memory: dict[int, int] | None = None, machine: str = "microvm") -> Self:
        """A snapshot with the state of a virtual machine that never ran; `memory` plants 64-bit words in its RAM."""
        with self._kept(name):
            savevm(self.path, name, memory=memory or {}, machine=machine)
        return self

    def delete(self, name: str) -> Self:
        """Delete the first snapshot of that name."""
        qemu_img("snapshot", "-d", name, self.path)
        left = {entry.id for entry in table.read_table(self.file)}
        self.references = [reference for reference in self.references if reference.id.encode() in left]
        return self

    def revert(self, ref: str) -> Self:
        """Make the active disk what the snapshot is: its content and its size."""
        qemu_img("snapshot", "-a", ref, self.path)
        return self

    def attempt(self, step: Callable[[Image], object]) -> bool:
        """A step that QEMU may refuse, and which then has changed nothing."""
        trial = Image(self.copy(f"{self.file.name}.attempt"))
        try:
            step(trial)
        except ToolFailed:
            trial.file.unlink()
            return False
        trial.path.replace(self.file)
        return True

    def patch(self, offset: int, data: bytes) -> Self:
        """Change bytes of the file behind QEMU's back."""
        table.patch(self.path, offset, data)
        return self

    # What there is

    @property
    def active(self) -> Reference:
        """What the active disk holds now."""
        return self._active or Reference(self.convert("active"))

    def keep_active(self, reference: Reference) -> Self:
        """Let `active` be this from now on: what is done next, QEMU's tools would not read in full."""
        self._active = reference
        return self

    def reference(self, name: str | bytes) -> Reference:
        """What the snapshot of that name held when it was taken."""
        (found,) = (reference for reference in self.references if reference.name == _bytes(name))
        return found

    def vm_state(self, name: str | bytes) -> bytes:
        """The VM state of the snapshot of that name."""
        return self.reference(name).vm_state

    @property
    def version(self) -> int:
        """Of the format: 2 or 3."""
        return table.field(self.path, 4, 4)

    @property
    def entries(self) -> list[table.Entry]:
        """The snapshot table, read by a reader of ours that is not the one under test."""
        return table.read_table(self.path)

    def convert(self, label: str) -> Path:
        """The active disk as a raw file, by qemu-img."""
        self._beside.mkdir(exist_ok=True)
        raw = self._beside / f"{label}.raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", self.path, raw)
        return raw

    def copy(self, name: str) -> Path:
        """A copy of the file, in the same directory."""
        return copy_with_holes(self.path, self.file.with_name(name))

    @contextmanager
    def _kept(self, name: str | bytes) -> Iterator[None]:
        """Around the making of a snapshot: converts the disk before, and learns the new snapshot's id after."""
        self.taken += 1
        raw = self.convert(f"snapshot-{self.taken}")
        yield
        entry = self.entries[-1]
        self.references.append(Reference(raw, entry.id.decode(), _bytes(name), self._vm_state(entry)))

    def _vm_state(self, entry: table.Entry) -> bytes:
        """The VM state of a snapshot, by way of a copy that is reverted to it."""
        if not entry.full_vm_state_size:
            return b""
        copy = self.copy(f"{self.file.name}.vm-state")
        qemu_img("snapshot", "-a", entry.id, copy)
        dump = qemu_io(copy, f"read -b -v 0 {-(-entry.full_vm_state_size // 512) * 512}", options=("-r",)).stdout
        copy.unlink()
        rows = (line[11:58] for line in dump.splitlines() if line[8:11] == ":  ")
        return bytes.fromhex(" ".join(rows))[: entry.full_vm_state_size]

    def _flush(self) -> None:
        if self._commands:
            commands, self._commands = self._commands, []
            qemu_io(self.file, *commands, options=("-f", "qcow2"), check=not self.tolerant)


def _option(value: object) -> str:
    """A value of `-o`, as qemu-img spells it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _bytes(name: str | bytes) -> bytes:
    return name.encode() if isinstance(name, str) else name
