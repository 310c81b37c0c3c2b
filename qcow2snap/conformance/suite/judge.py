"""Judges what a reader gave against what is expected of a disk: its content and its map. Runs nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from qcow2snap.conformance.suite.values import Disk, MapEntry

_COMPARED = ("depth", "present", "zero", "data", "compressed")


def judge_content(disk: Disk, output: Path) -> str | None:
    """What is wrong with a raw file as the content of a disk; None if nothing is."""
    assert disk.content is not None
    with output.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = disk.content.first_difference(file)
    if at is not None:
        return f"the content is wrong from byte {at:#x} on{_described(disk, at)}"
    if size != disk.size:
        return f"there are {size} bytes where the disk has {disk.size}"
    return None


def _described(disk: Disk, at: int) -> str:
    entry = next((entry for entry in disk.map or () if entry.start <= at < entry.end), None)
    if entry is None:
        return ""
    kind = "compressed" if entry.compressed else "zeros" if entry.zero else "data"
    kind = kind if entry.present else "unallocated"
    below = f" of backing file {entry.depth}" if entry.depth else ""
    return f", where it is {kind}{below}"


def judge_map(disk: Disk, text: str) -> str | None:
    """What is wrong with a map, as JSON with the fields of `qemu-img map`. Fields that are left out are not judged.

    Offsets are judged where there is data. Whether neighbours of one status are one entry or two is not.
    """
    assert disk.map is not None
    try:
        listed = [_entry(each) for each in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"the map is no JSON as of `qemu-img map`: {error}"
    position = 0
    for start, length, _ in listed:
        if start != position or length <= 0:
            return f"the map has an entry of {length} bytes at {start:#x}, where one at {position:#x} is due"
        position += length
    if position != disk.size:
        return f"the map ends at {position:#x}, the disk at {disk.size:#x}"
    for expected, fields in _overlaid(disk.map, listed):
        wrong = _difference(expected, fields)
        if wrong:
            return f"the map is wrong at {expected.start:#x}: {wrong}"
    return None


_Listed = tuple[int, int, dict[str, Any]]


def _entry(fields: dict[str, Any]) -> _Listed:
    start, length = int(fields["start"]), int(fields["length"])
    return start, length, {key: fields[key] for key in (*_COMPARED, "offset") if key in fields}


def _overlaid(expected: Sequence[MapEntry], listed: Sequence[_Listed]) -> Iterator[tuple[MapEntry, dict[str, Any]]]:
    """The runs of bytes that both maps describe by one entry each, and what the second has of them."""
    starts = {entry.start for entry in expected} | {start for start, _, _ in listed}
    borders = sorted(starts | {entry.end for entry in expected})
    ours, theirs = iter(expected), iter(listed)
    entry: MapEntry | None = None
    given: _Listed | None = None
    for start, _ in pairwise(borders):
        if entry is None or entry.end <= start:
            entry = next(ours)
        if given is None or given[0] + given[1] <= start:
            given = next(theirs)
        yield entry.within(start, entry.end), _moved(given, start)


def _moved(given: _Listed, start: int) -> dict[str, Any]:
    fields = dict(given[2])
    if isinstance(fields.get("offset"), int):
        fields["offset"] += start - given[0]
    return fields


def _difference(expected: MapEntry, fields: dict[str, Any]) -> str:
    compared = [*_COMPARED, *(["offset"] if expected.offset is not None else [])]
    return ", ".join(
        f'"{key}" is {json.dumps(fields[key])}, not {json.dumps(getattr(expected, key))}'
        for key in compared
        if key in fields and fields[key] != getattr(expected, key)
    )
