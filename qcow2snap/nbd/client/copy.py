"""Copying an export into a file: what is zeros stays a hole, and several reads are in flight."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

from formats.nbd import Command, State
from qcow2snap.nbd.client.connection import ALLOCATION, Client
from qcow2snap.nbd.client.transmission import Request, Runs

PIECE = 1 << 20  # bytes of one read
DEPTH = 8  # reads in flight
_ZEROS = bytes(PIECE)


def copy(client: Client, out: BinaryIO, *, sparse: bool) -> None:
    """Copy the chosen export to an empty file, which can be sought if it is to be `sparse`: zeros are holes then."""
    if sparse:
        out.truncate(client.size)
        for reads in _reads(client):
            for reply in client.submit(reads, DEPTH):
                out.seek(reply.request.offset)
                out.write(reply.checked().data)
    else:
        end = 0
        for reads in _reads(client):
            while some := list(islice(reads, DEPTH)):
                for reply in sorted(client.submit(some), key=lambda reply: reply.request.offset):
                    _write_zeroes(out, reply.request.offset - end)
                    out.write(reply.checked().data)
                    end = reply.request.offset + reply.request.length
        _write_zeroes(out, client.size - end)
    out.flush()


def _reads(client: Client) -> Iterator[Iterator[Request]]:
    """Reads of all that is not zeros, for each stretch of the export that one block status tells of."""
    piece = min(PIECE, client.max_payload)
    offset = 0
    while offset < client.size:
        runs: Runs = [(client.size - offset, 0)]
        if ALLOCATION in client.contexts:
            runs = client.block_status(offset, client.size - offset)
        yield _reads_of(runs, offset, client.size, piece)
        offset += sum(length for length, _ in runs)


def _reads_of(runs: Runs, offset: int, size: int, piece: int) -> Iterator[Request]:
    for length, flags in runs:
        end = min(offset + length, size)
        if not flags & State.ZERO:
            for start in range(offset, end, piece):
                yield Request(Command.READ, start, min(piece, end - start))
        offset = end


def _write_zeroes(out: BinaryIO, length: int) -> None:
    for start in range(0, length, PIECE):
        out.write(memoryview(_ZEROS)[: length - start])
