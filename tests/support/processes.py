"""Other processes as /proc shows them. They may change, and end, while they are looked at."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(FileNotFoundError):  # the thread has ended meanwhile
                found += map(int, children.read_text().split())
    return found


def open_files(pid: int) -> list[str]:
    """What a process has open: paths, and for example socket:[1234]. Nothing if it has ended."""
    found = []
    with suppress(FileNotFoundError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(entry.path))
    return found
