"""Four writers and four readers at once, each a process with a connection of its own: not one byte is wrong.

In rounds of three seconds, which is how long there are clusters left to be copied. The suite has one round;
QCOW2SNAP_STRESS_SECONDS=60 has twenty.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

from tests.nbd.fleecing import MiB, copy
from tests.nbd.serving import Serving
from tests.nbd.test_interop import SYSTEM_PYTHON
from tests.support import require

ROUND = 3  # seconds
ROUNDS = -(-int(os.environ.get("QCOW2SNAP_STRESS_SECONDS", "3")) // ROUND)
SIZE = 64 * MiB
CLUSTERS = (1 << 16, 1 << 18)

# Reads at random places, also over the edges of clusters, until it is time; says how much it read.
READER = """
import random, sys, time, nbd
uri, path, seed, seconds = sys.argv[1:]
before, choose, until = open(path, "rb").read(), random.Random(int(seed)), time.monotonic() + int(seconds)
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(uri)
count = 0
zeros = []
def told(context, offset, entries, error):
    for length, flags in zip(entries[::2], entries[1::2]):
        if flags & 2:
            zeros.append((offset, length))
        offset += length
while time.monotonic() < until:
    offset = choose.randrange(len(before))
    length = choose.randrange(1, min(300_000, len(before) - offset) + 1)
    assert h.pread(length, offset) == before[offset : offset + length], (offset, length)
    count += length
    if choose.randrange(8) == 0:
        del zeros[:]
        h.block_status(length, offset, told)
        for start, run in zeros:
            assert not any(before[start : start + run]), (start, run)
print(count)
"""


def test_four_write_and_four_read(tmp_path: Path) -> None:
    disk, before, backup = (tmp_path / name for name in ("disk.raw", "before.raw", "backup.raw"))
    with disk.open("wb") as file:  # holes in it, which are zeros
        for start in range(0, SIZE, MiB):
            file.seek(start)
            file.write(random.Random(start).randbytes(700_000))
        file.truncate(SIZE)
    for number in range(ROUNDS):
        before.write_bytes(disk.read_bytes())
        where = ("--target", tmp_path / "temp.raw", "-k", tmp_path / "s")
        serving = Serving(disk, *where, "--min-cluster-size", f"{CLUSTERS[number % 2]}", command="fleece")
        guest, snapshot = serving.uris
        play(number, guest, snapshot, before, tmp_path)
        assert copy(snapshot, backup) == before.read_bytes()
        assert serving.stop() == 0
        old, new = before.read_bytes(), disk.read_bytes()
        quarter = SIZE // 4
        assert all(old[start : start + quarter] != new[start : start + quarter] for start in range(0, SIZE, quarter))


def play(number: int, guest: str, backup: str, before: Path, folder: Path) -> None:
    # Each writer has a quarter of the disk, keeps checksums of what it wrote, and reads it again.
    job = ["--name=w", "--ioengine=nbd", f"--uri={guest}", "--numjobs=4", "--size=16m", "--offset_increment=16m"]
    job += ["--rw=randrw", "--rwmixread=20", "--bsrange=512-128k", "--iodepth=16", "--time_based", "--rate_iops=20,100"]
    job += [f"--runtime={ROUND}", "--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--fsync=100"]
    job += ["--verify_state_save=0", "--group_reporting", f"--randseed={number + 1}"]
    writers = subprocess.Popen([require("fio"), *job], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    words = [SYSTEM_PYTHON, "-c", READER, backup, str(before)]
    readers = [
        subprocess.Popen([*words, f"{number * 4 + seed}", f"{ROUND}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for seed in range(4)
    ]
    said = [reader.communicate(timeout=ROUND + 60)[0] for reader in readers]
    report = writers.communicate(timeout=ROUND + 60)[0]
    assert writers.returncode == 0, report
    assert all(reader.returncode == 0 for reader in readers), said
    assert sum(map(int, said)) > SIZE // 4
