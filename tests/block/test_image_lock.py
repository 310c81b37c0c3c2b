"""QEMU and we refuse each other as QEMU's programs do among themselves. Each side is the real program."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2snap.block.file import FileNode, Locking
from qcow2snap.block.node import ImageInUse
from tests.conftest import NewImage
from tests.support import qemu_img, qemu_io, require


@contextmanager
def qemu_io_holding(path: Path, *options: str) -> Iterator[None]:
    """A qemu-io that has the image open, as a running VM has, until the block ends."""
    command = [require("qemu-io"), *options, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write("length\n")
        process.stdin.flush()
        assert process.stdout.readline()  # it has answered, so it has opened
        yield
    finally:
        process.communicate("quit\n", timeout=30)


@contextmanager
def vm_holding(path: Path, tmp_path: Path) -> Iterator[None]:
    """A real VM, stopped before its first instruction, with the image as its disk."""
    qmp = tmp_path / "qmp"
    command = [require("qemu-system-x86_64"), "-S", "-display", "none", "-nodefaults", "-accel", "tcg", "-m", "16"]
    command += ["-drive", f"file={path},format=qcow2,if=none,id=d", "-device", "virtio-blk-pci,drive=d"]
    command += ["-qmp", f"unix:{qmp},server=on,wait=on"]  # waits for us before it does anything
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    import socket
    import time

    try:
        with socket.socket(socket.AF_UNIX) as monitor:
            for _ in range(300):
                if qmp.exists():
                    break
                time.sleep(0.05)
            monitor.connect(str(qmp))
            assert b"QMP" in monitor.recv(65536)
            yield
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_an_image_that_qemu_writes_is_refused(new_image: NewImage) -> None:
    path = new_image("1M").path
    with qemu_io_holding(path), pytest.raises(ImageInUse, match="write"):
        FileNode(str(path))


def test_an_image_that_a_vm_has_open_is_refused(new_image: NewImage, tmp_path: Path) -> None:
    path = new_image("1M").path
    with vm_holding(path, tmp_path):
        for locking in (Locking.DATA, Locking.METADATA):
            with pytest.raises(ImageInUse):
                FileNode(str(path), locking=locking)


def test_force_share_reads_it_all_the_same_and_does_not_call_it_stable(new_image: NewImage) -> None:
    path = new_image("1M").path
    with qemu_io_holding(path):
        node = FileNode(str(path), locking=Locking.NONE)
        assert node.pread(0, 4) == b"QFI\xfb"
        assert not node.stable
        node.close()


def test_an_image_that_qemu_only_reads_is_shared(new_image: NewImage) -> None:
    path = new_image("1M").path
    with qemu_io_holding(path, "-r"):
        node = FileNode(str(path))
        assert node.stable
        node.close()


@pytest.mark.parametrize("locking", [Locking.DATA, Locking.METADATA])
def test_qemu_does_not_write_what_we_have_open(new_image: NewImage, locking: Locking) -> None:
    path = new_image("1M").path
    node = FileNode(str(path), locking=locking)
    result = qemu_io(path, "write 0 512", check=False)
    assert result.returncode != 0
    assert "lock" in result.stderr
    assert qemu_img("snapshot", "-c", "late", path, check=False).returncode != 0
    node.close()
    qemu_io(path, "write 0 512")


def test_qemu_reads_what_we_have_open(new_image: NewImage) -> None:
    path = new_image("1M").path
    node = FileNode(str(path))
    assert qemu_img("info", path).returncode == 0
    qemu_io(path, "read 0 512", options=("-r",))
    node.close()


def test_two_of_us_share_an_image(new_image: NewImage) -> None:
    path = new_image("1M").path
    first, second = FileNode(str(path)), FileNode(str(path))
    first.close()
    second.close()


def test_nothing_is_written_by_locking(new_image: NewImage) -> None:
    path = new_image("1M").path
    before = path.read_bytes(), path.stat().st_mtime_ns
    FileNode(str(path)).close()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
