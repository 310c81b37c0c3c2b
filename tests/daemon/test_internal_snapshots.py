"""Internal snapshots over QMP: the same answers as a running QEMU, made and deleted under a guest that writes."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NewImage
from tests.daemon.conftest import StartDaemon
from tests.daemon.test_graphs import guest_io
from tests.nbd.fleecing import copy
from tests.support import ToolFailed, qemu_img, require
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
    job = ["--name=t", "--ioengine=nbd", f"--uri={daemon.uri('guest')}", "--size=8m", "--rw=randwrite", "--iodepth=16"]
    job += ["--bsrange=512-64k", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--fsync=50", "--randseed=7"]
    fio = subprocess.Popen([require("fio"), *job], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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
