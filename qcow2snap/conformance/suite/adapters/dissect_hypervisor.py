"""Reads a qcow2 image with dissect.hypervisor: python dissect_hypervisor.py IMAGE OUTPUT [SNAPSHOT-ID]."""

import sys
from pathlib import Path

PIECE = 1 << 20


def main() -> None:
    from dissect.hypervisor.disk.qcow2 import QCow2  # type: ignore[import-not-found]

    path, output, *snapshot_id = sys.argv[1:]
    image = QCow2(Path(path))
    if snapshot_id:
        found = [snapshot for snapshot in image.snapshots if snapshot.id == snapshot_id[0]]
        if len(found) != 1:
            sys.exit(f"{len(found)} snapshots have the id {snapshot_id[0]}")
        stream = found[0].open()
    else:
        stream = image.open()
    left = stream.size
    with open(output, "wb") as out:
        while left:
            piece = stream.read(min(PIECE, left))
            if not piece:
                sys.exit(f"read nothing with {left} bytes left")
            out.write(piece)
            left -= len(piece)


if __name__ == "__main__":
    main()
