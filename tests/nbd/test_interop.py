"""Other people's clients on real images: each reads the bytes that the manifest of the fixtures has recorded.

The images have snapshots of several sizes, tails of no round size, VM states, compressed clusters, backing chains,
extended L2 entries and small clusters. One server exports all that is in an image.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.nbd.serving import Serving
from tests.nbd.support import run
from tests.support import FixtureImage, Image, Library, qemu_img, require
from tests.support.waiting import until

IMAGES = [
    "demo",  # three sizes and a VM state
    "unaligned",  # sizes of no whole sector
    "compressed-mixed",
    "zstd-4096",
    "backing-chain",
    "backing-raw-longer",  # a snapshot that is shorter than the disk
    "extended-l2-backed",
    "cluster-4k",
    "vm-state-grown",
]
SYSTEM_PYTHON = "/usr/bin/python3"  # the one that Debian's python3-libnbd is for


class Exported(NamedTuple):
    """What is recorded of an export."""

    name: str
    size: int
    sha256: str
    uri: str

    def is_in(self, file: Path) -> bool:
        """A copy of it, which a client that counts in sectors has made longer."""
        content = file.read_bytes()
        assert not any(content[self.size :])
        assert len(content) - self.size < 512
        return hashlib.sha256(content[: self.size]).hexdigest() == self.sha256


def recorded(image: FixtureImage) -> Iterator[tuple[str, int, str]]:
    yield "", image.active.size, image.active.sha256
    for snapshot in image.snapshots:
        yield snapshot.name.decode(), snapshot.content.size, snapshot.content.sha256
    for snapshot in image.snapshots:
        if snapshot.vm_state_size:
            assert snapshot.vm_state_sha256 is not None
            yield f"vmstate:{snapshot.name.decode()}", snapshot.vm_state_size, snapshot.vm_state_sha256


@pytest.fixture(scope="module", params=IMAGES)
def served(
    request: pytest.FixtureRequest, library: Library, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Exported]]:
    """The exports of one image, being served on a Unix socket."""
    name = request.param
    socket = tmp_path_factory.mktemp("served") / "s"
    serving = Serving(library.path(name), "-k", socket)
    facts = list(recorded(library.images[name]))
    assert len(serving.uris) == len(facts)
    yield [Exported(*fact, uri) for fact, uri in zip(facts, serving.uris, strict=True)]
    assert serving.stop() == 0


def server_uri(served: list[Exported]) -> str:
    return served[0].uri


# libnbd.


def test_nbdinfo_lists_and_maps_every_export(served: list[Exported]) -> None:
    require("nbdinfo")
    listing = json.loads(run("nbdinfo", "--list", "--json", server_uri(served)))["exports"]
    assert [(each["export-name"], each["export-size"]) for each in listing] == [each[:2] for each in served]
    for each in listing:
        assert each["is_read_only"]
        assert each["can_multi_conn"]
        assert "base:allocation" in each["contexts"]
    for export in served:
        runs = json.loads(run("nbdinfo", "--map", "--json", export.uri))
        assert sum(each["length"] for each in runs) == export.size


@pytest.mark.parametrize(
    "options",
    [
        ["--connections=1", "--requests=1"],
        ["--connections=4", "--threads=4", "--request-size=65536"],
        ["--allocated", "--no-extents"],
        ["--synchronous", "--request-size=4096"],
    ],
    ids=" ".join,
)
def test_nbdcopy_copies_every_export(served: list[Exported], tmp_path: Path, options: list[str]) -> None:
    require("nbdcopy")
    for export in served:
        run("nbdcopy", *options, export.uri, tmp_path / "copy")
        assert export.is_in(tmp_path / "copy"), export.name
        assert (tmp_path / "copy").stat().st_size == export.size


NBDSH = """
import hashlib
size, seen, step = h.get_size(), hashlib.sha256(), 50_001
buffers = [nbd.Buffer(min(step, size - start)) for start in range(0, size, step)]
cookies = [h.aio_pread(buffer, number * step) for number, buffer in enumerate(buffers)]
for cookie in cookies:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
for buffer in buffers:
    seen.update(buffer.to_bytearray())
print(size, seen.hexdigest())
"""


def test_nbdsh_reads_with_all_requests_in_flight(served: list[Exported]) -> None:
    require("nbdsh")
    for export in served:  # nbdsh is `python3 -m nbd`, of whichever Python comes first
        assert run(SYSTEM_PYTHON, "-m", "nbd", "-u", export.uri, "-c", NBDSH).split() == [
            str(export.size),
            export.sha256,
        ], export.name


LIBNBD = """
import hashlib, nbd, sys, urllib.parse
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(sys.argv[1])
names = []
h.opt_list(lambda name, description: names.append(name))
h.opt_abort()
for name in names:
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.set_export_name(name)
    h.connect_uri(sys.argv[1].replace("/?", "/" + urllib.parse.quote(name, safe="") + "?"))
    size, at, runs = h.get_size(), 0, []
    content = bytearray().join(h.pread(min(1 << 25, size - at), at) for at in range(0, size, 1 << 25))
    while at < size:
        seen = []
        h.block_status(min(size - at, 1 << 30), at, lambda context, offset, entries, error: seen.extend(entries))
        for length, flags in zip(seen[::2], seen[1::2]):
            assert not flags & 2 or not any(content[at : at + length]), "zeros that are none"
            at += length
    assert at == size, "more than was asked for"
    print(size, hashlib.sha256(content).hexdigest())
"""


def test_python_libnbd_lists_reads_and_finds_zeros_where_it_is_told_of_zeros(served: list[Exported]) -> None:
    if run(SYSTEM_PYTHON, "-c", "import nbd; print('yes')", check=False) != "yes\n":
        pytest.skip("python3-libnbd is not installed")
    said = run(SYSTEM_PYTHON, "-c", LIBNBD, server_uri(served)).splitlines()
    assert said == [f"{export.size} {export.sha256}" for export in served]


def test_nbdfuse_shows_an_export_as_a_file(served: list[Exported], tmp_path: Path) -> None:
    program = require("nbdfuse")
    can_mount = os.geteuid() == 0 or shutil.which("fusermount3")
    if not (os.access("/dev/fuse", os.R_OK | os.W_OK) and can_mount):
        pytest.skip("this machine lets us mount nothing with FUSE")
    for export in (served[0], served[-1]):
        mounted = tmp_path / "mounted"
        mounted.touch()
        process = subprocess.Popen([program, "-r", mounted, export.uri])
        try:
            assert until(lambda mounted=mounted, export=export: mounted.stat().st_size == export.size)
            assert export.is_in(mounted), export.name
        finally:
            subprocess.run(["fusermount3", "-u", mounted] if shutil.which("fusermount3") else ["umount", mounted])
            process.wait(20)


# QEMU.


def test_qemu_img_tells_converts_maps_and_compares(served: list[Exported], tmp_path: Path) -> None:
    require("qemu-img")
    for export in served:
        target = {"driver": "nbd", "export": export.name, "server": {"type": "unix", "path": socket_of(export)}}
        image = f"json:{json.dumps({'driver': 'raw', 'file': target})}"
        rounded = -(-export.size // 512) * 512  # QEMU counts in sectors
        assert json.loads(run("qemu-img", "info", "--output=json", image))["virtual-size"] == rounded
        for options in ([], ["-m", "16", "-W"]):
            run("qemu-img", "convert", *options, "-O", "raw", image, tmp_path / "copy")
            assert export.is_in(tmp_path / "copy"), export.name
        runs = json.loads(run("qemu-img", "map", "--output=json", image))
        assert sum(each["length"] for each in runs) == rounded
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, tmp_path / "copy")


def test_qemu_io_reads_any_sectors(served: list[Exported], tmp_path: Path) -> None:
    require("qemu-io")
    export = served[1]
    run("nbdcopy", export.uri, tmp_path / "copy")
    assert export.is_in(tmp_path / "copy")
    content = (tmp_path / "copy").read_bytes()
    for offset in (0, 4096, export.size // 1024 * 512, (export.size - 1024) // 512 * 512):
        dump = run("qemu-io", "-r", "-f", "raw", "-c", f"read -v {offset} 512", export.uri)
        rows = [line[11:58] for line in dump.splitlines() if line[8:11] == ":  "]
        assert bytes.fromhex(" ".join(rows)) == content[offset : offset + 512]


def socket_of(export: Exported) -> str:
    return export.uri.partition("socket=")[2]


# Others.


def test_nbdkit_passes_every_export_on(served: list[Exported], tmp_path: Path) -> None:
    require("nbdkit")
    for export in served:
        target = [f"socket={socket_of(export)}", f"export={export.name}"]
        copying = f'nbdcopy "$uri" {tmp_path / "copy"}'
        run("nbdkit", "-U", "-", "-r", "nbd", *target, "shared=true", "--run", copying)
        assert export.is_in(tmp_path / "copy"), export.name


@pytest.fixture
def served_over_tcp(library: Library) -> Iterator[tuple[FixtureImage, str]]:
    """An image, and the port that it is served on."""
    serving = Serving(library.path("demo"), "-p", "0")
    yield library.images["demo"], serving.uris[0].rpartition(":")[2].strip("/")
    assert serving.stop() == 0


def test_nbdkit_passes_exports_on_over_tcp(served_over_tcp: tuple[FixtureImage, str], tmp_path: Path) -> None:
    require("nbdkit")
    image, port = served_over_tcp
    for name, size, sha256 in recorded(image):
        target = ["hostname=127.0.0.1", f"port={port}", f"export={name}"]
        run("nbdkit", "-U", "-", "-r", "nbd", *target, "--run", f'nbdcopy "$uri" {tmp_path / "copy"}')
        assert Exported(name, size, sha256, "").is_in(tmp_path / "copy"), name


def test_nbd_client_lists_the_exports(served_over_tcp: tuple[FixtureImage, str]) -> None:
    program = require("nbd-client")
    image, port = served_over_tcp
    listing = run(program, "-l", "127.0.0.1", "-p", port, check=False)
    for name, _, _ in recorded(image):
        assert re.search(rf"^{re.escape(name)}: .*(disk|state)", listing, re.MULTILINE), name


def test_fio_reads_at_depth_64_and_every_block_has_its_checksum(tmp_path: Path) -> None:
    """fio writes blocks with checksums to a disk; a snapshot of it is what fio then reads, 64 at a time."""
    require("fio")
    common = [
        "--name=verified",
        "--size=8M",
        "--bs=4k",
        "--verify=crc32c",
        "--randseed=1",
        "--verify_state_save=0",
        "--minimal",
    ]
    run("fio", *common, "--filename", tmp_path / "disk.raw", "--ioengine=psync", "--rw=randwrite", "--do_verify=0")
    qemu_img("convert", "-O", "qcow2", "-o", "cluster_size=4096", tmp_path / "disk.raw", tmp_path / "disk.qcow2")
    image = Image(tmp_path / "disk.qcow2").snapshot("monday").write(0, 4 << 20)
    serving = Serving(image.path, "-k", tmp_path / "s")
    reading = ["--ioengine=nbd", "--iodepth=64", "--rw=randread", "--loops=3"]
    active, monday = serving.uris
    run("fio", *common, *reading, f"--uri={monday}")
    with pytest.raises(AssertionError, match="verify"):  # of the active disk, half was overwritten since
        run("fio", *common, *reading, f"--uri={active}")
    assert serving.stop() == 0


# A guest.

MACHINE = ["-machine", "pc", "-accel", "tcg", "-m", "16", "-display", "none", "-nodefaults", "-no-reboot"]
MESSAGE = 1 << 20  # where on the disk the message lies
SECTORS = 8

# Read SECTORS sectors by the BIOS, print them to the debug console up to a NUL, and end the machine.
BOOT_SECTOR = bytes.fromhex(
    "31c0 8ed8"  # xor ax, ax; mov ds, ax
    "fc be207c"  # cld; mov si, 0x7c20: what to read, and where to
    "b442 cd13"  # mov ah, 0x42; int 0x13: extended read from the drive that we came from, dl
    "720c be0080"  # jc end; mov si, 0x8000
    "ac 84c0 7404"  # next: lodsb; test al, al; jz end
    "e6e9 ebf7"  # out 0xe9, al; jmp next
    "b031 e6f4 f4"  # end: mov al, 0x31; out 0xf4, al; hlt
).ljust(32, b"\0") + struct.pack("<BBHHHQ", 16, 0, SECTORS, 0x8000, 0, MESSAGE // 512)


@pytest.mark.parametrize("drive", ["if=virtio,readonly=on", "if=ide,snapshot=on"])
def test_a_guest_boots_from_a_snapshot(new_image: Callable[..., Image], tmp_path: Path, drive: str) -> None:
    """`snapshot=on` is QEMU's own: writes go to a temporary file, so that the guest's disk may be written."""
    program = require("qemu-system-x86_64")
    said = {name: os.urandom(SECTORS * 256 - 20).hex().encode() for name in ("monday", "tuesday")}
    boot, source = tmp_path / "boot", tmp_path / "message"
    boot.write_bytes(BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa")
    image = new_image("4M", cluster_size=512).io(f"write -s {boot} 0 512")
    for name, message in said.items():
        source.write_bytes(message.ljust(SECTORS * 512, b"\0"))
        image.io(f"write -s {source} {MESSAGE} {SECTORS * 512}").snapshot(name)
    image.write(0, 2 << 20)  # the active disk does not boot
    serving = Serving(image.path, "-k", tmp_path / "s")
    for uri, message in zip(serving.uris[1:], said.values(), strict=True):
        command = [program, *MACHINE]
        command += ["-drive", f"file={uri},format=raw,{drive}"]
        command += ["-debugcon", f"file:{tmp_path / 'console'}", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0x31 << 1 | 1, done.stderr
        assert (tmp_path / "console").read_bytes() == message
    assert serving.stop() == 0
