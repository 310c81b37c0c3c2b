"""Hashing the active disk and snapshots in one pass, and manifests of it.

All states are walked side by side, window by window. Where several show the same bytes (the same place of the same
file, or the same compressed clusters), these are read once and given to each one's hashes; zeros are not read at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from qcow2snap.block.node import BlockNode, FileError, Qcow2SnapError

WINDOW_SIZE = 4 << 20  # bytes of each state at a time
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
    """A state to hash: its node, and what a manifest says of it besides the digests."""

    node: BlockNode
    entry: dict[str, Any]


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
    """For each subject its digests by algorithm. Raises what reading raises."""
    hashers = [{algorithm: new_hasher(algorithm) for algorithm in algorithms} for _ in subjects]
    end = max((subject.node.size for subject in subjects), default=0)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, end, WINDOW_SIZE):
            groups = _same_windows(subjects, start)
            jobs = []
            for extents, members in groups.items():
                length = min(WINDOW_SIZE, subjects[members[0]].node.size - start)
                data = _read_window(subjects[members[0]].node, start, length, extents)
                for member in members:
                    jobs += [pool.submit(hasher.update, data) for hasher in hashers[member].values()]
                    progress(length)
            for job in jobs:
                job.result()
    return [{name: hasher.hexdigest() for name, hasher in of_one.items()} for of_one in hashers]


def _same_windows(subjects: Sequence[Subject], start: int) -> dict[tuple[Any, ...], list[int]]:
    """The subjects that reach into this window, grouped by what it shows them."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, subject in enumerate(subjects):
        length = min(WINDOW_SIZE, subject.node.size - start)
        if length > 0:
            groups.setdefault(tuple(_place(subject, start, length)), []).append(index)
    return groups


def _place(subject: Subject, start: int, length: int) -> list[tuple[Any, ...]]:
    """The extents of a window, each so that equal ones show equal bytes. Without a place of their own: by subject."""
    places: list[tuple[Any, ...]] = []
    for extent in subject.node.block_status(start, length):
        if not extent.must_read:
            places.append((extent.offset, extent.length, None, 0))
        elif extent.file is not None:
            places.append((extent.offset, extent.length, extent.file, extent.file_offset))
        else:
            places.append((extent.offset, extent.length, id(subject.node), 0))
    return places


def _read_window(node: BlockNode, start: int, length: int, extents: tuple[Any, ...]) -> memoryview:
    """The bytes of a window, of which only what is no zeros is read."""
    if all(place is None for _, _, place, _ in extents):
        return _ZEROS[:length]
    buffer = memoryview(bytearray(length))
    for offset, count, place, _ in extents:
        if place is not None:
            node.preadv(offset, [buffer[offset - start : offset - start + count]])
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
