"""Hashing the active disk and snapshots in one pass, and manifests of it.

All states are walked side by side, window by window. Where several show the same clusters, which the L2 tables tell,
these are read and decompressed once and given to each one's hashes; zeros are not read at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from qcow2snap.block.node import FileError, Qcow2SnapError, SnapshotInfo
from qcow2snap.block.qcow2.view import View

WINDOW_SIZE = 4 << 20  # bytes of each state at a time
UNIT_SIZE = 1 << 16  # bytes that are shared or not; larger clusters are shared by their parts
_ZEROS = memoryview(bytes(WINDOW_SIZE))
CRC32C = "crc32c"
DEFAULT_ALGORITHMS = ("sha256", CRC32C)
MANIFEST_FORMAT = "qcow2snap-manifest"

Progress = Callable[[int], None]


class UnknownAlgorithm(Qcow2SnapError):
    """No such hash."""


class Hasher(Protocol):
    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class Crc32c:
    """CRC-32C (Castagnoli) with hashlib's methods, by crcmod."""

    def __init__(self) -> None:
        import crcmod.predefined

        self._crc = crcmod.predefined.PredefinedCrc("crc-32c")

    def update(self, data: memoryview, /) -> None:
        self._crc.update(data)

    def hexdigest(self) -> str:
        return str(self._crc.hexdigest().lower())


class Subject(NamedTuple):
    """A state to hash, and what a manifest says of it besides the digests."""

    view: View
    entry: dict[str, Any]
    snapshot: SnapshotInfo | None = None  # None: the active disk


def new_hasher(algorithm: str) -> Hasher:
    """A hash by hashlib's name, or crc32c. Raises UnknownAlgorithm."""
    if algorithm.lower().replace("-", "") == CRC32C:
        return Crc32c()
    try:
        hasher = hashlib.new(algorithm)
        hasher.hexdigest()
    except (ValueError, TypeError):  # TypeError: shake_128 and such, whose digests have no length of their own
        known = ", ".join(sorted([CRC32C, "md5", "sha1", "sha256", "sha512", "sha3_256", "blake2b"]))
        raise UnknownAlgorithm(f"no hash {algorithm!r}; there are {known}, and what Python's hashlib has") from None
    return hasher


def digests(
    subjects: Sequence[Subject], algorithms: Sequence[str], progress: Progress = lambda _count: None
) -> list[dict[str, str]]:
    """For each subject, all of one image, its digests by algorithm. Raises what reading raises."""
    hashers = [{algorithm: new_hasher(algorithm) for algorithm in algorithms} for _ in subjects]
    end = max((subject.view.size for subject in subjects), default=0)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, end, WINDOW_SIZE):
            jobs = []
            for index, data in _read_window([subject.view for subject in subjects], start):
                jobs += [pool.submit(hasher.update, data) for hasher in hashers[index].values()]
                progress(len(data))
            for job in jobs:
                job.result()
    return [{name: hasher.hexdigest() for name, hasher in of_one.items()} for of_one in hashers]


Unit = tuple[tuple[int, int, int, int], ...]  # the mappings of UNIT_SIZE bytes: equal ones show equal bytes


def _read_window(views: Sequence[View], start: int) -> Iterator[tuple[int, memoryview]]:
    """The bytes that each view shows from `start` on, up to WINDOW_SIZE; what several show is read once."""
    units_read: dict[Unit, memoryview] = {}
    windows_read: dict[tuple[Unit, ...], memoryview] = {}
    for index, view in enumerate(views):
        length = min(WINDOW_SIZE, view.size - start)
        if length <= 0:
            continue
        units = tuple(_units(view, start, length))
        if units not in windows_read:
            windows_read[units] = _assemble(view, start, length, units, units_read)
        view.confirm()  # what another view has read is right for this one if this one's snapshot still stands
        yield index, windows_read[units]


def _units(view: View, start: int, length: int) -> Iterator[Unit]:
    """How a window is mapped, cut into units: offset, length, kind and host offset or L2 entry of each part."""
    unit: list[tuple[int, int, int, int]] = []
    unit_end = start + UNIT_SIZE
    for mapping in view.mappings(start, length):
        offset, host, end = mapping.offset, mapping.host, mapping.offset + mapping.length
        has_place = mapping.has_host
        while offset < end:
            count = min(end, unit_end) - offset
            unit.append((offset, count, mapping.kind, host))
            offset += count
            host += count if has_place else 0
            if offset == unit_end:
                yield tuple(unit)
                unit, unit_end = [], unit_end + UNIT_SIZE
    if unit:
        yield tuple(unit)


def _assemble(
    view: View, start: int, length: int, units: tuple[Unit, ...], units_read: dict[Unit, memoryview]
) -> memoryview:
    """A window from its units, of which only those are read that no other view has had."""
    if not any(extent.must_read for extent in view.block_status(start, length, want_zero=False)):
        return _ZEROS[:length]
    buffer = memoryview(bytearray(length))
    missing: list[tuple[int, int]] = []  # neighbours are read in one
    for position, unit in zip(range(0, length, UNIT_SIZE), units, strict=True):
        end = min(position + UNIT_SIZE, length)
        if unit in units_read:
            buffer[position:end] = units_read[unit]
            continue
        units_read[unit] = buffer[position:end]
        if missing and missing[-1][1] == position:
            missing[-1] = (missing[-1][0], end)
        else:
            missing.append((position, end))
    for first, end in missing:
        view.preadv(start + first, [buffer[first:end]])
    return buffer


def manifest(image: str, algorithms: Sequence[str], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `digest` writes and `--verify` reads."""
    return {
        "format": MANIFEST_FORMAT,
        "version": 1,
        "image": os.path.basename(image),
        "algorithms": list(algorithms),
        "entries": list(entries),
    }


def read_manifest(filename: str) -> dict[str, Any]:
    """A manifest from a file. Not one: FileError."""
    try:
        with open(filename, encoding="utf-8") as file:
            content: dict[str, Any] = json.load(file)
    except OSError as error:
        raise FileError(f"{filename}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{filename}: is no manifest: {error}") from None
    entries = content.get("entries") if isinstance(content, dict) else None
    if not isinstance(entries, list) or content.get("format") != MANIFEST_FORMAT or content.get("version") != 1:
        raise FileError(f'{filename}: is no manifest of "qcow2snap digest"')
    for entry in entries:
        is_entry = isinstance(entry, dict) and isinstance(entry.get("size"), int)
        if not is_entry or not isinstance(entry.get("digests"), dict) or not entry["digests"]:
            raise FileError(f"{filename}: an entry has no size or no digests")
    return content
