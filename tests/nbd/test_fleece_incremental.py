"""`qcow2snap fleece --bitmap` and `--changed-since`: what is not dirty is neither kept nor read, as QEMU has it."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.nbd.fleecing import CLUSTER, SIZE, Fleece, MiB, copy, libnbd
from tests.nbd.serving import Serving
from tests.nbd.support import run as output
from tests.support import qemu_img, qemu_io, require
from tests.support import run as cli
from tests.support.waiting import until

DIRTY = [(MiB + 4096, 4096), (3 * MiB, 2 * MiB), (SIZE - 4096, 4096)]
FORMS: dict[str, Callable[[int, int, bool], dict[str, Any]]] = {
    "nbdinfo": lambda start, length, dirty: {"offset": start, "length": length, "type": int(dirty)},
    "imageio": lambda start, length, dirty: {"start": start, "length": length, "dirty": dirty, "zero": False},
    "qemu-img": lambda start, length, dirty: {
        "start": start, "length": length, "depth": 0, "present": not dirty, "zero": False, "data": not dirty},
}  # fmt: skip


def extents(dirty: list[tuple[int, int]], size: int = SIZE) -> Iterator[tuple[int, int, bool]]:
    """All of a disk in turn, clean and dirty."""
    position = 0
    for start, length in [*dirty, (size, 0)]:
        if start > position:
            yield position, start - position, False
        if length:
            yield start, length, True
        position = start + length


# Reads and maps as a client sees them: what can be read, in steps of 4 KiB, and what is dirty.
LOOK = """
import json, sys, nbd
h = nbd.NBD()
h.add_meta_context(sys.argv[2])
h.connect_uri(sys.argv[1])
assert h.can_meta_context(sys.argv[2])
size, readable, dirty = h.get_size(), [], []
before = open(sys.argv[3], "rb").read()
for offset in range(0, size, 4096):
    length = min(4096, size - offset)
    try:
        readable.append(h.pread(length, offset) == before[offset : offset + length])
    except nbd.Error as error:
        readable.append(error.errno)
position = 0
while position < size:
    def told(context, offset, entries, error):
        global position
        if context == sys.argv[2]:
            for length, flags in zip(entries[::2], entries[1::2]):
                if flags & 1:
                    dirty.append([position, length])
                position += length
    h.block_status(size - position, position, told)
print(json.dumps([readable, dirty]))
"""


def look(uri: str, context: str, before: Path) -> tuple[list[object], list[list[int]]]:
    readable, dirty = json.loads(libnbd(LOOK, uri, context, str(before)))
    return readable, dirty


def in_clusters(dirty: list[tuple[int, int]]) -> set[int]:
    return {n for start, length in dirty for n in range(start // CLUSTER, -(-(start + length) // CLUSTER))}


@pytest.mark.parametrize("form", FORMS)
def test_only_what_the_extents_say_is_kept(fleece: Fleece, disk: Path, tmp_path: Path, form: str) -> None:
    before = tmp_path / "before.raw"
    before.write_bytes(disk.read_bytes())
    file = tmp_path / "monday.json"
    file.write_text(json.dumps([FORMS[form](*extent) for extent in extents(DIRTY)]))
    serving = fleece("--bitmap", file)
    output(require("qemu-io"), "-f", "raw", "-c", "write -P 1 0 8M", "-c", "write -P 1 8M 12k", serving.uris[0])
    readable, dirty = look(serving.uris[1], "qemu:dirty-bitmap:monday", before)
    assert [tuple(extent) for extent in dirty] == DIRTY
    kept = in_clusters(DIRTY)
    assert readable == [True if n * 4096 // CLUSTER in kept else "EINVAL" for n in range(-(-SIZE // 4096))]
    assert serving.stop() == 0
    assert "2.01 MiB of 8.01 MiB are dirty by qemu:dirty-bitmap:monday" in serving.stderr


@pytest.fixture
def image(disk: Path, tmp_path: Path) -> Path:
    """A qcow2 image over the raw disk (data_file), with a persistent bitmap of what was written to it since."""
    image = tmp_path / "disk:1.qcow2"
    content = disk.read_bytes()
    options = f"data_file={disk},data_file_raw=on"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, str(SIZE))
    disk.write_bytes(content)
    qemu_img("bitmap", "--add", "-g", "4096", image, "since:sunday")
    for start, length in DIRTY:
        qemu_io(image, f"write -P 9 {start} {length}")
    return image


def test_a_bitmap_of_a_qcow2_image_is_what_was_written_since(
    fleece: Fleece, disk: Path, image: Path, tmp_path: Path
) -> None:
    """Incremental, as it is done: the last backup, and what is dirty over it, are the disk."""
    now = disk.read_bytes()
    before = tmp_path / "now.raw"
    before.write_bytes(now)
    serving = fleece("--bitmap", f"{image}:since:sunday")
    output(require("qemu-io"), "-f", "raw", "-c", "write -P 1 2M 4M", serving.uris[0])
    readable, dirty = look(serving.uris[1], "qemu:dirty-bitmap:since:sunday", before)
    assert [tuple(extent) for extent in dirty] == DIRTY
    assert {n * 4096 // CLUSTER for n, is_right in enumerate(readable) if is_right is True} == in_clusters(DIRTY)


def test_what_is_no_bitmap_of_the_disk_is_refused(disk: Path, tmp_path: Path) -> None:
    other, same = tmp_path / "other.qcow2", tmp_path / "same.qcow2"
    for image, size in ((other, "1M"), (same, str(SIZE))):
        qemu_img("create", "-q", "-f", "qcow2", image, size)
        qemu_img("bitmap", "--add", image, "b")
    for what, message in {
        f"{other}:b": "of another disk",
        f"{same}:c": 'no dirty bitmap "c"',
        "b": "a raw disk has no bitmaps",
        "name=b": "a raw disk has no bitmaps",
        f"{disk}:b": "qcow2",
        str(same): "same.qcow2:NAME",
        str(tmp_path): "directory",
    }.items():
        result = cli("fleece", disk, "--target", tmp_path / "temp.raw", "-k", tmp_path / "s", "--bitmap", what)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1), what
        assert message in result.stderr
        assert not (tmp_path / "temp.raw").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "no list of extents"),
        ("[1]", "extent 0 has no start"),
        ('[{"start": -1, "length": 1, "dirty": true}]', "extent 0 has no start"),
        ('[{"start": 0, "length": 99999999, "dirty": true}]', "beyond the disk"),
        ('[{"start": 0, "length": 1}]', "do not say"),
        ('[{"start": 0, "length": 1, "dirty": true}, {"start": 1, "length": 1, "type": 1}]', "not all in one way"),
        ('[{"offset": 0, "length": 1, "type": 3, "description": "hole,zero"}]', '"hole,zero", not what is dirty'),
        ('[{"start": 0, "length": 1, "depth": 0, "present": true, "zero": false, "data": true}]', "may say that"),
    ],
)
def test_what_does_not_say_what_is_dirty_is_refused(disk: Path, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "extents.json"
    file.write_text(content)
    result = cli("fleece", disk, "--target", tmp_path / "temp.raw", "-k", tmp_path / "s", "--bitmap", file)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert message in result.stderr
    assert not (tmp_path / "temp.raw").exists()


def test_of_a_map_what_the_top_image_has_is_dirty(fleece: Fleece, disk: Path, tmp_path: Path) -> None:
    """An overlay has what was written since it was made."""
    overlay = tmp_path / "overlay.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", overlay)
    for start, length in DIRTY:
        qemu_io(overlay, f"write -P 9 {start} {length}")
    (tmp_path / "map.json").write_text(qemu_img("map", "--output=json", overlay).stdout)
    _, dirty = look(fleece("--bitmap", tmp_path / "map.json").uris[1], "qemu:dirty-bitmap:map", disk)
    assert in_clusters([(start, length) for start, length in dirty]) == in_clusters(DIRTY)


def test_what_a_diff_says_is_kept(fleece: Fleece, disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE + MiB))
    qemu_img("snapshot", "-c", "large", image)
    qemu_img("resize", "-q", "--shrink", image, str(SIZE))
    qemu_io(image, f"write {MiB} {CLUSTER}")
    (tmp_path / "diff.json").write_text(cli("diff", image, "large", "--json").stdout)
    _, dirty = look(fleece("--bitmap", tmp_path / "diff.json").uris[1], "qemu:dirty-bitmap:diff", disk)
    assert dirty == [[MiB, CLUSTER]]
    identical = tmp_path / "none.json"
    identical.write_text("[]")
    result = cli("fleece", disk, "--target", "t", "--bitmap", identical, "--bitmap", "name=none", "-k", "x")
    assert "two of --bitmap" in result.stderr


@pytest.fixture
def qemu_nbd(disk: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """QEMU's server of a writable qcow2 disk with a bitmap; gives its URI."""
    running = []

    def start() -> str:
        image, where = tmp_path / "remote.qcow2", tmp_path / "q"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, image)
        qemu_img("bitmap", "--add", "-g", "4096", image, "b0")
        for offset, length in DIRTY:
            qemu_io(image, f"write -P 9 {offset} {length}")
        command = [require("qemu-nbd"), "-t", "-e", "8", "-f", "qcow2", "-B", "b0", "-k", where, image]
        running.append(subprocess.Popen(command))

        def greets() -> bool:
            with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
                client.connect(str(where))
                return True
            return False

        until(greets)
        return f"nbd+unix:///?socket={where}"

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_a_remote_disk_tells_its_bitmap_itself(qemu_nbd: Callable[..., str], tmp_path: Path) -> None:
    disk = qemu_nbd()
    before = tmp_path / "before.raw"
    copy(disk, before)
    words = (disk, "--target", tmp_path / "temp.raw", "-k", tmp_path / "s")
    serving = Serving(*words, "--bitmap", "b0", command="fleece")
    output(require("qemu-io"), "-f", "raw", "-c", "write -P 1 0 8M", serving.uris[0])
    readable, dirty = look(serving.uris[1], "qemu:dirty-bitmap:b0", before)
    assert [tuple(extent) for extent in dirty] == DIRTY
    assert {n * 4096 // CLUSTER for n, is_right in enumerate(readable) if is_right is True} == in_clusters(DIRTY)
    assert serving.stop() == 0
    for option, what in (("--bitmap", "b1"), ("--changed-since", "monday")):
        result = cli("fleece", *words, option, what)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert "has no metadata context" in result.stderr


def test_a_backup_of_a_backup_is_limited_as_the_first(fleece: Fleece, disk: Path, tmp_path: Path) -> None:
    """nbdinfo's JSON of one export is what limits the next; and its names are those of all such contexts."""
    file = tmp_path / "b0.json"
    file.write_text(json.dumps([FORMS["imageio"](*extent) for extent in extents(DIRTY)]))
    first = fleece("--bitmap", file, "-v")
    listed = json.loads(output("nbdinfo", "--list", "--json", first.uris[1]))["exports"]
    contexts = {export["export-name"]: export["contexts"] for export in listed}
    assert "qemu:dirty-bitmap:b0" in contexts["backup"]
    assert "qemu:dirty-bitmap:b0" not in contexts["guest"]
    again = tmp_path / "again.json"
    again.write_text(output("nbdinfo", "--map=qemu:dirty-bitmap:b0", "--json", first.uris[1]))
    first.stop()
    _, dirty = look(fleece("--bitmap", again).uris[1], "qemu:dirty-bitmap:again", disk)
    assert [tuple(extent) for extent in dirty] == DIRTY


def test_reads_outside_are_as_in_qemus_graph(disk: Path, tmp_path: Path, fleece: Fleece) -> None:
    """The bitmap of a qcow2 disk limits QEMU's filter; extents of the same limit ours."""
    image, temp, where = tmp_path / "q.qcow2", tmp_path / "q-temp.raw", tmp_path / "q"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, image)
    qemu_img("bitmap", "--add", "-g", "4096", image, "b0")
    for offset, length in DIRTY:
        qemu_io(image, f"write -P 9 {offset} {length}")
        with disk.open("r+b") as file:
            file.seek(offset)
            file.write(b"\t" * length)
    temp.touch()
    os.truncate(temp, SIZE)
    nodes: list[dict[str, Any]] = [
        {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(image)}},
        {"driver": "file", "node-name": "temp", "filename": str(temp)},
        {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "temp",
         "bitmap": {"node": "disk", "name": "b0"}},
        {"driver": "snapshot-access", "node-name": "access", "file": "cbw"},
    ]  # fmt: skip
    command = [require("qemu-storage-daemon"), "--nbd-server", f"addr.type=unix,addr.path={where}"]
    for node in nodes:
        command += ["--blockdev", json.dumps(node)]
    command += ["--export", "type=nbd,id=guest,node-name=cbw,name=guest,writable=on"]
    command += ["--export", "type=nbd,id=backup,node-name=access,name=backup"]
    pid = tmp_path / "pid"
    qemu = subprocess.Popen([*command, "--pidfile", str(pid)])
    try:
        until(pid.exists)
        file = tmp_path / "b0.json"
        file.write_text(json.dumps([FORMS["nbdinfo"](*extent) for extent in extents(DIRTY)]))
        ours = fleece("--bitmap", file)
        said = []
        for guest, backup in ((f"nbd+unix:///guest?socket={where}", f"nbd+unix:///backup?socket={where}"), ours.uris):
            output(require("qemu-io"), "-f", "raw", "-c", "write -P 1 1M 4M", guest)
            said.append(libnbd(READS, backup))
        assert said[0] == said[1]
        assert "EINVAL" in said[0]
    finally:
        qemu.kill()
        qemu.wait()


# Reads that do not begin in one state and end in another: there QEMU 7.2 reads the wrong bytes.
READS = """
import hashlib, sys, nbd
h = nbd.NBD()
h.connect_uri(sys.argv[1])
for offset in range(0, h.get_size() // 65536 * 65536 + 1, 65536):
    try:
        print(hashlib.sha256(h.pread(min(65536, h.get_size() - offset), offset)).hexdigest())
    except nbd.Error as error:
        print(error.errno)
"""


def test_any_runs_are_told_and_cut_as_they_were_given() -> None:
    from qcow2snap.block.frozen_bitmap import FrozenBitmap

    choose = random.Random(1)
    for _ in range(200):
        size = choose.randrange(1, 300)
        given = sorted((start, choose.randrange(size - start + 1)) for start in choose.choices(range(size), k=8))
        plain = {n for start, length in given for n in range(start, start + length)}
        bitmap = FrozenBitmap(given, size)
        assert bitmap.count == len(plain)
        low, high = sorted((choose.randrange(size + 1), choose.randrange(size + 1)))
        runs = [*bitmap.dirty(low, high - low)]
        assert {n for start, length in runs for n in range(start, start + length)} == plain & {*range(low, high)}
        assert all(end[0] > start[0] + start[1] for start, end in pairwise(runs))
        assert all(length > 0 for _, length in runs)
