"""A graph that changes while its exports are in use: fleecings that begin and end, and what is refused meanwhile."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from qcow2snap.nbd.client import Client
from tests.block.test_image_lock import qemu_io_holding
from tests.daemon.busy_guest import assert_one_moment, sweeping
from tests.daemon.conftest import StartDaemon
from tests.daemon.storage_daemon import OURS, Refused, StorageDaemon
from tests.daemon.test_graphs import guest_io, read_snapshot
from tests.nbd.fleecing import SIZE
from tests.nbd.support import run
from tests.support import require

MiB = 1 << 20
GENERIC = "GenericError"


def new_temp(daemon: StorageDaemon, name: str) -> None:
    """A node of that name, to copy to."""
    path = daemon.directory / f"{name}.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    daemon.qmp.add("raw", name, file={"driver": "file", "filename": str(path)})


def with_guest(daemon: StorageDaemon, disk: Path) -> Client:
    """A guest on the export `guest` of the raw node `top` over the node `disk`."""
    daemon.qmp.add("file", "disk", filename=str(disk))
    daemon.qmp.add("raw", "top", file="disk")
    daemon.qmp.export("top", "guest", writable=True)
    client = Client.connect(daemon.uri("guest"))
    client.go("guest")
    return client


def move(daemon: StorageDaemon, child: str) -> None:
    """Have `top` go by another node, as QEMU's daemon does it."""
    daemon.qmp.execute("blockdev_reopen", options=[{"driver": "raw", "node-name": "top", "file": child}])


def test_a_fleecing_begins_and_ends_under_a_guest(any_daemon: StorageDaemon, disk: Path, tmp_path: Path) -> None:
    qmp = any_daemon.qmp
    with with_guest(any_daemon, disk) as guest:
        guest.pwrite(0, b"\1" * MiB)
        before = disk.read_bytes()
        new_temp(any_daemon, "temp")
        qmp.add("copy-before-write", "cbw", file="disk", target="temp")
        refused = qmp.refusal("blockdev_add", driver="snapshot-access", node_name="access", file="cbw")
        assert refused[0] == GENERIC
        assert refused[1].startswith(
            "Permission conflict on node 'disk': permissions 'write' are both required by node"
        )
        move(any_daemon, "cbw")
        qmp.add("snapshot-access", "access", file="cbw")
        qmp.export("access")
        guest.pwrite(0, b"\2" * MiB)
        assert read_snapshot(any_daemon.uri("access"), tmp_path / "was.raw") == before
        qmp.execute("block_export_del", id="access", mode="hard")
        assert qmp.refusal("blockdev_del", node_name="cbw") == (GENERIC, "Block device cbw is in use")
        qmp.execute("blockdev_del", node_name="access")
        move(any_daemon, "disk")
        qmp.execute("blockdev_del", node_name="cbw")
        qmp.execute("blockdev_del", node_name="temp")
        guest.pwrite(MiB, b"\3" * MiB)
        assert guest.pread(0, 2 * MiB) == b"\2" * MiB + b"\3" * MiB
    assert disk.read_bytes() == b"\2" * MiB + b"\3" * MiB + before[2 * MiB :]


def test_the_snapshot_is_of_the_moment_of_blockdev_add(daemon: StorageDaemon, disk: Path, tmp_path: Path) -> None:
    with with_guest(daemon, disk) as guest:
        guest.pwrite(0, b"\1" * MiB)
        before = disk.read_bytes()
        new_temp(daemon, "temp")
        daemon.qmp.add("copy-before-write", "cbw", file="disk", target="temp")
        guest.pwrite(0, b"\2" * MiB)  # goes past the filter, as far as anybody can see
        guest.write_zeroes(MiB, MiB)
        guest.trim(2 * MiB, MiB)
        move(daemon, "cbw")
        guest.pwrite(0, b"\3" * MiB)
        daemon.qmp.add("snapshot-access", "access", file="cbw")
        daemon.qmp.export("access")
        assert read_snapshot(daemon.uri("access"), tmp_path / "was.raw") == before


def test_an_export_is_moved_to_the_filter(daemon: StorageDaemon, disk: Path, tmp_path: Path) -> None:
    qmp = daemon.qmp
    qmp.add("file", "disk", filename=str(disk))
    qmp.export("disk", "guest", writable=True)
    before = disk.read_bytes()
    with Client.connect(daemon.uri("guest")) as guest:
        guest.go("guest")
        new_temp(daemon, "temp")
        qmp.add("copy-before-write", "cbw", file="disk", target="temp")
        guest.pwrite(0, b"\2" * MiB)
        qmp.execute("blockdev_replace", parent_type="export", export_id="guest", new_child="cbw")
        assert qmp.execute("query_block_exports")[0]["node-name"] == "cbw"
        guest.pwrite(MiB, b"\3" * MiB)
        qmp.add("snapshot-access", "access", file="cbw")
        qmp.export("access")
        assert read_snapshot(daemon.uri("access"), tmp_path / "was.raw") == before
        qmp.add("null-co", "small", size=4096)
        refused = qmp.refusal("blockdev_replace", parent_type="export", export_id="guest", new_child="small")
        assert "cannot take the place of" in refused[1]
        qmp.execute("block_export_del", id="access")
        qmp.execute("blockdev_del", node_name="access")
        qmp.execute("blockdev_replace", parent_type="export", export_id="guest", new_child="disk")
        qmp.execute("blockdev_del", node_name="cbw")
        guest.pwrite(0, b"\4" * 512)
    assert disk.read_bytes()[:1024] == b"\4" * 512 + b"\2" * 512


@pytest.mark.parametrize("over", ["disk", "first"])
def test_a_second_fleecing_does_not_disturb_the_first(
    daemon: StorageDaemon, disk: Path, tmp_path: Path, over: str
) -> None:
    qmp = daemon.qmp
    with with_guest(daemon, disk) as guest:
        new_temp(daemon, "temp1")
        guest.pwrite(0, b"\1" * MiB)
        at_first = disk.read_bytes()
        qmp.add("copy-before-write", "first", file="disk", target="temp1")
        move(daemon, "first")
        guest.pwrite(0, b"\2" * (MiB // 2))
        qmp.add("snapshot-access", "access1", file="first")
        qmp.export("access1")
        at_second = disk.read_bytes()
        new_temp(daemon, "temp2")
        qmp.add("copy-before-write", "second", file=over, target="temp2")
        guest.pwrite(0, b"\3" * MiB)
        guest.pwrite(2 * MiB, b"\3" * MiB)
        if over == "first":
            move(daemon, "second")
        else:
            qmp.execute("blockdev_replace", parent_type="driver", node_name="first", child="file", new_child="second")
        guest.pwrite(0, b"\4" * (2 * MiB))
        qmp.add("snapshot-access", "access2", file="second")
        qmp.export("access2")
        for _ in range(2):
            assert read_snapshot(daemon.uri("access1"), tmp_path / "first.raw") == at_first
            assert read_snapshot(daemon.uri("access2"), tmp_path / "second.raw") == at_second
            guest.pwrite(3 * MiB, b"\5" * MiB)
        assert guest.pread(0, 4) == b"\4" * 4


def test_each_fleecing_is_a_state_that_the_disk_had_while_a_guest_writes_without_a_pause(
    daemon: StorageDaemon, disk: Path, tmp_path: Path
) -> None:
    qmp = daemon.qmp
    with with_guest(daemon, disk) as guest, sweeping(guest):
        for turn in range(8):
            temp, cbw, access = f"temp{turn}", f"cbw{turn}", f"access{turn}"
            new_temp(daemon, temp)
            qmp.add("copy-before-write", cbw, file="disk", target=temp)
            move(daemon, cbw)
            qmp.add("snapshot-access", access, file=cbw)
            qmp.export(access)
            seen = [read_snapshot(daemon.uri(access), tmp_path / "was.raw") for _ in range(2)]
            assert seen[0] == seen[1]
            assert_one_moment(seen[0])
            qmp.execute("block_export_del", id=access, mode="hard")
            qmp.execute("blockdev_del", node_name=access)
            move(daemon, "disk")
            qmp.execute("blockdev_del", node_name=cbw)
            qmp.execute("blockdev_del", node_name=temp)


def test_writers_who_would_destroy_a_snapshot_are_refused(any_daemon: StorageDaemon, disk: Path) -> None:
    qmp = any_daemon.qmp
    qmp.add("file", "disk", filename=str(disk))
    new_temp(any_daemon, "temp")
    qmp.add("copy-before-write", "cbw", file="disk", target="temp")
    qmp.export("cbw", "guest", writable=True)
    text = (
        "Permission conflict on node 'disk': permissions 'write' are both required by an unnamed block device (uses "
        "node 'disk' as 'root' child) and unshared by node 'cbw' (uses node 'disk' as 'file' child)."
    )
    assert qmp.refusal("block_export_add", type="nbd", id="e", node_name="disk", writable=True) == (GENERIC, text)
    qmp.export("disk", "reader")  # who only reads may
    assert qmp.refusal("blockdev_del", node_name="disk") == (GENERIC, "Node disk is in use")
    assert qmp.refusal("blockdev_del", node_name="temp") == (GENERIC, "Block device temp is in use")


def test_the_target_of_a_filter_is_its_own(daemon: StorageDaemon, disk: Path) -> None:
    """QEMU lets others write there, and reads back what they wrote as what the disk was."""
    qmp = daemon.qmp
    qmp.add("file", "disk", filename=str(disk))
    new_temp(daemon, "temp")
    qmp.add("copy-before-write", "cbw", file="disk", target="temp")
    for command in (
        {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "temp", "writable": True}},
        {"execute": "blockdev-add", "arguments": {"driver": "copy-before-write", "node-name": "second", "file": "disk",
                                                  "target": "temp"}},
    ):  # fmt: skip
        assert "Permission conflict on node 'temp'" in qmp.answer(command)["error"]["desc"]


def test_a_file_is_locked_while_it_is_used_and_no_longer(any_daemon: StorageDaemon, disk: Path) -> None:
    qmp = any_daemon.qmp
    qmp.add("file", "disk", filename=str(disk))
    guest_io(str(disk), "write -P 1 0 4k")  # a node that nobody uses keeps nobody out
    new_temp(any_daemon, "temp")
    qmp.add("copy-before-write", "cbw", file="disk", target="temp")
    with qemu_io_holding(disk, "-f", "raw"):
        refused = qmp.refusal("block_export_add", type="nbd", id="guest", node_name="cbw", writable=True)
        assert refused[0] == GENERIC
        assert refused[1].startswith('Failed to get shared "write" lock')
        assert qmp.execute("query_block_exports") == []
    for _ in range(2):
        qmp.export("cbw", "guest", writable=True)
        words = [require("qemu-io"), "-f", "raw", "-c", "write 0 4k", str(disk)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert 'Failed to get "write" lock' in done.stderr
        qmp.execute("block_export_del", id="guest")
        guest_io(str(disk), "write -P 2 0 4k")


# Commands that fail at their last step, and what is then not to be seen of them.
FAILURES = [
    ("blockdev-add", {"driver": "raw", "node-name": "n", "offset": 1 << 40, "size": 512,
                      "file": {"driver": "file", "node-name": "inner", "filename": "{disk}"}}),
    ("blockdev-add", {"driver": "raw", "node-name": "top", "file": {"driver": "file", "filename": "{disk}"}}),
    ("blockdev-add", {"driver": "copy-before-write", "node-name": "n", "file": "absent", "target": "small"}),
    ("blockdev-add", {"driver": "file", "node-name": "n", "filename": "/dev/null/absent"}),
    ("blockdev-add", {"driver": "qcow2", "node-name": "n", "file": "other"}),
    ("blockdev-add", {"driver": "raw", "node-name": "n", "file": "disk", "surprise": True}),
    ("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "top", "file": "other"},
                                     {"driver": "raw", "node-name": "absent", "file": "disk"}]}),
    ("blockdev-reopen", {"options": [{"driver": "file", "node-name": "top", "filename": "x"}]}),
    ("blockdev-reopen", {"options": [{"driver": "raw", "file": "disk"}]}),
    ("blockdev-del", {"node-name": "disk"}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "top", "name": "guest"}),
]  # fmt: skip


# QEMU takes a target that is too small, and fails when it is written.
OUR_FAILURES = [
    ("blockdev-add", {"driver": "copy-before-write", "node-name": "n", "file": "disk", "target": "small"}),
    ("blockdev-add", {"driver": "snapshot-access", "node-name": "n", "file": "disk"}),
    ("blockdev-replace", {"parent-type": "driver", "node-name": "top", "child": "file", "new-child": "small"}),
    ("blockdev-replace", {"parent-type": "driver", "node-name": "top", "child": "backing", "new-child": "other"}),
    ("blockdev-replace", {"parent-type": "export", "export-id": "absent", "new-child": "other"}),
]


def test_a_command_that_fails_has_changed_nothing(any_daemon: StorageDaemon, disk: Path) -> None:
    qmp = any_daemon.qmp
    new_temp(any_daemon, "other")
    qmp.add("null-co", "small", size=4096)
    with with_guest(any_daemon, disk) as guest:
        open_files = _open_files(any_daemon)
        before = qmp.execute("query_named_block_nodes", flat=True), qmp.execute("query_block_exports")
        for command, arguments in FAILURES + (OUR_FAILURES if any_daemon.which == OURS else []):
            answer = qmp.answer(f'{{"execute": "{command}", "arguments": {_filled(arguments, disk)}}}')
            assert answer.get("error", {}).get("class") == GENERIC, (command, arguments, answer)
        after = qmp.execute("query_named_block_nodes", flat=True), qmp.execute("query_block_exports")
        assert after == before
        assert _open_files(any_daemon) == open_files
        guest.pwrite(0, b"\7" * 512)
        assert guest.pread(0, 512) == b"\7" * 512
    assert disk.read_bytes()[:512] == b"\7" * 512


def _filled(arguments: object, disk: Path) -> str:
    return json.dumps(arguments).replace("{disk}", str(disk))


def _open_files(daemon: StorageDaemon) -> list[str]:
    directory = Path(f"/proc/{daemon.process.pid}/fd")
    return sorted(str(entry.readlink()) for entry in directory.iterdir() if str(entry.readlink()).startswith("/"))


def test_cycles_and_what_could_not_be_noticed_are_refused(daemon: StorageDaemon, disk: Path) -> None:
    qmp = daemon.qmp
    with with_guest(daemon, disk):
        qmp.add("raw", "above", file="top")
        with pytest.raises(Refused, match="cycle"):
            move(daemon, "above")
        qmp.add("null-co", "large", size=SIZE * 2)
        with pytest.raises(Refused, match="would not learn of it"):
            move(daemon, "large")
    qmp.execute("block_export_del", id="guest", mode="hard")
    qmp.add("raw", "fixed", read_only=True, file={"driver": "file", "filename": str(disk), "read-only": True})
    qmp.export("fixed")
    qmp.add("file", "same", filename=str(disk), read_only=True)
    options = {"driver": "raw", "node-name": "fixed", "read-only": True, "file": "same"}
    assert "cannot be changed" in qmp.refusal("blockdev_reopen", options=[options])[1]
    assert run("nbdinfo", "--size", daemon.uri("fixed")) == f"{SIZE}\n"


def test_an_image_that_another_process_writes_is_read_with_force_share_only(
    start_daemon: StartDaemon, disk: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image.qcow2"
    run(require("qemu-img"), "create", "-q", "-f", "qcow2", image, "1M")
    daemon = start_daemon()
    options = {"driver": "qcow2", "node_name": "image", "read_only": True}
    file = {"driver": "file", "filename": str(image)}
    with qemu_io_holding(image):
        refused = daemon.qmp.refusal("blockdev_add", **options, file=file)
        assert refused[1].startswith('Failed to get shared "write" lock')
        daemon.qmp.execute("blockdev_add", **options, file=file, force_share=True)
    daemon.qmp.export("image")
    assert run("nbdinfo", "--size", daemon.uri("image")) == f"{MiB}\n"
