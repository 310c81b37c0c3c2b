"""Writing files of the host: what is read back, what space it takes, what QEMU's programs may do meanwhile."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcow2snap.block import writable_file
from qcow2snap.block.file import FileNode
from qcow2snap.block.graph import open_raw
from qcow2snap.block.node import FileError, ImageInUse, NoSpace, NotSupported, OutOfRange
from qcow2snap.block.raw import RawNode
from qcow2snap.block.writable_file import WritableFileNode
from tests.block.test_image_lock import qemu_io_holding
from tests.support import qemu_img, qemu_io

SIZE = 1 << 20
# A file system that can zero a range, and one that can only punch holes.
PLACES = [Path(tempfile.gettempdir()), *([Path("/dev/shm")] if os.access("/dev/shm", os.W_OK) else [])]


@pytest.fixture(params=PLACES, ids=str)
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=request.param) as folder:
        file = Path(folder) / "disk.raw"
        file.write_bytes(b"x" * SIZE)
        yield file


@pytest.fixture
def node(path: Path) -> Iterator[RawNode]:
    node = open_raw(str(path), writable=True)
    yield node
    node.close()


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


RANGES = st.tuples(st.integers(0, 5000), st.integers(0, 5000)).map(lambda pair: (min(pair), max(pair) - min(pair)))
OPERATIONS = st.tuples(st.sampled_from(["write", "zero", "unmap", "discard", "flush"]), RANGES, st.integers(1, 255))


@settings(max_examples=200, deadline=None)
@given(st.lists(OPERATIONS, max_size=12), st.sampled_from(PLACES), st.integers(0, 3))
def test_what_is_read_is_what_was_written(
    operations: list[tuple[str, tuple[int, int], int]], place: Path, offset: int
) -> None:
    expected = bytearray(b"o" * 5000)
    with tempfile.NamedTemporaryFile(dir=place) as file:
        file.write(b"-" * offset + expected + b"-" * 7)
        file.flush()
        node = RawNode(WritableFileNode(file.name), offset=offset, size=len(expected))
        try:
            for what, (start, length), fill in operations:
                data = bytes([fill]) * length if what == "write" else bytes(length)
                if what == "write":
                    node.pwritev(start, [bytearray(data[:100]), bytearray(), memoryview(data[100:])])
                elif what in ("zero", "unmap"):
                    node.pwrite_zeroes(start, length, may_unmap=what == "unmap")
                elif what == "discard":
                    node.pdiscard(start, length)
                else:
                    node.flush()
                    continue
                expected[start : start + length] = data  # a discard leaves zeros on both of these
        finally:
            node.close()
        assert Path(file.name).read_bytes() == b"-" * offset + expected + b"-" * 7


def test_more_buffers_than_one_call_takes_are_written(node: RawNode, path: Path) -> None:
    buffers = [bytearray([i % 255]) * (1 + i % 3) for i in range(3000)]
    node.pwritev(5, buffers)
    data = b"".join(buffers)
    assert path.read_bytes() == b"x" * 5 + data + b"x" * (SIZE - 5 - len(data))


def test_zeros_give_space_back_only_where_they_may(node: RawNode, path: Path) -> None:
    full = allocated(path)
    node.pwrite_zeroes(0, SIZE // 2)
    assert allocated(path) == full
    node.pwrite_zeroes(0, SIZE // 2, may_unmap=True)
    assert allocated(path) <= full - SIZE // 2 + 8192
    node.pdiscard(SIZE // 2, SIZE // 2)
    assert allocated(path) <= 8192
    node.pwrite_zeroes(0, SIZE)
    assert allocated(path) >= SIZE, "room for later writes is taken"
    assert path.read_bytes() == bytes(SIZE)


def test_zeros_without_fallback_are_fast_or_nothing(node: RawNode, path: Path) -> None:
    node.pwrite_zeroes(0, 4096, may_unmap=True, no_fallback=True)
    assert node.pread(0, 4097) == bytes(4096) + b"x"
    if path.is_relative_to("/dev/shm"):  # which cannot zero a range and keep its space
        with pytest.raises(NotSupported):
            node.pwrite_zeroes(8192, 4096, no_fallback=True)
        assert node.pread(8192, 4096) == b"x" * 4096
    else:
        node.pwrite_zeroes(8192, 4096, no_fallback=True)
        assert node.pread(8192, 4096) == bytes(4096)


def test_zeros_are_written_a_little_at_a_time(node: RawNode, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writable_file, "_ZEROS", bytes(1000))
    monkeypatch.setattr(writable_file, "_linux_fallocate", lambda: lambda *arguments: 95)  # EOPNOTSUPP
    node.pwrite_zeroes(7, 12345, may_unmap=True)
    assert path.read_bytes() == b"x" * 7 + bytes(12345) + b"x" * (SIZE - 7 - 12345)
    node.pdiscard(0, SIZE)


def test_nothing_is_written_beyond_the_end(node: RawNode, path: Path) -> None:
    for write in (
        lambda: node.pwritev(SIZE - 1, [bytearray(2)]),
        lambda: node.pwrite_zeroes(SIZE - 1, 2),
        lambda: node.pdiscard(SIZE, 1),
    ):
        with pytest.raises(OutOfRange):
            write()
    assert path.read_bytes() == b"x" * SIZE


def test_no_space_is_told_from_other_errors(node: RawNode) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(NoSpace, match="at byte 0x2000"):
            node.pwritev(4096, [bytearray(b"y" * 8192)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert node.pread(8191, 2) == b"yx", "what fits was written, and the rest was tried"


def test_after_a_failed_flush_none_succeeds(node: RawNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(FileError, match="flush"):
            node.flush()
    with pytest.raises(FileError, match="lost"):
        node.flush()


def test_a_file_that_is_written_is_not_stable(node: RawNode) -> None:
    [extent] = node.block_status(0, SIZE)
    assert extent.file is not None
    assert not extent.file.stable
    assert not node.read_only


def test_qemu_and_a_writer_refuse_each_other(path: Path) -> None:
    with qemu_io_holding(path, "-f", "raw"), pytest.raises(ImageInUse):
        open_raw(str(path), writable=True)
    node = open_raw(str(path), writable=True)
    assert "lock" in qemu_io(path, "write 0 512", options=("-f", "raw"), check=False).stderr
    assert "lock" in qemu_img("resize", "-f", "raw", path, "2M", check=False).stderr
    assert qemu_img("info", path).returncode == 0, "QEMU shares a raw image with its readers"
    node.close()
    qemu_io(path, "write 0 512", options=("-f", "raw"))


def test_a_reader_and_a_writer_of_ours_refuse_each_other(path: Path) -> None:
    for hold, other in ((True, False), (False, True), (True, True)):
        held = open_raw(str(path), writable=hold)
        with pytest.raises(ImageInUse):
            open_raw(str(path), writable=other)
        held.close()
    FileNode(str(path)).close()


def test_what_takes_waiting_is_not_read_without(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * (1 << 20))
    node = WritableFileNode(str(path))
    buffer = bytearray(4096)
    assert node.preadv_nowait(8192, [buffer])
    assert buffer == b"x" * 4096
    if subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path], text=True) == "tmpfs\n":
        pytest.skip("all of a file here is in memory")
    node.flush()
    os.posix_fadvise(node.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert not node.preadv_nowait(8192, [buffer])
    with pytest.raises(OutOfRange):
        node.preadv_nowait(1 << 20, [buffer])
    node.close()


def test_holes_are_known_to_be_zeros_at_once(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 16)
        file.write(b"x")
    node = WritableFileNode(str(path))
    assert node.is_zero_fast(0, 1 << 16)
    assert not node.is_zero_fast(0, (1 << 16) + 1)
    assert not node.is_zero_fast(1 << 16, 1 << 16)
    assert node.is_zero_fast(1 << 17, (1 << 20) - (1 << 17))
    node.close()
