"""Guests that write without a pause while snapshots are taken and read, and what a snapshot may then be."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcow2snap.nbd.client import Client
from tests.support import require

PIECE, PIECES = 10_000, 100


def start_fio(uri: str, directory: Path) -> subprocess.Popen[bytes]:
    """fio, which writes all over 8 MiB of an export, and at last verifies that it reads what it wrote."""
    job = ["--name=t", "--ioengine=nbd", f"--uri={uri}", "--size=8m", "--rw=randwrite", "--iodepth=16"]
    job += ["--bsrange=512-64k", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--fsync=50", "--randseed=7"]
    return subprocess.Popen([require("fio"), *job], cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextmanager
def sweeping(guest: Client) -> Iterator[None]:
    """Have the guest write the first MiB in pieces, from end to end, each time with another byte."""
    stop = threading.Event()

    def write() -> None:
        generation = 0
        while not stop.is_set():
            generation += 1
            for number in range(PIECES):
                guest.pwrite(number * PIECE, bytes([generation % 256]) * PIECE)

    guest.pwrite(0, bytes(PIECES * PIECE))
    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join(30)


def assert_one_moment(seen: bytes) -> None:
    """A disk that is swept is of one generation up to some piece, and of the generation before from there on."""
    runs = [seen[start : start + PIECE] for start in range(0, PIECES * PIECE, PIECE)]
    assert all(run == run[:1] * PIECE for run in runs)
    generations = [run[0] for run in runs]
    changes = [n for n in range(1, PIECES) if generations[n] != generations[n - 1]]
    assert len(changes) <= 1
    assert all((generations[n - 1] - generations[n]) % 256 == 1 for n in changes)
