"""`python -m qcow2snap.nbd.client URI OUT`: copy an export to a sparse file, or to standard output if OUT is `-`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qcow2snap.block.node import NBDError
from qcow2snap.nbd import uri as nbd_uri
from qcow2snap.nbd.client.connection import Client
from qcow2snap.nbd.client.copy import copy


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m qcow2snap.nbd.client URI OUT", file=sys.stderr)
        return 2
    source, target = arguments
    try:
        with Client.connect(source) as client:
            client.go(nbd_uri.parse(source).export)
            if target == "-":
                copy(client, sys.stdout.buffer, sparse=False)
            else:
                with open(target, "wb") as out:
                    copy(client, out, sparse=True)
    except (NBDError, OSError) as error:
        print(f"qcow2snap: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
