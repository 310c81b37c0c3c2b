"""A Linux guest on a qcow2 image that we write for it, and the file systems of its snapshots, read while it goes on."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.daemon.conftest import StartDaemon
from tests.nbd.fleecing import copy
from tests.support import qemu_img, require
from tests.support import run as run_cli
from tests.support.linux import LinuxGuest
from tests.support.tools import TIME_LIMIT

SCRIPT = """
mke2fs.ext4 -q -F -t ext4 /dev/vda
mount -t ext4 /dev/vda /mnt
mkdir /mnt/kept /mnt/changing
for i in $(seq 24); do dd if=/dev/urandom of=/mnt/kept/$i bs=1000 count=$((i * 9)) 2>/dev/null; done
sync
cd /mnt/kept
for i in *; do say sum $(sha256sum $i); done
cd /
fsfreeze --freeze /mnt
say frozen
hear
fsfreeze --unfreeze /mnt
say thawed
(
    round=0
    until [ -e /stop ]; do
        round=$((round + 1))
        dd if=/dev/urandom of=/mnt/changing/$((round % 7)) bs=1000 count=$((round % 50 * 9 + 1)) 2>/dev/null
        [ $((round % 3)) = 0 ] && rm -f /mnt/changing/$((round % 5))
        [ $((round % 4)) = 0 ] && sync
        say round $round
    done
) &
hear
touch /stop
wait
cd /mnt/kept
for i in *; do say last $(sha256sum $i); done
cd /
umount /mnt
say done
"""


def sums(lines: list[str]) -> dict[str, str]:
    return {name: digest for _, digest, name in (line.split() for line in lines)}


def kept_files(file_system: Path, directory: Path) -> dict[str, str]:
    """The files of /kept, by debugfs."""
    directory.mkdir()
    subprocess.run(
        [require("debugfs"), "-R", f"rdump /kept {directory}", file_system], check=True, capture_output=True,
        timeout=TIME_LIMIT,
    )  # fmt: skip
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (directory / "kept").iterdir()}


def e2fsck(how: str, file_system: Path) -> int:
    done = subprocess.run([require("e2fsck"), how, file_system], capture_output=True, timeout=TIME_LIMIT)
    return done.returncode


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_file_systems_of_snapshots_are_sound_while_the_guest_goes_on(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    image, copied = tmp_path / "disk.qcow2", tmp_path / "copied.raw"
    assert run_cli("create", "-q", image, "48M").returncode == 0
    daemon = start_daemon(
        "--blockdev", f"driver=file,node-name=file,filename={image}",
        "--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap",
        "--export", "nbd,id=guest,node-name=disk,name=guest,writable=on",
    )  # fmt: skip

    def take(name: str) -> None:
        daemon.qmp.execute("blockdev_snapshot_internal_sync", device="disk", name=name)

    def show(name: str) -> None:
        daemon.qmp.execute("blockdev_add", driver="snapshot-access", file="disk", snapshot=name, node_name=name)
        daemon.qmp.execute("block_export_add", type="nbd", id=name, node_name=name)

    with LinuxGuest(tmp_path, SCRIPT, daemon.directory / "nbd", "guest") as guest:
        guest.wait_for("frozen")
        expected = sums(guest.said("sum"))
        assert len(expected) == 24
        take("frozen")
        show("frozen")
        guest.tell("go on")
        guest.wait_for("round", 5)
        was = copy(daemon.uri("frozen"), copied)
        assert e2fsck("-fn", copied) == 0
        assert kept_files(copied, tmp_path / "frozen") == expected

        # In the middle of its writes: what a power cut would leave, which the journal makes good.
        take("running")
        show("running")
        rounds = len(guest.said("round"))
        copy(daemon.uri("running"), copied)
        assert e2fsck("-fp", copied) in (0, 1)
        assert e2fsck("-fn", copied) == 0
        assert kept_files(copied, tmp_path / "running") == expected

        guest.wait_for("round", rounds + 10)
        assert copy(daemon.uri("frozen"), copied) == was
        guest.tell("stop")
        guest.wait_for("done")
        assert sums(guest.said("last")) == expected
        guest.process.wait(TIME_LIMIT)
    now = copy(daemon.uri("guest"), copied)
    assert e2fsck("-fn", copied) == 0
    assert daemon.stop() == 0
    assert qemu_img("check", image).returncode == 0
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, tmp_path / "converted.raw")
    assert (tmp_path / "converted.raw").read_bytes() == now
    assert run_cli("extract", "-f", "-s", "frozen", image, copied).returncode == 0
    assert copied.read_bytes() == was
