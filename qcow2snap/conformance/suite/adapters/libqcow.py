"""Reads a qcow2 image with libqcow's Python binding (pyqcow): python libqcow.py IMAGE OUTPUT. It has no snapshots.

libqcow does not open backing files by itself: who uses it opens the file that the image names, and sets it as parent.
It cannot be given a raw file, so images over raw files are refused here.
"""

import os
import sys

PIECE = 1 << 20


def open_chain(path: str, depth: int = 0):  # type: ignore[no-untyped-def]  # pyqcow has no types
    import pyqcow  # type: ignore[import-not-found]

    if depth > 20:
        raise OSError("the backing chain is too long")
    image = pyqcow.file()
    image.open(path)
    name = image.get_backing_filename()
    if name:
        image.set_parent(open_chain(os.path.join(os.path.dirname(path), name), depth + 1))
    return image


def main() -> None:
    path, output = sys.argv[1:]
    image = open_chain(path)
    left = image.get_media_size()
    with open(output, "wb") as out:
        while left:
            piece = image.read_buffer(min(PIECE, left))
            if not piece:
                sys.exit(f"read nothing with {left} bytes left")
            out.write(piece)
            left -= len(piece)


if __name__ == "__main__":
    main()
