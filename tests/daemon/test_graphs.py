"""The graphs of fleecing and of an internal snapshot, built by command line and over QMP, and read by real clients."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import NewImage
from tests.daemon.busy_guest import start_fio
from tests.daemon.conftest import StartDaemon
from tests.daemon.storage_daemon import OURS, PROGRAMS, Refused, StorageDaemon
from tests.nbd.fleecing import SIZE, copy, libnbd
from tests.nbd.support import run
from tests.support import require

MiB = 1 << 20


@pytest.fixture
def temp(tmp_path: Path) -> Path:
    path = tmp_path / "temp.raw"
    path.touch()
    os.truncate(path, SIZE)
    return path


READ = """
import sys
import nbd
h = nbd.NBD()
h.set_request_structured_replies(False)
h.connect_uri(sys.argv[1])
with open(sys.argv[2], "wb") as out:
    for offset in range(0, h.get_size(), 1 << 16):
        out.write(h.pread(min(1 << 16, h.get_size() - offset), offset))
"""


def read_snapshot(uri: str, to: Path) -> bytes:
    """All of an export, cluster by cluster and by simple replies: more at once, QEMU 7.2 reads wrongly."""
    libnbd(READ, uri, str(to))
    return to.read_bytes()


def guest_io(uri: str, *commands: str) -> None:
    each = [argument for command in commands for argument in ("-c", command)]
    run(require("qemu-io"), "-f", "raw", "-d", "unmap", *each, uri)


def fleecing_options(disk: Path, temp: Path) -> list[str]:
    """Graph 1 of the design, as a script for qemu-storage-daemon has it."""
    return [
        "--blockdev", f"driver=file,node-name=disk,filename={disk}",
        "--blockdev", f"driver=raw,node-name=temp,file.driver=file,file.filename={temp}",
        "--blockdev", "driver=copy-before-write,node-name=cbw,file=disk,target=temp",
        "--blockdev", "driver=snapshot-access,node-name=access,file=cbw,read-only=on",
        "--export", "type=nbd,id=guest,node-name=cbw,name=guest,writable=on",
        "--export", "nbd,id=access,node-name=access,description=what the disk was",
    ]  # fmt: skip


@pytest.mark.parametrize("which", PROGRAMS)
def test_the_graph_of_fleecing_by_command_line(
    start_daemon: StartDaemon, which: str, disk: Path, temp: Path, tmp_path: Path
) -> None:
    before = disk.read_bytes()
    daemon = start_daemon(*fleecing_options(disk, temp), which=which)
    guest_io(daemon.uri("guest"), "write -P 7 100k 1M", "write -z 2M 64k", "flush")
    assert read_snapshot(daemon.uri("access"), tmp_path / "was.raw") == before
    now = copy(daemon.uri("guest"), tmp_path / "is.raw")
    assert now == disk.read_bytes() != before
    assert now[100 * 1024 : 100 * 1024 + MiB] == b"\7" * MiB
    said = run("nbdinfo", daemon.uri("access"))
    assert "is_read_only: true" in said
    assert "what the disk was" in said
    assert daemon.stop() == 0


@pytest.mark.parametrize("which", PROGRAMS)
def test_the_graph_of_fleecing_over_qmp(
    start_daemon: StartDaemon, which: str, disk: Path, temp: Path, tmp_path: Path
) -> None:
    before = disk.read_bytes()
    daemon = start_daemon(which=which)
    qmp = daemon.qmp
    qmp.add("file", "disk", filename=str(disk), discard="unmap")
    qmp.add("raw", "temp", file={"driver": "file", "filename": str(temp)})
    qmp.add("copy-before-write", "cbw", file="disk", target="temp", on_cbw_error="break-snapshot", cbw_timeout=4)
    qmp.add("snapshot-access", "access", file="cbw")
    qmp.export("cbw", "guest", writable=True)
    qmp.export("access")
    guest_io(daemon.uri("guest"), "write -P 7 0 1M", "flush")
    assert read_snapshot(daemon.uri("access"), tmp_path / "was.raw") == before
    assert copy(daemon.uri("guest"), tmp_path / "is.raw") == b"\7" * MiB + before[MiB:]
    for export in ("access", "guest"):
        qmp.execute("block_export_del", id=export)
        assert qmp.wait_for_event("BLOCK_EXPORT_DELETED")["data"] == {"id": export}
    for node in ("access", "cbw", "temp", "disk"):
        qmp.execute("blockdev_del", node_name=node)
    assert qmp.execute("query_named_block_nodes") == []


def test_a_snapshot_of_an_image_is_a_node_of_its_own_size(
    start_daemon: StartDaemon, new_image: NewImage, tmp_path: Path
) -> None:
    """Graph 2 of the design."""
    image = new_image("1M").write(0, 70_000).snapshot("small").resize("2M").write(MiB, 4096).snapshot("large")
    daemon = start_daemon(
        "--blockdev", f"driver=file,node-name=file,filename={image.path},read-only=on",
        "--blockdev", "driver=qcow2,node-name=image,file=file,read-only=on",
        "--blockdev", "driver=snapshot-access,node-name=small,file=image,snapshot=small",
        "--export", "nbd,id=small,node-name=small",
        "--export", "nbd,id=image,node-name=image,name=",
    )  # fmt: skip
    assert run("nbdinfo", "--size", daemon.uri("small")) == f"{MiB}\n"
    assert copy(daemon.uri("small"), tmp_path / "small.raw") == image.reference("small").read()
    assert copy(daemon.uri(""), tmp_path / "active.raw") == image.active.read()
    qmp = daemon.qmp
    qmp.add("snapshot-access", "large", file="image", snapshot="id=2")
    qmp.export("large")
    assert copy(daemon.uri("large"), tmp_path / "large.raw") == image.reference("large").read()
    assert "qcow2snap:changed-since:small" in run("nbdinfo", "--list", daemon.uri("large"))
    listed = qmp.execute("query_snapshots", node_name="image")
    assert [(each["name"], each["disk-size"]) for each in listed] == [("small", MiB), ("large", 2 * MiB)]
    with pytest.raises(Refused, match="no snapshot"):
        qmp.add("snapshot-access", "other", file="image", snapshot="other")


@pytest.mark.parametrize("which", PROGRAMS)
def test_an_image_with_children_given_inline_by_reference_and_as_json(
    start_daemon: StartDaemon, which: str, new_image: NewImage, tmp_path: Path
) -> None:
    base = new_image("1M").write(0, MiB, 5)
    overlay = new_image("1M", backing=base).write(65536, 65536, 6)
    file = {"driver": "file", "filename": str(overlay.path)}
    spelled = json.dumps({"driver": "qcow2", "node-name": "json", "read-only": True, "file": file})
    daemon = start_daemon(
        "--blockdev", f"qcow2,node-name=base,read-only=on,file.driver=file,file.filename={base.path}",
        "--blockdev", f"qcow2,node-name=alone,read-only=on,file.driver=file,file.filename={overlay.path},backing=base",
        "--blockdev", spelled,
        "--export", "nbd,id=alone,node-name=alone",
        "--export", "nbd,id=json,node-name=json",
        which=which,
    )  # fmt: skip
    expected = b"\5" * 65536 + b"\6" * 65536 + b"\5" * (MiB - 131072)
    assert copy(daemon.uri("alone"), tmp_path / "alone.raw") == expected
    assert copy(daemon.uri("json"), tmp_path / "json.raw") == expected


@pytest.mark.parametrize("which", PROGRAMS)
def test_a_stretch_of_a_file_is_a_raw_node(start_daemon: StartDaemon, which: str, disk: Path, tmp_path: Path) -> None:
    daemon = start_daemon(
        "--blockdev", f"file,node-name=disk,filename={disk}",
        "--blockdev", "raw,node-name=part,file=disk,offset=1048576,size=65536",
        "--export", "nbd,id=part,node-name=part,writable=on",
        which=which,
    )  # fmt: skip
    assert copy(daemon.uri("part"), tmp_path / "part.raw") == disk.read_bytes()[MiB : MiB + 65536]
    guest_io(daemon.uri("part"), "write -P 9 0 512")
    assert disk.read_bytes()[MiB : MiB + 512] == b"\x09" * 512


@pytest.mark.parametrize("which", PROGRAMS)
def test_disk_and_target_may_be_exports_of_another_daemon(
    start_daemon: StartDaemon, which: str, disk: Path, temp: Path, tmp_path: Path
) -> None:
    before = disk.read_bytes()
    far = start_daemon(
        "--blockdev", f"file,node-name=disk,filename={disk}",
        "--blockdev", f"file,node-name=temp,filename={temp}",
        "--export", "nbd,id=disk,node-name=disk,writable=on",
        "--export", "nbd,id=temp,node-name=temp,writable=on",
        which=OURS,
    )  # fmt: skip
    server = f"server.type=unix,server.path={far.directory}/nbd"
    daemon = start_daemon(
        "--blockdev", f"nbd,node-name=disk,{server},export=disk,reconnect-delay=1",
        "--blockdev", f"nbd,node-name=temp,{server},export=temp",
        "--blockdev", "copy-before-write,node-name=cbw,file=disk,target=temp",
        "--blockdev", "snapshot-access,node-name=access,file=cbw",
        "--export", "nbd,id=guest,node-name=cbw,writable=on",
        "--export", "nbd,id=access,node-name=access",
        which=which,
    )  # fmt: skip
    guest_io(daemon.uri("cbw"), "write -P 7 0 1M", "flush")
    assert read_snapshot(daemon.uri("access"), tmp_path / "was.raw") == before
    assert disk.read_bytes() == b"\7" * MiB + before[MiB:]


def test_a_backup_client_reads_while_fio_writes(
    start_daemon: StartDaemon, disk: Path, temp: Path, tmp_path: Path
) -> None:
    before = disk.read_bytes()
    daemon = start_daemon(*fleecing_options(disk, temp))
    fio = start_fio(daemon.uri("guest"), tmp_path)
    for _ in range(200):
        assert copy(daemon.uri("access"), tmp_path / "was.raw") == before
        if fio.poll() is not None:
            break
    assert fio.wait(60) == 0, fio.communicate()
    assert copy(daemon.uri("access"), tmp_path / "was.raw") == before != disk.read_bytes()


def test_a_killed_daemon_leaves_what_was_flushed_and_its_place_to_the_next(
    start_daemon: StartDaemon, disk: Path, temp: Path, tmp_path: Path
) -> None:
    before = disk.read_bytes()
    daemon = start_daemon(*fleecing_options(disk, temp))
    guest_io(daemon.uri("guest"), "write -P 7 0 1M", "write -f -P 8 1M 64k", "flush")
    daemon.kill()
    now = b"\7" * MiB + b"\x08" * 65536 + before[MiB + 65536 :]
    assert disk.read_bytes() == now
    again = StorageDaemon(OURS, daemon.directory, *fleecing_options(disk, temp))
    try:
        assert copy(again.uri("access"), tmp_path / "was.raw") == now
    finally:
        again.stop()
