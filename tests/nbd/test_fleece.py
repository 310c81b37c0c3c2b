"""`qcow2snap fleece`, by the clients that people use; QEMU's own graph of copy-before-write says what is right."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.block.test_image_lock import qemu_io_holding
from tests.nbd.fleecing import CLUSTER, SIZE, Fleece, MiB, QemuGraph, copy, libnbd
from tests.nbd.nbdkit import Nbdkit, Start
from tests.nbd.serving import Serving
from tests.nbd.support import run as output
from tests.nbd.test_tls import make_certificates
from tests.support import qemu_img, qemu_io, require
from tests.support import run as cli


def test_a_backup_is_what_the_disk_was_whatever_fio_does_meanwhile(fleece: Fleece, disk: Path, tmp_path: Path) -> None:
    before = disk.read_bytes()
    serving = fleece()
    guest, backup = serving.uris
    job = ["--name=t", "--ioengine=nbd", f"--uri={guest}", "--size=8m", "--rw=randwrite", "--iodepth=32"]
    job += ["--bsrange=512-128k", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--fsync=50", "--randseed=7"]
    fio = subprocess.Popen([require("fio"), *job], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    copies = 0
    while fio.poll() is None or not copies:
        assert copy(backup, tmp_path / "backup.raw") == before
        copies += 1
        assert copies < 500
    assert fio.returncode == 0, fio.communicate()
    assert copy(backup, tmp_path / "backup.raw") == before
    assert copy(guest, tmp_path / "now.raw") == disk.read_bytes() != before
    assert serving.stop() == 0
    assert "copied to" in serving.stderr
    assert not (tmp_path / "temp.raw").exists()


def test_qemu_and_nbdkit_write_and_the_backup_stays(fleece: Fleece, disk: Path, tmp_path: Path) -> None:
    before = disk.read_bytes()
    guest, backup = fleece().uris
    commands = ["write -P 1 1M 64k", "write -z 3M 1M", "write -zu 0 4k", "discard 5M 1M", "write -P 2 8M 12k", "flush"]
    each = [argument for command in commands for argument in ("-c", command)]
    output(require("qemu-io"), "-f", "raw", "-d", "unmap", *each, guest)
    written = tmp_path / "written.raw"
    written.write_bytes(b"new" * 100_000)
    inner = f'nbdcopy {written} "$uri"'
    output(require("nbdkit"), "-U", "-", "nbd", f"uri={guest}", "--filter=offset", "offset=6M", "range=300000",
           "--run", inner)  # fmt: skip
    assert copy(backup, tmp_path / "backup.raw") == before
    now = disk.read_bytes()
    assert now[6 * MiB : 6 * MiB + 300_000] == written.read_bytes()
    assert now[MiB : MiB + CLUSTER] == b"\1" * CLUSTER
    assert now[5 * MiB : 6 * MiB] == bytes(MiB)
    assert (
        output("qemu-img", "compare", "-f", "raw", "-F", "raw", backup, tmp_path / "backup.raw")
        == "Images are identical.\n"
    )


# What is done to guest and backup, and what comes of it: the same script runs on our graph and on QEMU's.
SCHEDULE = """
import hashlib, json, random, sys
import nbd
guest, backup, asking = nbd.NBD(), nbd.NBD(), nbd.NBD()
backup.set_request_structured_replies(False)
asking.add_meta_context("base:allocation")
guest.connect_uri(sys.argv[1])
backup.connect_uri(sys.argv[2])
asking.connect_uri(sys.argv[2])
before = open(sys.argv[4], 'rb').read()
size, cluster, choose = backup.get_size(), 1 << 16, random.Random(int(sys.argv[3]))
said = []
for step in range(150):
    offset = choose.randrange(size // 512) * 512
    length = choose.randrange(1, min(4 * cluster, size - offset) // 512 + 1) * 512
    what = choose.choice(["write", "write", "zero", "trim", "read", "read", "read", "status", "give back"])
    result = None
    try:
        if what == "write":
            guest.pwrite(bytes([step]) * length, offset)
        elif what == "zero":
            guest.zero(length, offset)
        elif what == "trim":
            guest.trim(length, offset)
        elif what == "read":
            result = backup.pread(length, offset) == before[offset : offset + length]
        elif what == "status":  # where there is data the servers may know less or more
            asking.block_status(length, offset, lambda *told: None)
        elif len(sys.argv) > 5:
            backup.trim(length, offset)
        else:  # whole clusters: QEMU 7.2 fails an assertion on others
            offset -= offset % cluster
            backup.trim(min(choose.randrange(1, 3) * cluster, (size - offset) // cluster * cluster), offset)
    except nbd.Error as error:
        result = error.errno
    said.append([step, what, offset, length, result])
said.append(hashlib.sha256(guest.pread(size, 0)).hexdigest())
print(json.dumps(said))
"""


@pytest.mark.parametrize("seed", range(3))
def test_any_schedule_has_the_answers_of_qemu(
    fleece: Fleece, disk: Path, tmp_path: Path, qemu_graph: QemuGraph, seed: int
) -> None:
    ours, theirs = played(fleece, disk, tmp_path, qemu_graph, seed, "qemu-storage-daemon")
    for own, qemus in zip(ours, theirs, strict=True):
        if qemus[-1] is False:  # QEMU 7.2 reads too far from one place: what the guest has written since
            qemus[-1] = True
        assert own == qemus
    assert any(step[-1] == "EINVAL" for step in ours[:-1]), "nothing was given back and asked for again"


@pytest.mark.parametrize("seed", range(3))
def test_any_schedule_has_the_answers_of_a_newer_qemu(
    fleece: Fleece,
    disk: Path,
    tmp_path: Path,
    qemu_graph: QemuGraph,
    peers: Path,
    seed: int,
) -> None:
    """Which reads such a snapshot right, and takes parts of clusters back as well."""
    ours, theirs = played(fleece, disk, tmp_path, qemu_graph, seed, peers / "qemu-storage-daemon", "parts")
    assert ours == theirs
    assert any(step[-1] == "EINVAL" for step in ours[:-1]), "nothing was given back and asked for again"


def played(
    fleece: Fleece, disk: Path, tmp_path: Path, qemu_graph: QemuGraph, seed: int, program: str | Path, *options: str
) -> tuple[list[list[object]], list[list[object]]]:
    """What the schedule says of ours, and of QEMU's."""
    before, other = tmp_path / "before.raw", tmp_path / "other.raw"
    for path in (before, other):
        path.write_bytes(disk.read_bytes())
    last = (str(seed), str(before), *options)
    ours = json.loads(libnbd(SCHEDULE, *fleece("--backup-trim").uris, *last))
    return ours, json.loads(libnbd(SCHEDULE, *qemu_graph(other, program), *last))


TRIM = """
import nbd, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
print(h.is_read_only(), h.can_trim(), h.can_zero(), h.can_fua())
for call in (lambda: h.trim(1 << 16, 0), lambda: h.pread(1, 0), lambda: h.pread(1, 1 << 16),
             lambda: h.pwrite(b"x", 0), lambda: h.zero(1, 0), lambda: h.trim(1 << 16, 0, nbd.CMD_FLAG_FUA)):
    try:
        call()
        print("done")
    except nbd.Error as error:
        print(error.errno)
"""


@pytest.mark.parametrize("allowed", [True, False])
def test_a_backup_is_trimmed_only_where_that_is_asked_for(fleece: Fleece, tmp_path: Path, allowed: bool) -> None:
    guest, backup = fleece(*["--backup-trim"] * allowed).uris
    output(require("qemu-io"), "-f", "raw", "-c", "write -P 1 0 128k", guest)
    temp = tmp_path / "temp.raw"
    assert temp.stat().st_blocks * 512 >= 2 * CLUSTER
    said = libnbd(TRIM, backup).splitlines()
    if allowed:
        # Not read-only, for on what is so the protocol forbids TRIM; but that is all that can be done.
        assert said == ["False True False False", "done", "EINVAL", "done", "ENOTSUP", "ENOTSUP", "EINVAL"]
        assert temp.stat().st_blocks * 512 < 2 * CLUSTER
    else:
        assert said == ["True False False False", "EPERM", "done", "done", "EPERM", "EPERM", "EPERM"]
        assert temp.stat().st_blocks * 512 >= 2 * CLUSTER


def test_the_guest_can_have_a_socket_of_its_own(fleece: Fleece, tmp_path: Path) -> None:
    guest, backup = fleece("--guest-socket", tmp_path / "g").uris
    assert guest == f"nbd+unix:///guest?socket={tmp_path / 'g'}"
    assert backup == f"nbd+unix:///backup?socket={tmp_path / 's'}"
    for uri, name in ((guest, "guest"), (backup, "backup")):
        listed = json.loads(output("nbdinfo", "--list", "--json", uri))
        assert [export["export-name"] for export in listed["exports"]] == [name]


def test_qemus_programs_keep_away_from_the_disk_and_the_target(fleece: Fleece, disk: Path, tmp_path: Path) -> None:
    fleece()
    for file in (disk, tmp_path / "temp.raw"):
        result = qemu_io(file, "write 0 512", options=("-f", "raw"), check=False)
        assert "lock" in result.stderr


def test_what_another_has_open_is_refused(disk: Path, tmp_path: Path) -> None:
    arguments = ("fleece", disk, "--target", tmp_path / "temp.raw", "-k", tmp_path / "s")
    with qemu_io_holding(disk, "-f", "raw"):
        result = cli(*arguments)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "in use by another process" in result.stderr
    (tmp_path / "temp.raw").write_bytes(b"x")
    with qemu_io_holding(tmp_path / "temp.raw", "-f", "raw"):
        result = cli(*arguments, "--force")
    assert "temp.raw: in use by another process" in result.stderr
    assert (tmp_path / "temp.raw").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda disk, temp: temp.write_bytes(b"x"), "has something in it"),
        (lambda disk, temp: temp.symlink_to(disk), "is the disk itself"),
        (lambda disk, temp: temp.mkdir(), "directory"),
        (lambda disk, temp: qemu_img("create", "-q", "-f", "qcow2", disk, "1M"), "looks like qcow2"),
        (lambda disk, temp: disk.unlink(), "No such file"),
    ],
)
def test_what_cannot_be_is_refused(
    disk: Path, tmp_path: Path, change: Callable[[Path, Path], object], message: str
) -> None:
    temp = tmp_path / "temp.raw"
    change(disk, temp)
    existed, content = temp.exists(), temp.read_bytes() if temp.is_file() else b""
    result = cli("fleece", disk, "--target", temp, "-k", tmp_path / "s")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert message in result.stderr
    assert temp.exists() == existed
    assert not temp.is_file() or temp.read_bytes() == content


def test_a_target_that_was_there_is_overwritten_if_told_and_stays(fleece: Fleece, disk: Path, tmp_path: Path) -> None:
    before = disk.read_bytes()
    temp = tmp_path / "temp.raw"
    temp.write_bytes(b"old" * 1_000_000)
    serving = fleece("--force")
    assert temp.stat().st_blocks == 0
    assert temp.stat().st_size == SIZE
    output(require("qemu-io"), "-f", "raw", "-c", "write -z 0 1M", serving.uris[0])
    assert copy(serving.uris[1], tmp_path / "backup.raw") == before
    serving.stop()
    assert temp.exists()


def test_a_full_target_fails_the_guest_as_a_full_disk(fleece: Fleece, disk: Path, tmp_path: Path) -> None:
    before = disk.read_bytes()
    serving = fleece("--max-temp", "128k")
    result = subprocess.run(
        [require("qemu-io"), "-f", "raw", "-c", "write 0 128k", "-c", "write 1M 4k", serving.uris[0]],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "No space left" in result.stdout + result.stderr
    assert disk.read_bytes()[MiB : 2 * MiB] == before[MiB : 2 * MiB]
    assert copy(serving.uris[1], tmp_path / "backup.raw") == before
    assert serving.stop() == 0


def test_a_full_target_loses_the_snapshot_if_told(fleece: Fleece) -> None:
    serving = fleece("--max-temp", "128k", "--on-cbw-error", "break-snapshot")
    guest, backup = serving.uris
    output(require("qemu-io"), "-f", "raw", "-c", "write 0 1M", guest)
    result = subprocess.run(["nbdcopy", backup, "null:"], capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert serving.stop() == 1
    assert "the snapshot was lost: the target may hold no more than 131072 bytes" in serving.stderr


def test_a_backup_client_that_is_killed_harms_nobody(fleece: Fleece, disk: Path, tmp_path: Path) -> None:
    before = disk.read_bytes()
    guest, backup = fleece().uris
    reader = subprocess.Popen([require("nbdcopy"), "--connections=4", backup, str(tmp_path / "half.raw")])
    time.sleep(0.05)
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    output(require("qemu-io"), "-f", "raw", "-c", "write -P 7 0 8M", guest)
    assert disk.read_bytes()[: 8 * MiB] == b"\7" * (8 * MiB)
    assert copy(backup, tmp_path / "backup.raw") == before


def test_what_was_acknowledged_is_there_when_it_is_killed(fleece: Fleece, disk: Path, tmp_path: Path) -> None:
    serving = fleece()
    output(require("qemu-io"), "-f", "raw", "-c", "write -f -P 7 1M 1M", "-c", "write -P 8 3M 64k", "-c", "flush",
           serving.uris[0])  # fmt: skip
    serving.process.kill()
    serving.process.wait()
    now = disk.read_bytes()
    assert now[MiB : 2 * MiB] == b"\7" * MiB
    assert now[3 * MiB : 3 * MiB + CLUSTER] == b"\10" * CLUSTER
    again = cli("fleece", disk, "--target", tmp_path / "temp.raw", "-k", tmp_path / "s2")
    assert "has something in it" in again.stderr  # of the snapshot that is lost
    assert copy(fleece("--force").uris[1], tmp_path / "backup.raw") == now


@pytest.fixture
def remote_temp(nbdkit: Start) -> Nbdkit:
    return nbdkit("memory", str(SIZE))


def test_disk_and_target_may_be_elsewhere(
    nbdkit: Start,
    remote_temp: Nbdkit,
    disk: Path,
    tmp_path: Path,
) -> None:
    before = disk.read_bytes()
    serving = Serving(
        nbdkit("file", str(disk)).uri, "--target", remote_temp.uri, "-k", tmp_path / "s", command="fleece"
    )
    guest, backup = serving.uris
    output(require("qemu-io"), "-f", "raw", "-c", "write -P 1 100k 3M", "-c", "write -z 5M 1M", "-c", "flush", guest)
    assert copy(backup, tmp_path / "backup.raw") == before
    assert disk.read_bytes()[100 * 1024 : 100 * 1024 + 3 * MiB] == b"\1" * (3 * MiB)
    assert serving.stop() == 0
    result = cli("fleece", disk, "--target", remote_temp.uri, "-k", tmp_path / "s")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "has something in it" in result.stderr


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_a_target_that_dies_and_comes_back_never_gives_wrong_bytes(
    remote_temp: Nbdkit, disk: Path, tmp_path: Path, policy: str
) -> None:
    """What it had kept is gone, and the server does not know that."""
    before = disk.read_bytes()
    options = ("--target", remote_temp.uri, "-k", tmp_path / "s", "--on-cbw-error", policy)
    serving = Serving(disk, *options, command="fleece")
    guest, backup = serving.uris
    output(require("qemu-io"), "-f", "raw", "-c", "write -P 1 0 64k", guest)
    remote_temp.kill()
    remote_temp.start()
    write = subprocess.run([require("qemu-io"), "-f", "raw", "-c", "write -P 2 1M 64k", guest], timeout=60)
    assert (write.returncode == 0) == (policy == "break-snapshot")
    assert disk.read_bytes()[MiB : MiB + CLUSTER] == (
        b"\2" * CLUSTER if policy == "break-snapshot" else before[MiB : MiB + CLUSTER]
    )
    read = subprocess.run([require("nbdcopy"), backup, "null:"], capture_output=True, timeout=60)
    assert read.returncode != 0
    assert serving.stop() == (1 if policy == "break-snapshot" else 0)


def test_a_disk_that_dies_and_comes_back_in_time_is_used_on(
    nbdkit: Start, fleece: Fleece, disk: Path, tmp_path: Path
) -> None:
    before = disk.read_bytes()
    remote = nbdkit("file", str(disk))
    options = ("--target", tmp_path / "temp.raw", "-k", tmp_path / "s", "--reconnect-delay", "20")
    serving = Serving(remote.uri, *options, command="fleece")
    guest, backup = serving.uris
    output(require("qemu-io"), "-f", "raw", "-c", "write -f -P 1 0 64k", guest)
    remote.kill()
    write = subprocess.Popen(
        [require("qemu-io"), "-f", "raw", "-c", "read 4M 64k", "-c", "write -f -P 2 1M 64k", guest]
    )
    time.sleep(0.5)
    assert write.poll() is None, "it has not looked for the server again"
    remote.start()
    assert write.wait(30) == 0
    assert copy(backup, tmp_path / "backup.raw") == before
    assert disk.read_bytes()[MiB : MiB + CLUSTER] == b"\2" * CLUSTER
    assert serving.stop() == 0


def test_the_backup_is_read_by_tls_and_the_guests_own_socket_is_without(
    fleece: Fleece, disk: Path, tmp_path: Path
) -> None:
    before = disk.read_bytes()
    pki = make_certificates(tmp_path / "pki")
    tls = ("--tls", "require", "--tls-certificates", pki, "--tls-verify-peer")
    guest, backup, _ = fleece("--guest-socket", tmp_path / "g", "-p", "0", *tls).uris
    assert (guest[:11], backup[:11]) == ("nbd+unix://", "nbds+unix:/")
    output(require("qemu-io"), "-f", "raw", "-c", "write -P 1 0 1M", guest)
    assert copy(f"{backup}&tls-certificates={pki}", tmp_path / "backup.raw") == before
    refused = subprocess.run(["nbdinfo", backup.replace("nbds", "nbd")], capture_output=True, timeout=60)
    assert refused.returncode != 0
    result = cli("fleece", disk, "--target", tmp_path / "t", "-k", tmp_path / "s2", "--tls", "require")
    assert (result.returncode, "--tls-certificates" in result.stderr) == (2, True)
