"""Internal snapshots over QMP: the same answers as a running QEMU, made and deleted under a guest that writes."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qcow2snap.block.node import NBDError
from qcow2snap.nbd.client import Client
from tests.conftest import NewImage
from tests.daemon.busy_guest import assert_one_moment, start_fio, sweeping
from tests.daemon.conftest import StartDaemon
from tests.daemon.storage_daemon import StorageDaemon
from tests.daemon.test_graphs import guest_io
from tests.nbd.fleecing import copy
from tests.support import ToolFailed, qemu_img, qemu_info, require
from tests.support.qmp import RunningQemu, file_node
from tests.support.table import read_table

MiB = 1 << 20


def image_node(path: Path) -> list[str]:
    return [
        "--blockdev", f"driver=file,node-name=file,filename={path}",
        "--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap",
        "--export", "nbd,id=guest,node-name=disk,name=guest,writable=on",
    ]  # fmt: skip


CREATE, DELETE = "blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync"

CALLS: list[tuple[str, dict[str, Any]]] = [
    (CREATE, {"device": "disk", "name": "one"}),
    (CREATE, {"device": "disk", "name": "one"}),
    (CREATE, {"device": "disk", "name": ""}),
    (CREATE, {"device": "none", "name": "x"}),
    (CREATE, {"device": "disk", "name": "two"}),
    (CREATE, {"device": "disk", "name": "1"}),
    (DELETE, {"device": "disk"}),
    (DELETE, {"device": "disk", "name": "absent"}),
    (DELETE, {"device": "disk", "id": "1", "name": "two"}),
    (DELETE, {"device": "disk", "id": "1"}),
    (DELETE, {"device": "disk", "name": "1"}),
    (CREATE, {"device": "disk", "name": "four"}),
    (DELETE, {"device": "disk", "id": "2", "name": "two"}),
]


def test_the_answers_are_qemus(start_daemon: StartDaemon, new_image: NewImage) -> None:
    ours, theirs = new_image("1M").write(0, 65536), new_image("1M").write(0, 65536)
    daemon = start_daemon(*image_node(ours.path))
    with RunningQemu(file_node(theirs.path)) as qemu:
        for command, arguments in CALLS:
            refused, expected = "", None
            try:
                expected = without_dates(qemu.execute(command, **arguments))
            except ToolFailed as error:
                refused = str(error).partition("}: ")[2]
            ours_called = command.replace("-", "_")
            if refused:
                assert daemon.qmp.refusal(ours_called, **arguments)[1] == refused
            else:
                assert without_dates(daemon.qmp.execute(ours_called, **arguments)) == expected
    assert daemon.stop() == 0
    tables = [[(entry.id, entry.name) for entry in read_table(image.path)] for image in (ours, theirs)]
    assert tables[0] == tables[1] != []


def without_dates(answer: Any) -> Any:
    keys = ("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec", "disk-size", "icount")
    return {key: value for key, value in answer.items() if key not in keys}


def test_snapshots_come_and_go_under_a_guest(start_daemon: StartDaemon, new_image: NewImage, tmp_path: Path) -> None:
    image = new_image("8M").write(0, 3_000_000)
    daemon = start_daemon(*image_node(image.path))
    fio = start_fio(daemon.uri("guest"), tmp_path)
    held: dict[str, bytes] = {}
    for number in range(12):
        name = f"s{number}"
        daemon.qmp.execute("blockdev_snapshot_internal_sync", device="disk", name=name)
        daemon.qmp.execute("blockdev_add", driver="snapshot-access", file="disk", snapshot=name, node_name=name)
        daemon.qmp.execute("block_export_add", type="nbd", id=name, node_name=name)
        held[name] = copy(daemon.uri(name), tmp_path / "held.raw")
        if number >= 2:
            old = f"s{number - 2}"
            assert copy(daemon.uri(old), tmp_path / "held.raw") == held.pop(old)
            said = daemon.qmp.refusal("blockdev_snapshot_delete_internal_sync", device="disk", name=old)[1]
            assert "in use by 1 reader" in said
            daemon.qmp.execute("block_export_del", id=old)
            daemon.qmp.execute("blockdev_del", node_name=old)
            daemon.qmp.execute("blockdev_snapshot_delete_internal_sync", device="disk", name=old)
    assert fio.wait(60) == 0, fio.communicate()
    # By force the reader gets errors, and nobody else notices.
    daemon.qmp.execute("blockdev_snapshot_delete_internal_sync", device="disk", name="s10", force=True)
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([require("nbdcopy"), daemon.uri("s10"), "null:"], check=True, capture_output=True)
    assert copy(daemon.uri("s11"), tmp_path / "held.raw") == held["s11"]
    guest_io(daemon.uri("guest"), "write -P 9 1M 1M", "flush")
    assert daemon.stop() == 0
    assert qemu_img("check", image.path).returncode == 0
    qemu_img("snapshot", "-a", "s11", image.path)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image.path, tmp_path / "converted.raw")
    assert (tmp_path / "converted.raw").read_bytes() == held["s11"]
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "local-t-verify.state").unlink()


GENERIC = "GenericError"


UNSUPPORTED = "Block format 'null-co' used by device 'n' does not support internal snapshots"
ABSENT = "Snapshot with id '{}' and name '{}' does not exist on device 'image'"


def add_image(daemon: StorageDaemon, path: Path) -> None:
    file = {"driver": "file", "node-name": "file", "filename": str(path), "discard": "unmap"}
    daemon.qmp.add("qcow2", "image", file=file, discard="unmap")


def test_snapshots_are_made_and_deleted_as_by_qemu(
    any_daemon: StorageDaemon, new_image: NewImage, tmp_path: Path
) -> None:
    image = new_image("4M").write(0, 2_000_000)
    qmp = any_daemon.qmp
    add_image(any_daemon, image.path)
    qmp.add("null-co", "n", size=4096)
    qmp.export("image", "guest", writable=True)
    states = {}
    for number, name in enumerate(("monday", "tuesday", "3"), 1):
        guest_io(any_daemon.uri("guest"), f"write -P {number} 0 {number}M", "flush")
        states[name] = copy(any_daemon.uri("guest"), tmp_path / "now.raw")
        qmp.execute("blockdev_snapshot_internal_sync", device="image", name=name)
    guest_io(any_daemon.uri("guest"), "write -P 9 0 4M", "flush")
    create, delete = "blockdev_snapshot_internal_sync", "blockdev_snapshot_delete_internal_sync"
    for command, arguments, text in [
        (create, {"device": "image", "name": "monday"}, "Snapshot with name 'monday' already exists on device 'image'"),
        (create, {"device": "image", "name": ""}, "Name is empty"),
        (create, {"device": "absent", "name": "x"}, "Cannot find device='absent' nor node-name='absent'"),
        (create, {"device": "file", "name": "x"}, "Need a root block node"),
        (create, {"device": "n", "name": "x"}, UNSUPPORTED),
        (delete, {"device": "image"}, "Name or id must be provided"),
        (delete, {"device": "image", "id": "9"}, ABSENT.format("9", "null")),
        (delete, {"device": "image", "id": "1", "name": "x"}, ABSENT.format("1", "x")),
        (delete, {"device": "n", "name": "x"}, "Failed to get a snapshot list: Operation not supported"),
    ]:  # fmt: skip
        assert qmp.refusal(command, **arguments) == (GENERIC, text)
    deleted = qmp.execute(delete, device="image", name="tuesday")
    assert (deleted["id"], deleted["name"], deleted["vm-state-size"]) == ("2", "tuesday", 0)
    (node,) = [node for node in qmp.execute("query_named_block_nodes") if node["node-name"] == "image"]
    assert [(each["id"], each["name"]) for each in node["image"]["snapshots"]] == [("1", "monday"), ("3", "3")]
    assert any_daemon.stop() == 0
    qemu_img("check", image.path)
    assert [each["name"] for each in qemu_info(image.path)["snapshots"]] == ["monday", "3"]
    for name in ("monday", "3"):
        raw = tmp_path / "was.raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", "-l", f"snapshot.name={name}", image.path, raw)
        assert raw.read_bytes() == states[name]


def test_a_snapshot_of_a_busy_disk_is_one_moment_of_it(
    start_daemon: StartDaemon, new_image: NewImage, tmp_path: Path
) -> None:
    image = new_image("2M")
    daemon = start_daemon()
    add_image(daemon, image.path)
    daemon.qmp.export("image", "guest", writable=True)
    with Client.connect(daemon.uri("guest")) as guest:
        guest.go("guest")
        with sweeping(guest):
            for turn in range(6):
                name = f"s{turn}"
                daemon.qmp.execute("blockdev_snapshot_internal_sync", device="image", name=name)
                daemon.qmp.add("snapshot-access", name, file="image", snapshot=name)
                daemon.qmp.export(name)
                seen = [copy(daemon.uri(name), tmp_path / "was.raw") for _ in range(2)]
                assert seen[0] == seen[1]
                assert_one_moment(seen[0])
    assert daemon.stop() == 0
    qemu_img("check", image.path)


def test_a_snapshot_that_is_read_is_deleted_by_force_only_and_its_reader_gets_errors(
    start_daemon: StartDaemon, new_image: NewImage
) -> None:
    image = new_image("1M").write(0, MiB, 5).snapshot("monday").write(0, MiB, 6)
    daemon = start_daemon()
    qmp = daemon.qmp
    add_image(daemon, image.path)
    qmp.add("snapshot-access", "monday", file="image", snapshot="monday")
    qmp.export("monday")
    qmp.export("image", "guest", writable=True)
    with Client.connect(daemon.uri("monday")) as reader:
        reader.go("monday")
        assert reader.pread(0, 4096) == b"\5" * 4096
        refused = qmp.refusal("blockdev_snapshot_delete_internal_sync", device="image", name="monday")
        assert refused[0] == GENERIC
        assert "in use by 1 reader" in refused[1]
        assert reader.pread(65536, 4096) == b"\5" * 4096
        qmp.execute("blockdev_snapshot_delete_internal_sync", device="image", name="monday", force=True)
        guest_io(daemon.uri("guest"), "write -P 7 0 1M", "flush")
        with pytest.raises(NBDError, match="deleted"):
            reader.pread(0, 4096)
    with Client.connect(daemon.uri("monday")) as again:
        again.go("monday")
        with pytest.raises(NBDError, match="deleted"):
            again.pread(0, 4096)
    assert daemon.stop() == 0
    qemu_img("check", image.path)


def test_what_is_read_only_has_no_snapshots_made(daemon: StorageDaemon, new_image: NewImage) -> None:
    image = new_image("1M").snapshot("monday")
    daemon.qmp.add("qcow2", "image", file={"driver": "file", "filename": str(image.path)}, read_only=True)
    refused = daemon.qmp.refusal("blockdev_snapshot_internal_sync", device="image", name="x")
    assert refused == (GENERIC, "Device 'image' is read only")
    refused = daemon.qmp.refusal("blockdev_snapshot_delete_internal_sync", device="image", name="monday")
    assert refused == (GENERIC, "Device 'image' is read only")
