"""One command line and the same requests, through QEMU's daemons and ours: bytes, errors, sizes and block status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NewImage
from tests.daemon.conftest import StartDaemon
from tests.daemon.storage_daemon import NEWER_QEMU, OURS, QEMU, StorageDaemon
from tests.nbd.fleecing import SIZE, libnbd
from tests.nbd.support import run
from tests.support import qemu_img, require

# What guest and backup do, and what comes of it. Reads of the backup stay in one cluster, and none is structured: more
# at once QEMU 7.2 reads wrongly. What is given back is a whole cluster: of a part of one, its daemon dies.
SCHEDULE = """
import hashlib, json, random, sys
import nbd
guest, backup, asking, mapping = nbd.NBD(), nbd.NBD(), nbd.NBD(), nbd.NBD()
backup.set_request_structured_replies(False)
for handle in asking, mapping:
    handle.add_meta_context("base:allocation")
where = sys.argv[1]
for handle, name in ((guest, "guest"), (backup, "backup"), (asking, "backup"), (mapping, "guest")):
    handle.connect_uri(f"nbd+unix:///{name}?socket={where}")
choose = random.Random(int(sys.argv[2]))
size, cluster = guest.get_size(), 1 << 16
said = [size, backup.get_size(), guest.is_read_only(), guest.can_trim(), guest.can_zero(), guest.can_fua(),
        guest.can_multi_conn(), guest.can_flush(), guest.can_fast_zero(), guest.can_cache()]
for step in range(120):
    offset = choose.randrange(size // 512) * 512
    length = choose.randrange(1, min(4 * cluster, size - offset) // 512 + 1) * 512
    what = choose.choice(["write", "fua", "zero", "no hole", "trim", "read", "guest", "status", "map", "beyond",
                          *["give back", "write there"] * int(sys.argv[3])])
    result = None
    within = min(length, cluster - offset % cluster)
    try:
        if what == "write":
            guest.pwrite(bytes([step + 1]) * length, offset)
        elif what == "fua":
            guest.pwrite(bytes([step + 1]) * length, offset, nbd.CMD_FLAG_FUA)
        elif what == "zero":
            guest.zero(length, offset)
        elif what == "no hole":
            guest.zero(length, offset, nbd.CMD_FLAG_NO_HOLE)
        elif what == "trim":
            guest.trim(length, offset)
        elif what == "read":
            result = hashlib.sha256(backup.pread(within, offset)).hexdigest()
        elif what == "guest":
            result = hashlib.sha256(guest.pread(length, offset)).hexdigest()
        elif what == "status":
            found = []
            asking.block_status(within, offset, lambda c, o, entries, e: found.extend(entries))
            result = found
        elif what == "map":
            found = []
            mapping.block_status(length, offset, lambda c, o, entries, e: found.extend(entries))
            result = found
        elif what == "give back":
            backup.set_strict_mode(0)
            backup.trim(cluster, offset // cluster * cluster)
        elif what == "write there":
            backup.set_strict_mode(0)
            backup.pwrite(b"x" * 512, offset)
        elif what == "beyond":
            guest.set_strict_mode(0)
            guest.pread(512, size)
    except nbd.Error as error:
        result = error.errno or "failed"
    said.append([step, what, offset, length, result])
guest.flush()
print(json.dumps(said))
"""


def options(disk: Path, temp: Path, discard: str, access_writable: bool) -> list[str]:
    return [
        "--blockdev", f"driver=file,node-name=disk,filename={disk},discard={discard}",
        "--blockdev", f"driver=raw,node-name=temp,file.driver=file,file.filename={temp},discard={discard}",
        "--blockdev", f"driver=copy-before-write,node-name=cbw,file=disk,target=temp,discard={discard}",
        "--blockdev", f"driver=snapshot-access,node-name=access,file=cbw,discard={discard}",
        "--export", "type=nbd,id=guest,node-name=cbw,name=guest,writable=on",
        "--export", f"type=nbd,id=backup,node-name=access,name=backup,writable={'on' if access_writable else 'off'}",
    ]  # fmt: skip


def outcome(daemon: StorageDaemon, disk: Path, seed: int, may_trim: bool) -> list[Any]:
    """What clients were told, what is left on the disk, and what the monitor tells of it."""
    said = json.loads(libnbd(SCHEDULE, f"{daemon.directory}/nbd", str(seed), str(int(may_trim))))
    nodes = daemon.qmp.execute("query_named_block_nodes", flat=True)
    told = [
        [node["node-name"], node["drv"], node["ro"], node["image"]["virtual-size"], node["image"]["format"]]
        for node in nodes
        if not node["node-name"].startswith("#")
    ]
    exports = daemon.qmp.execute("query_block_exports")
    daemon.stop()
    return [*said, told, exports, disk.read_bytes().hex()]


@pytest.mark.parametrize(
    ("seed", "discard", "access_writable"), [(1, "unmap", True), (2, "unmap", False), (3, "ignore", True)]
)
def test_a_schedule_of_guest_and_backup_has_one_outcome(
    start_daemon: StartDaemon, disk: Path, tmp_path: Path, seed: int, discard: str, access_writable: bool
) -> None:
    content = disk.read_bytes()
    outcomes = {}
    for which in (QEMU, NEWER_QEMU, OURS):
        own, temp = tmp_path / "own.raw", tmp_path / "temp.raw"
        for path in (own, temp):
            path.unlink(missing_ok=True)
            with path.open("wb") as file:
                file.truncate(SIZE)
        run(require("cp"), "--sparse=always", disk, own)
        assert own.read_bytes() == content
        daemon = start_daemon(*options(own, temp, discard, access_writable), which=which)
        outcomes[which] = outcome(daemon, own, seed, access_writable)
    for other in (QEMU, NEWER_QEMU):
        for ours, theirs in zip(outcomes[OURS], outcomes[other], strict=True):
            assert ours == theirs, other


@pytest.mark.parametrize("other", [QEMU, NEWER_QEMU])
def test_an_image_looks_the_same_in_every_context_and_query(
    start_daemon: StartDaemon, other: str, new_image: NewImage
) -> None:
    base = new_image("2M").write(0, 500_000)
    image = new_image("2M", backing=base).write(65_536, 200_000).write_zeroes(1 << 20, 131_072)
    image.write(1_500_000, 60_000, 7, compressed=False).snapshot("monday")
    qemu_img("bitmap", "--add", image.path, "changes")
    image.write(300_000, 70_000)
    seen = {}
    for which in (OURS, other):
        daemon = start_daemon(
            "--blockdev", f"qcow2,node-name=image,read-only=on,file.driver=file,file.filename={image.path}",
            "--export", "nbd,id=image,node-name=image,bitmaps.0=changes,allocation-depth=on",
            which=which,
        )  # fmt: skip
        uri = daemon.uri("image")
        contexts = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:changes")
        maps = [run("nbdinfo", f"--map={context}", uri) for context in contexts]
        (node,) = [node for node in daemon.qmp.execute("query_named_block_nodes") if node["node-name"] == "image"]
        told = {
            name: node["image"].get(name) for name in ("virtual-size", "cluster-size", "backing-filename", "format")
        }
        told["snapshots"] = [
            {name: each.get(name) for name in ("id", "name", "vm-state-size", "date-sec", "date-nsec", "vm-clock-sec")}
            for each in node["image"]["snapshots"]
        ]
        told["specific"] = {
            name: node["image"]["format-specific"]["data"].get(name)
            for name in ("compat", "compression-type", "lazy-refcounts", "refcount-bits", "corrupt", "extended-l2")
        }
        told["bitmaps"] = [(each["name"], each["granularity"], each["count"]) for each in node["dirty-bitmaps"]]
        told["below"] = node["image"]["backing-image"]["filename"], node["image"]["backing-image"]["virtual-size"]
        assert set(node) - {"active"} >= {
            "node-name",
            "drv",
            "file",
            "ro",
            "cache",
            "detect_zeroes",
            "image",
            "encrypted",
        }
        seen[which] = (maps, told, sorted(set(node) - {"active"}))
        daemon.stop()
    assert seen[OURS] == seen[other]


def test_no_bitmap_is_shown_that_was_not_asked_for(start_daemon: StartDaemon, new_image: NewImage) -> None:
    image = new_image("1M")
    qemu_img("bitmap", "--add", image.path, "one")
    qemu_img("bitmap", "--add", image.path, "two")
    daemon = start_daemon(
        "--blockdev", f"qcow2,node-name=image,read-only=on,file.driver=file,file.filename={image.path}",
        "--export", "nbd,id=none,node-name=image,name=none",
        "--export", "nbd,id=one,node-name=image,name=one,bitmaps.0=one",
    )  # fmt: skip
    assert "dirty-bitmap" not in run("nbdinfo", daemon.uri("none"))
    said = run("nbdinfo", daemon.uri("one"))
    assert "qemu:dirty-bitmap:one" in said
    assert "two" not in said


def test_permissions_are_those_of_qemu_on_every_edge(
    start_daemon: StartDaemon, disk: Path, new_image: NewImage, tmp_path: Path
) -> None:
    """But for a filter's target, where QEMU lets others write. 7.2 read a filter's disk without the permission to."""
    image, temp = new_image(str(SIZE)), tmp_path / "temp.raw"
    temp.write_bytes(bytes(SIZE))
    seen = {}
    for which in (OURS, NEWER_QEMU):
        daemon = start_daemon(
            *options(disk, temp, "unmap", True),
            "--blockdev", f"file,node-name=f,filename={image.path}",
            "--blockdev", "qcow2,node-name=ro,read-only=on,file=f",
            "--blockdev", "raw,node-name=unused,file=ro",
            "--export", "nbd,id=ro,node-name=ro,name=ro",
            "--export", "nbd,id=reader,node-name=disk,name=reader",
            which=which,
        )  # fmt: skip
        steps = [edges(daemon)]
        for export in ("guest", "backup", "ro"):
            daemon.qmp.execute("block_export_del", id=export)
            steps.append(edges(daemon))
        daemon.stop()
        seen[which] = steps
    for ours, theirs in zip(seen[OURS], seen[NEWER_QEMU], strict=True):
        assert ours == theirs


def edges(daemon: StorageDaemon) -> list[tuple[Any, ...]]:
    graph = daemon.qmp.execute("x_debug_query_block_graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    return sorted(
        (
            "" if names[edge["parent"]].startswith("#") else names[edge["parent"]],
            "" if names[edge["child"]].startswith("#") else names[edge["child"]],
            edge["name"],
            sorted(edge["perm"]),
            sorted(edge["shared-perm"]),
        )
        for edge in graph["edges"]
        if edge["name"] != "target" and names[edge["parent"]] != "temp"
    )
