"""How numbers, times and tables are written for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

from qcow2snap.block.snapshot_ref import json_text as json_text


def size(nbytes: int) -> str:
    """As QEMU writes sizes: three digits and a binary unit."""
    value, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB", "TiB", "PiB"))
    unit = next(units)
    while value >= 1000:
        following = next(units, None)
        if following is None:
            break
        value, unit = value / 1024, following
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def date(seconds: int) -> str:
    """Local time."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def clock(nanoseconds: int) -> str:
    """Hours, minutes, seconds and milliseconds."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{rest // 1_000_000:03}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> list[str]:
    """Lines of aligned columns: those named in `left` to the left, others to the right."""
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in (headings, *rows):
        cells = [
            cell.ljust(width) if heading in left else cell.rjust(width)
            for heading, cell, width in zip(headings, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def json_array(objects: Iterable[str]) -> Iterator[str]:
    """A JSON array of objects that are JSON already, one on each line, as qemu-img writes its longer ones."""
    separator = "["
    for each in objects:
        yield f"{separator}{each}"
        separator = ",\n"
    yield "[]\n" if separator == "[" else "]\n"
