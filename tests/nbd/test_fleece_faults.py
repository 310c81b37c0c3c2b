"""What fails under `qcow2snap fleece`: target, disk, clients, itself. The snapshot is right or refused, never wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcow2snap.nbd.client import Client, ReplyError
from tests.nbd.fleecing import CLUSTER, SIZE, Fleece, MiB, copy
from tests.nbd.nbdkit import Start
from tests.nbd.serving import Serving
from tests.nbd.support import run as output
from tests.support import require
from tests.support.tools import REPOSITORY
from tests.support.waiting import until

ENOSPC, EIO, EINVAL = 28, 5, 22
BREAK_SNAPSHOT = ("--on-cbw-error", "break-snapshot")


class Guest:
    """Writes through a client of ours, and knows what the disk has to be; it was told of each write that failed."""

    def __init__(self, uri: str, content: bytes) -> None:
        self._client = Client.connect(uri)
        self._client.go("guest")
        self.content = bytearray(content)
        self.errors: list[int] = []

    def write(self, offset: int, data: bytes) -> bool:
        try:
            self._client.pwrite(offset, data)
        except ReplyError as error:
            self.errors.append(int(error.error))
            return False
        self.content[offset : offset + len(data)] = data
        return True

    def close(self) -> None:
        self._client.close()


def reads(uri: str, before: bytes) -> list[bool]:
    """For each cluster of the snapshot, whether it could be read. What could, is what it was."""
    told = []
    with Client.connect(uri) as client:
        client.go("backup")
        for offset in range(0, len(before), CLUSTER):
            length = min(CLUSTER, len(before) - offset)
            try:
                assert client.pread(offset, length) == before[offset : offset + length], "not what it was"
                told.append(True)
            except ReplyError:
                told.append(False)
    return told


CLUSTERS = -(-SIZE // CLUSTER)


@pytest.mark.parametrize("policy", [(), BREAK_SNAPSHOT], ids=["break-guest-write", "break-snapshot"])
def test_a_target_on_a_file_system_that_is_full(disk: Path, tmp_path: Path, policy: tuple[str, ...]) -> None:
    """In a mount namespace, so that this needs no root and leaves nothing behind."""
    before = disk.read_bytes()
    mounted = tmp_path / "small"
    mounted.mkdir()
    script = f'mount -t tmpfs -o size=1m small {mounted} && exec "$@"'
    alone = ("unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    where = ("--target", mounted / "temp.raw", "-k", tmp_path / "s")
    serving = Serving(disk, *where, "--backup-trim", *policy, command="fleece", before=alone)
    guest = Guest(serving.uris[0], before)
    done = [guest.write(n * CLUSTER + 512, b"!" * 512) for n in range(CLUSTERS)]
    if policy:
        assert all(done)
        assert not any(reads(serving.uris[1], before))
    else:
        assert {*guest.errors} == {ENOSPC}
        assert 10 <= done.count(True) < CLUSTERS
        assert all(reads(serving.uris[1], before))
        failed = done.index(False)
        with Client.connect(serving.uris[1]) as client:  # what the reader gives back makes room
            client.go("backup")
            client.trim(0, 8 * CLUSTER)
        assert guest.write(failed * CLUSTER, b"?" * 512)
        assert reads(serving.uris[1], before) == [False] * 8 + [True] * (CLUSTERS - 8)
    guest.close()
    assert serving.stop() == (1 if policy else 0)
    assert ("No space left" in serving.stderr) == bool(policy)
    assert disk.read_bytes() == guest.content


@pytest.mark.parametrize("policy", [(), BREAK_SNAPSHOT], ids=["break-guest-write", "break-snapshot"])
def test_a_target_that_fails_now_and_then(nbdkit: Start, disk: Path, tmp_path: Path, policy: tuple[str, ...]) -> None:
    before = disk.read_bytes()
    filters = ("--filter=error", "error-pwrite-rate=30%", "error-pwrite=EIO")
    target = nbdkit("memory", str(SIZE), *filters)
    serving = Serving(disk, "--target", target.uri, "-k", tmp_path / "s", *policy, command="fleece")
    guest = Guest(serving.uris[0], before)
    choose = random.Random(1)
    for _ in range(150):
        offset = choose.randrange(SIZE // 512) * 512
        guest.write(offset, choose.randbytes(min(choose.randrange(1, 200_000), SIZE - offset)))
    assert bool(guest.errors) == (not policy)
    told = reads(serving.uris[1], before)
    assert not any(told) if policy else all(told)
    guest.close()
    assert serving.stop() == (1 if policy else 0)
    if policy:
        assert disk.read_bytes() == guest.content


def test_a_target_that_cannot_be_read_fails_the_reader_alone(nbdkit: Start, disk: Path, tmp_path: Path) -> None:
    before = disk.read_bytes()
    target = nbdkit("memory", str(SIZE), "--filter=error", "error-pread-rate=50%", "error-pread=EIO")
    # It cannot be looked at to see whether it is empty.
    serving = Serving(disk, "--target", target.uri, "--force", "-k", tmp_path / "s", command="fleece")
    guest = Guest(serving.uris[0], before)
    assert all(guest.write(n * CLUSTER, b"!" * CLUSTER) for n in range(64))
    told = reads(serving.uris[1], before)
    assert any(told[:64])
    assert not all(told[:64])
    assert all(told[64:])
    guest.close()
    assert serving.stop() == 0
    assert disk.read_bytes() == guest.content


@pytest.mark.parametrize("what", ["pread", "pwrite"])
def test_a_disk_that_fails_now_and_then(nbdkit: Start, disk: Path, tmp_path: Path, what: str) -> None:
    """Where it cannot be read, nothing can be copied; where it cannot be written, what was copied does no harm."""
    before = disk.read_bytes()
    where = nbdkit("file", str(disk), "--filter=error", f"error-{what}-rate=30%", f"error-{what}=EIO")
    serving = Serving(where.uri, "--target", tmp_path / "t", "-k", tmp_path / "s", command="fleece")
    guest = Guest(serving.uris[0], before)
    done = [guest.write(n * CLUSTER, bytes([n + 1]) * CLUSTER) for n in range(120)]
    assert {*guest.errors} == {EIO}
    assert any(done)
    told = reads(serving.uris[1], before)
    if what == "pwrite":
        assert all(told)
    guest.close()
    assert serving.stop() == 0
    now = disk.read_bytes()
    for n, was_done in enumerate(done):
        expected = guest.content if was_done else before
        assert now[n * CLUSTER : (n + 1) * CLUSTER] == expected[n * CLUSTER : (n + 1) * CLUSTER]


@pytest.mark.parametrize("policy", [(), BREAK_SNAPSHOT], ids=["break-guest-write", "break-snapshot"])
def test_a_slow_target_holds_a_guest_no_longer_than_it_may(
    nbdkit: Start, disk: Path, tmp_path: Path, policy: tuple[str, ...]
) -> None:
    before = disk.read_bytes()
    target = nbdkit("memory", str(SIZE), "--filter=delay", "wdelay=2")
    where = ("--target", target.uri, "-k", tmp_path / "s")
    serving = Serving(disk, *where, "--cbw-timeout", "0.5", *policy, command="fleece")
    guest = Guest(serving.uris[0], before)
    began = time.monotonic()
    assert guest.write(5 * CLUSTER, b"!" * CLUSTER) == bool(policy)
    assert 0.4 < time.monotonic() - began < 1.9
    assert disk.read_bytes() == guest.content
    if policy:
        assert not any(reads(serving.uris[1], before))
    else:
        assert all(reads(serving.uris[1], before))
        assert until(lambda: guest.write(5 * CLUSTER, b"?" * CLUSTER)), "the copy that came late is good"
        assert all(reads(serving.uris[1], before))
    guest.close()
    assert serving.stop() == (1 if policy else 0)
    assert ("took longer than 0.5 s" in serving.stderr) == bool(policy)


# Writes numbered sectors, says of each when it is durable, and goes on until it is killed.
WRITER = """
import random, sys
from qcow2snap.nbd.client import Client
client = Client.connect(sys.argv[1])
client.go("guest")
choose = random.Random(int(sys.argv[2]))
for number in range(1, 1 << 30):
    sector = choose.randrange(client.size // 512)
    client.pwrite(sector * 512, number.to_bytes(8, "little") * 64)
    if choose.randrange(2):
        client.flush()
        flushed = " flushed"
    else:
        flushed = ""
    sys.stdout.write(f"{sector} {number}{flushed}\\n")
    sys.stdout.flush()
"""


def start_writer(uri: str, said: Path) -> subprocess.Popen[bytes]:
    with said.open("wb") as out:
        words = [sys.executable, "-c", WRITER, uri, "1"]
        return subprocess.Popen(words, stdout=out, stderr=subprocess.DEVNULL, cwd=REPOSITORY)


def durable(said: Path) -> tuple[dict[int, int], dict[int, int]]:
    """By what the writer has said: the last number of each sector, and that of what it flushed."""
    last: dict[int, int] = {}
    flushed: dict[int, int] = {}
    for line in said.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            sector, number, *rest = line.split()
            last[int(sector)] = int(number)
            if rest:
                flushed |= last
    return last, flushed


@pytest.mark.parametrize("victim", ["guest", "server", "reader"])
def test_whoever_is_killed_loses_nothing_that_was_durable(
    fleece: Fleece, disk: Path, tmp_path: Path, victim: str
) -> None:
    before = disk.read_bytes()
    serving = fleece()
    guest, backup = serving.uris
    said = tmp_path / "said"
    writer = start_writer(guest, said)
    reader = subprocess.Popen([require("nbdcopy"), "--request-size=65536", backup, str(tmp_path / "half.raw")],
                              stderr=subprocess.DEVNULL)  # fmt: skip
    assert until(lambda: len(durable(said)[1]) > 50), "nothing becomes durable"
    os.kill({"guest": writer.pid, "server": serving.process.pid, "reader": reader.pid}[victim], signal.SIGKILL)
    if victim == "reader":
        reader.wait(30)
        count = len(durable(said)[1])
        assert until(lambda: len(durable(said)[1]) > count), "the guest stands still"
        writer.kill()
    writer.wait(30)
    last, flushed = durable(said)
    assert reader.wait(30) == 0 or victim in ("server", "reader")
    if reader.returncode == 0:
        assert (tmp_path / "half.raw").read_bytes() == before
    now = disk.read_bytes()
    for sector, number in (last if victim != "server" else flushed).items():
        found = now[sector * 512 : (sector + 1) * 512]
        # One more may have been under way when it was killed, over any sector.
        assert int.from_bytes(found[:8], "little") >= number
        assert found == found[:8] * 64
    if victim != "server":
        assert copy(backup, tmp_path / "backup.raw") == before
        output(require("qemu-io"), "-f", "raw", "-c", f"write -P 7 {MiB} 1M", "-c", "flush", guest)
        assert copy(backup, tmp_path / "backup.raw") == before
