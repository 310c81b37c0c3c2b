"""Copies of files that keep their holes, which are part of what `map` shows."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def copy_with_holes(source: Path, target: Path) -> Path:
    """Copy a file's data and leave its holes holes."""
    with source.open("rb") as old, target.open("wb") as new:
        size, position = os.fstat(old.fileno()).st_size, 0
        while position < size:
            try:
                start = os.lseek(old.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nothing but a hole up to the end
                    raise
                break
            position = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            new.seek(start)
            new.write(os.pread(old.fileno(), position - start, start))
        new.truncate(size)
    return target
