"""A guest on a qcow2 image, with the image's snapshots beside it; and images as targets of fleecings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import NewImage
from tests.daemon.busy_guest import start_fio
from tests.daemon.conftest import StartDaemon
from tests.daemon.storage_daemon import OURS, PROGRAMS, QEMU
from tests.daemon.test_graphs import guest_io, read_snapshot
from tests.nbd.fleecing import SIZE, copy
from tests.support import qemu_img

MiB = 1 << 20


def test_a_guest_writes_an_image_while_its_snapshots_are_read(
    start_daemon: StartDaemon, new_image: NewImage, tmp_path: Path
) -> None:
    """Graph 2 of the design, whole."""
    image = new_image("8M").write(0, 3_000_000).snapshot("monday").write(MiB, 100_000).snapshot("tuesday")
    daemon = start_daemon(
        "--blockdev", f"driver=file,node-name=file,filename={image.path}",
        "--blockdev", "driver=qcow2,node-name=image,file=file,discard=unmap",
        "--blockdev", "driver=snapshot-access,node-name=monday,file=image,snapshot=monday",
        "--blockdev", "driver=snapshot-access,node-name=tuesday,file=image,snapshot=tuesday",
        "--export", "nbd,id=guest,node-name=image,name=guest,writable=on",
        "--export", "nbd,id=monday,node-name=monday",
        "--export", "nbd,id=tuesday,node-name=tuesday",
    )  # fmt: skip
    fio = start_fio(daemon.uri("guest"), tmp_path)
    for _ in range(200):
        for name in ("monday", "tuesday"):
            assert copy(daemon.uri(name), tmp_path / "was.raw") == image.reference(name).read()
        if fio.poll() is not None:
            break
    assert fio.wait(60) == 0, fio.communicate()
    guest_io(daemon.uri("guest"), "write -P 9 1M 1M", "write -z 3M 1M", "discard 5M 1M", "flush")
    now = copy(daemon.uri("guest"), tmp_path / "now.raw")
    assert now[MiB : 2 * MiB] == b"\x09" * MiB
    assert now[3 * MiB : 4 * MiB] == bytes(MiB)
    assert daemon.qmp.refusal("blockdev_del", node_name="image")[1] == "Node image is in use"
    assert daemon.stop() == 0
    qemu_img("check", image.path)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image.path, tmp_path / "converted.raw")
    assert (tmp_path / "converted.raw").read_bytes() == now


@pytest.mark.parametrize("which", PROGRAMS)
def test_the_target_of_a_fleecing_may_be_an_image(
    start_daemon: StartDaemon, which: str, disk: Path, tmp_path: Path
) -> None:
    before = disk.read_bytes()
    temp = tmp_path / "temp.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", temp, str(SIZE))
    daemon = start_daemon(
        "--blockdev", f"driver=file,node-name=disk,filename={disk}",
        "--blockdev", f"driver=qcow2,node-name=temp,file.driver=file,file.filename={temp}",
        "--blockdev", "driver=copy-before-write,node-name=cbw,file=disk,target=temp",
        "--blockdev", "driver=snapshot-access,node-name=access,file=cbw,read-only=on",
        "--export", "type=nbd,id=guest,node-name=cbw,name=guest,writable=on",
        "--export", "type=nbd,id=access,node-name=access,name=access",
        which=which,
    )  # fmt: skip
    guest_io(daemon.uri("guest"), "write -P 7 100k 2M", "write -z 5M 1M", "flush")
    assert read_snapshot(daemon.uri("access"), tmp_path / "was.raw") == before
    assert daemon.stop() == 0
    qemu_img("check", temp)


@pytest.mark.parametrize("which", [OURS, QEMU])
def test_an_image_that_is_the_disk_of_a_fleecing(
    start_daemon: StartDaemon, which: str, new_image: NewImage, tmp_path: Path
) -> None:
    image = new_image("4M").write(0, 2_000_000)
    before = image.active.read()
    temp = tmp_path / "temp.raw"
    temp.write_bytes(bytes(4 * MiB))
    daemon = start_daemon(
        "--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={image.path}",
        "--blockdev", f"file,node-name=temp,filename={temp}",
        "--blockdev", "copy-before-write,node-name=cbw,file=disk,target=temp",
        "--blockdev", "snapshot-access,node-name=access,file=cbw",
        "--export", "nbd,id=guest,node-name=cbw,name=guest,writable=on",
        "--export", "nbd,id=access,node-name=access",
        which=which,
    )  # fmt: skip
    guest_io(daemon.uri("guest"), "write -P 7 1M 2M", "flush")
    assert read_snapshot(daemon.uri("access"), tmp_path / "was.raw") == before
    assert daemon.stop() == 0
    qemu_img("check", image.path)
    after = tmp_path / "after.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image.path, after)
    assert after.read_bytes() == before[:MiB] + b"\7" * (2 * MiB) + before[3 * MiB :]


def test_a_killed_daemon_leaves_an_image_that_is_sound_and_has_what_was_flushed(
    start_daemon: StartDaemon, new_image: NewImage, tmp_path: Path
) -> None:
    image = new_image("4M").write(0, 2_000_000).snapshot("monday")
    daemon = start_daemon(
        "--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={image.path}",
        "--export", "nbd,id=disk,node-name=disk,writable=on",
    )  # fmt: skip
    guest_io(daemon.uri("disk"), "write -P 7 1M 1M", "write -f -P 8 3M 64k", "flush", "write -P 9 0 64k")
    daemon.kill()
    assert qemu_img("check", image.path, check=False).returncode in (0, 3)  # leaks at worst
    after = tmp_path / "after.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image.path, after)
    assert after.read_bytes()[MiB : 2 * MiB] == b"\7" * MiB
    assert after.read_bytes()[3 * MiB : 3 * MiB + 65536] == b"\x08" * 65536
    qemu_img("convert", "-f", "qcow2", "-O", "raw", "-l", "snapshot.name=monday", image.path, after)
    assert after.read_bytes() == image.reference("monday").read()


def test_an_image_that_is_written_is_nobody_elses(start_daemon: StartDaemon, new_image: NewImage) -> None:
    image = new_image("1M")
    daemon = start_daemon("--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={image.path}")
    assert "lock" in qemu_img("snapshot", "-c", "x", image.path, check=False).stderr
    options = {"driver": "qcow2", "node_name": "again", "file": {"driver": "file", "filename": str(image.path)}}
    assert daemon.qmp.refusal("blockdev_add", **options)[1].startswith('Failed to get "write" lock')
    daemon.qmp.execute("blockdev_del", node_name="disk")
    qemu_img("snapshot", "-c", "x", image.path)
    daemon.qmp.execute("blockdev_add", **options)
    daemon.qmp.add("file", "locked", filename=str(image.path), read_only=True)
    refused = daemon.qmp.refusal("blockdev_add", driver="qcow2", node_name="third", file="locked", read_only=True)
    assert "lock" in refused[1]
