"""Who writes a disk in earnest, on our export: a guest in a real QEMU, a file system. Backups are taken meanwhile."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.nbd.fleecing import copy
from tests.nbd.serving import Serving
from tests.nbd.support import run as output
from tests.support import guest, require
from tests.support.qmp import RunningQemu
from tests.support.waiting import until


def newest(disk: Path) -> int:
    """The generation that the guest has written last; 0 if it has not begun."""
    first = disk.read_bytes()[:8]
    return int.from_bytes(first[:4], "little") if first[:4] == first[4:] else 0


@pytest.mark.slow
def test_a_virtual_machine_writes_while_its_disk_is_copied(tmp_path: Path) -> None:
    """Twice: over what was there, and over what it wrote, which is of one moment then."""
    disk, backup = tmp_path / "disk.raw", tmp_path / "backup.raw"
    disk.write_bytes(random.Random(1).randbytes(guest.SIZE))
    for number in range(2):
        before = disk.read_bytes()
        last = newest(disk) if number else 0
        options: list[str | Path] = [
            "--guest-socket",
            tmp_path / f"g{number}",
            "-k",
            tmp_path / f"s{number}",
            "--backup-trim",
        ]
        serving = Serving(disk, "--target", tmp_path / "temp.raw", *options, command="fleece")
        where = {"driver": "nbd", "server": {"type": "unix", "path": str(tmp_path / f"g{number}")}, "export": "guest"}
        with RunningQemu(where, driver="raw", machine=guest.machine(tmp_path)):
            assert until(lambda: newest(disk) not in (0, last), 60), "the guest does not write"  # noqa: B023
            copies, since = 0, newest(disk)
            # It counts from 1 each time that it is started: beyond `last`, the disk is not what it was again.
            while copies < 2 or newest(disk) < since + 3 or newest(disk) <= last:
                assert copy(serving.uris[1], backup) == before
                copies += 1
                assert copies < 200
        if number:  # what the guest wrote last time, up to one moment
            fresh, *older = guest.generations(before)
            assert older in ([], [fresh - 1])
        assert serving.stop() == 0, serving.stderr
        assert "4 MiB" in serving.stderr
    assert disk.read_bytes() != before


PULL = """
import json, os, sys, nbd
uri, bitmap, out = sys.argv[1:]
h = nbd.NBD()
context = "qemu:dirty-bitmap:" + bitmap if bitmap else "base:allocation"
h.add_meta_context(context)
h.connect_uri(uri)
size, wanted, position = h.get_size(), [], 0
def told(name, offset, entries, error):
    global position
    for length, flags in zip(entries[::2], entries[1::2]):
        if (flags & 1 if bitmap else not flags & 2):
            wanted.append((position, length))
        position += length
while position < size:
    h.block_status(size - position, position, told)
file = os.open(out, os.O_RDWR | os.O_CREAT)
os.truncate(file, size)
for start, length in wanted:
    for at in range(start, start + length, 1 << 20):
        count = min(1 << 20, start + length - at)
        os.pwrite(file, h.pread(count, at), at)
print(sum(length for start, length in wanted))
"""


def test_full_and_incremental_backups_as_virtnbdbackup_takes_them(tmp_path: Path) -> None:
    """Full while the guest writes; then what changed since, by the extents of both, again while it writes."""
    size = 8 << 20
    disk, restored = tmp_path / "disk.raw", tmp_path / "restored.raw"
    disk.write_bytes(random.Random(1).randbytes(size))

    def backup(number: int, *options: str | Path, bitmap: str = "") -> int:
        where = ("-k", tmp_path / f"s{number}", "--target", tmp_path / f"t{number}")
        serving = Serving(disk, *where, *options, command="fleece")
        before = disk.read_bytes()
        job = ["--name=t", "--ioengine=nbd", f"--uri={serving.uris[0]}", "--size=8m", "--rw=randwrite", "--bs=4k"]
        job += ["--time_based", "--runtime=20", f"--randseed={number}", "--rate_iops=200"]
        writer = subprocess.Popen([require("fio"), *job], cwd=tmp_path, stdout=subprocess.DEVNULL)
        try:
            assert until(lambda: disk.read_bytes() != before), "fio does not write"
            pulled = subprocess.check_output(
                ["/usr/bin/python3", "-c", PULL, serving.uris[1], bitmap, str(restored)], timeout=60
            )
        finally:
            writer.kill()
            writer.wait()
        assert serving.stop() == 0
        assert restored.read_bytes() == before
        return int(pulled)

    assert backup(1) == size
    last, now = restored.read_bytes(), disk.read_bytes()
    dirty = [{"start": at, "length": 4096, "dirty": last[at : at + 4096] != now[at : at + 4096]}
             for at in range(0, size, 4096)]  # fmt: skip
    (tmp_path / "since.json").write_text(json.dumps(dirty))
    assert 0 < backup(2, "--bitmap", tmp_path / "since.json", bitmap="since") < size // 2


@pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK) or not (os.geteuid() == 0 or shutil.which("fusermount3")),
    reason="nobody may mount here",
)
def test_a_file_system_is_written_by_way_of_nbdfuse(tmp_path: Path) -> None:
    """The backup is the file system as it was, and sound; so is the disk, with what was written."""
    disk, backup, at = tmp_path / "disk.raw", tmp_path / "backup.raw", tmp_path / "at"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    output(require("mke2fs"), "-q", "-t", "ext4", "-b", "1024", disk)
    before = disk.read_bytes()
    new, at_new = tmp_path / "new", random.Random(1).randbytes(2 << 20)
    new.write_bytes(at_new)
    serving = Serving(disk, "--target", tmp_path / "temp.raw", "-k", tmp_path / "s", command="fleece")
    at.mkdir()
    fuse = subprocess.Popen([require("nbdfuse"), at, serving.uris[0]])
    try:
        assert until((at / "nbd").exists)
        output("debugfs", "-w", "-R", f"write {new} new", at / "nbd")
        assert copy(serving.uris[1], backup) == before
    finally:
        fuse.terminate()  # which unmounts it
        fuse.wait(20)
    assert serving.stop() == 0
    for image in (disk, backup):
        output("e2fsck", "-fn", image)
    output("debugfs", "-R", f"dump new {tmp_path / 'found'}", disk)
    assert (tmp_path / "found").read_bytes() == at_new
