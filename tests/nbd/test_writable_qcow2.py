"""`serve --writable` of a qcow2 image: its active disk is written over NBD, its snapshots are read beside it."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import NewImage
from tests.nbd.serving import Serving
from tests.nbd.test_interop import SYSTEM_PYTHON
from tests.support import Image, qemu_img, qemu_io, require
from tests.support import run as cli
from tests.support.qemu_nbd import dirty_by_qemu, nbdinfo_map

SIZE = 8 << 20


@contextmanager
def serving(image: Path, *options: str) -> Iterator[Serving]:
    server = Serving("--writable", "-k", image.with_name("socket"), image, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            assert server.stop() == 0, server.stderr


def uri(image: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={image.with_name('socket')}"


def nbdsh(image: Path, script: str, export: str = "") -> str:
    """A script for libnbd's shell, with a connected handle `h`."""
    require("nbdsh")
    words = [SYSTEM_PYTHON, "-m", "nbd", "-u", uri(image, export), "-c", script]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def content_of(image: Path, export: str, directory: Path) -> bytes:
    raw = directory / "copy.raw"
    subprocess.run([require("nbdcopy"), uri(image, export), raw], check=True, timeout=60)
    return raw.read_bytes()


def test_a_disk_is_written_and_its_snapshots_stay(new_image: NewImage, tmp_path: Path) -> None:
    image = new_image(SIZE).write(0, 3 << 20).snapshot("monday").write(1 << 20, 1 << 20).snapshot("tuesday")
    path = image.path
    with serving(path):
        qemu_io_nbd(path, "write -P 9 500000 3000000", "write -zu 4M 1M", "discard 0 256k", "flush")
        for name in ("monday", "tuesday"):
            assert content_of(path, name, tmp_path) == image.reference(name).read()
        qemu_io_nbd(path, "read -P 9 500000 3000000", "read -P 0 4M 1M", "read -P 0 0 256k")
    qemu_img("check", "-q", path)
    qemu_io(path, "read -P 9 500000 3000000", "read -P 0 4M 1M", "read -P 0 0 256k", options=("-r",))
    for name in ("monday", "tuesday"):
        assert cli("extract", path, "-s", name, tmp_path / f"{name}.raw").returncode == 0
        assert (tmp_path / f"{name}.raw").read_bytes() == image.reference(name).read()


def qemu_io_nbd(path: Path, *commands: str) -> None:
    each = [argument for command in commands for argument in ("-c", command)]
    words = [require("qemu-io"), "-d", "unmap", "-f", "raw", *each, uri(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout


def test_dirty_bitmaps_are_offered_as_they_are_now_and_stored_at_the_end(new_image: NewImage) -> None:
    path, context = new_image(SIZE).path, "qemu:dirty-bitmap:b"
    qemu_img("bitmap", "--add", path, "b")
    with serving(path):
        assert nbdinfo_map(uri(path), context) == [(0, SIZE, 0)]
        qemu_io_nbd(path, "write 1M 64k", "discard 3M 1M")
        now = [(0, 1 << 20, 0), (1 << 20, 1 << 16, 1), ((1 << 20) + (1 << 16), (2 << 20) - (1 << 16), 0)]
        now += [(3 << 20, 1 << 20, 1), (4 << 20, 4 << 20, 0)]
        assert nbdinfo_map(uri(path), context) == now
    assert dirty_by_qemu(path, "b") == [(1 << 20, 1 << 16), (3 << 20, 1 << 20)]
    with serving(path) as server:
        qemu_io_nbd(path, "write 0 64k")
        server.process.kill()
        server.process.wait(20)
    (bitmap,) = qemu_img("info", "--output=json", path).json()["format-specific"]["data"]["bitmaps"]
    assert bitmap["flags"] == ["in-use", "auto"]  # what it holds is believed by nobody
    qemu_img("check", "-q", path)


def test_snapshots_are_read_only_beside_a_writable_disk(new_image: NewImage) -> None:
    path = new_image(SIZE).write(0, 65536).snapshot("s").path
    with serving(path):
        listed = json.loads(subprocess.check_output([require("nbdinfo"), "--list", "--json", uri(path)], timeout=60))
        read_only = {export["export-name"]: export["is_read_only"] for export in listed["exports"]}
        assert read_only == {"": False, "s": True}
        flags = nbdsh(path, "print(h.can_fua(), h.can_trim(), h.can_zero(), h.can_flush(), h.can_multi_conn())")
        assert flags.split() == ["True"] * 5


def test_what_was_flushed_is_there_after_kill_9(new_image: NewImage) -> None:
    path = new_image(SIZE, cluster_size=4096).write(0, 1 << 20).snapshot("s").path
    with serving(path) as server:
        script = """
for i in range(200):
    h.pwrite(bytes([i % 255 + 1]) * 9000, i * 20000)
h.flush()
h.pwrite(b"z" * 4096, 5 << 20, nbd.CMD_FLAG_FUA)
for i in range(200):
    h.pwrite(b"u" * 100, 6 * (1 << 20) + i * 5000)
"""
        nbdsh(path, script)
        server.process.kill()
        server.process.communicate(timeout=20)
    assert qemu_img("check", "-q", path, check=False).returncode in (0, 3)  # leaks at worst
    reads = [f"read -P {i % 255 + 1} {i * 20000} 9000" for i in range(200)]
    qemu_io(path, *reads, f"read -P {ord('z')} 5M 4096", options=("-r",))


def test_a_stopped_server_has_written_all_and_leaks_nothing(new_image: NewImage) -> None:
    path = new_image(SIZE, cluster_size=4096).write(0, 1 << 20).snapshot("s").path
    with serving(path) as server:
        nbdsh(path, "h.pwrite(b'q' * 3000000, 12345)")  # and no flush
        assert server.stop(signal.SIGTERM) == 0
    qemu_img("check", "-q", path)
    qemu_io(path, f"read -P {ord('q')} 12345 3000000", options=("-r",))


@pytest.mark.slow
def test_many_connections_write_side_by_side(new_image: NewImage, tmp_path: Path) -> None:
    path = new_image(SIZE, cluster_size=65536).write(0, 4 << 20).snapshot("s").path
    piece, connections = 512, 4
    with serving(path):
        failures: list[BaseException] = []

        def client(number: int) -> None:
            script = f"""
import random
chosen = random.Random({number})
for i in random.Random({number}).sample(range({SIZE // piece // connections}), 1500):
    h.pwrite(bytes([{number} + 1]) * {piece}, (i * {connections} + {number}) * {piece})
    if chosen.random() < 0.01: h.flush()
"""
            try:
                nbdsh(path, script)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=client, args=[number]) for number in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
    qemu_img("check", "-q", path)
    raw = tmp_path / "all.raw"
    qemu_img("convert", "-O", "raw", path, raw)
    data = raw.read_bytes()
    for number in range(connections):
        for i in random.Random(number).sample(range(SIZE // piece // connections), 1500):
            start = (i * connections + number) * piece
            assert data[start : start + piece] == bytes([number + 1]) * piece


def test_a_full_disk_is_enospc_and_the_image_stays_sound(tmp_path: Path) -> None:
    """The size of files is limited, which is what a full file system says, too."""
    image = Image.create(tmp_path / "disk.qcow2", SIZE, cluster_size=4096).write(0, 1 << 20, 7).snapshot("s")
    path = image.path
    limit = path.stat().st_size + (1 << 20)

    with serving(path) as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        script = """
import errno
failed = 0
for i in range(1000):
    try:
        h.pwrite(b"n" * 8192, i * 8192 % (8 << 20))
    except nbd.Error as error:
        assert error.errnum == errno.ENOSPC, error
        failed += 1
print(failed)
"""
        assert int(nbdsh(path, script)) > 100
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (limit + (64 << 20), resource.RLIM_INFINITY))
        nbdsh(path, "h.pwrite(b'y' * 100000, 0); h.flush()")
    qemu_img("check", "-q", path)
    qemu_io(path, f"read -P {ord('y')} 0 100000", options=("-r",))


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    words = [require("mount"), "-t", "tmpfs", "-o", "size=3m", "none", place]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run([require("umount"), place], check=True)


def test_a_full_file_system_loses_nothing_that_was_flushed(small_file_system: Path) -> None:
    image = Image.create(small_file_system / "disk.qcow2", SIZE, cluster_size=4096).write(0, 1 << 20, 7)
    path = image.path
    qemu_img("snapshot", "-c", "s", path)
    with serving(path) as server:
        script = """
h.pwrite(b"f" * 300000, 0)
h.flush()
full = False
for i in range(1000):
    try:
        h.pwrite(b"n" * 8192, (1 << 20) + i * 8192 % (7 << 20))
    except nbd.Error:
        full = True
        break
assert full
try: h.flush()
except nbd.Error: pass
"""
        nbdsh(path, script)
        server.process.kill()
        server.process.communicate(timeout=20)
    assert qemu_img("check", "-q", path, check=False).returncode in (0, 3)
    qemu_io(path, f"read -P {ord('f')} 0 300000", options=("-r",))


def test_an_image_of_which_not_all_can_be_written_at_the_end_says_so(tmp_path: Path) -> None:
    path = Image.create(tmp_path / "disk.qcow2", SIZE, cluster_size=4096).write(0, 1 << 20, 7).path
    with serving(path) as server:
        nbdsh(path, "h.pwrite(b'n' * 200000, 4 << 20)")
        limit = path.stat().st_size - 250_000
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        assert server.stop() == 1
        assert "not all could be written" in server.stderr
        assert "Traceback" not in server.stderr


def test_writable_does_not_go_with_force_share(new_image: NewImage) -> None:
    result = cli("serve", "--writable", "-U", "-k", "/nonexistent/s", new_image("1M").path)
    assert result.returncode == 2


def test_an_image_that_cannot_be_written_is_one_line(new_image: NewImage, tmp_path: Path) -> None:
    path = new_image("1M").patch(72, (2).to_bytes(8, "big")).path
    result = cli("serve", "--writable", "-k", tmp_path / "s", path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "marked corrupt" in result.stderr
