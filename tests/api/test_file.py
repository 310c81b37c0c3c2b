"""A snapshot as a file: it behaves as a file of the same bytes would."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import qcow2snap
from tests.conftest import NewImage
from tests.support import Image, Library

SIZE = 1 << 20


@pytest.fixture(params=["plain", "compressed"])
def image(request: pytest.FixtureRequest, new_image: NewImage) -> Image:
    """A snapshot of a megabyte, part data and part holes, under a disk that went on and grew."""
    made = new_image(SIZE, cluster_size=4096)
    made.write(0, 400_000 // 4096 * 4096, compressed=request.param == "compressed").write(900_000, 100_000)
    return made.snapshot("s").write(0, 65536, 0xAA).resize("4M").write(SIZE, SIZE, 0xBB)


@pytest.fixture
def data(image: Image) -> bytes:
    return image.reference("s").read()


@pytest.fixture
def file(image: Image) -> Iterator[Any]:
    with qcow2snap.open(image.path) as opened, opened.snapshot("s").open() as file:
        yield file


def test_it_is_a_raw_readable_seekable_file(file: Any) -> None:
    assert isinstance(file, io.RawIOBase)
    assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
    with pytest.raises(OSError):
        file.fileno()
    with pytest.raises((OSError, NotImplementedError)):
        file.write(b"x")
    with pytest.raises(OSError):
        file.truncate()


def test_it_reads_what_an_ordinary_file_of_the_same_bytes_reads(file: Any, data: bytes) -> None:
    """A walk of a thousand random steps, side by side."""
    twin, chance = io.BytesIO(data), random.Random(1)
    for _ in range(1000):
        whence = chance.choice([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])
        base = {os.SEEK_SET: 0, os.SEEK_CUR: twin.tell(), os.SEEK_END: SIZE}[whence]
        target = chance.randrange(SIZE + 5000)
        length = chance.choice([0, 1, 15, 512, 4096, 4097, 70_000])
        assert file.seek(target - base, whence) == twin.seek(target - base, whence) == target
        assert file.read(length) == twin.read(length)
        assert file.tell() == twin.tell()


def test_it_is_read_whole(file: Any, data: bytes) -> None:
    assert file.readall() == data
    assert file.readall() == b""
    file.seek(SIZE - 10)
    assert file.read() == data[-10:]
    file.seek(0)
    assert file.read(-1) == data


def test_past_the_end_there_is_nothing_though_the_disk_goes_on(file: Any, data: bytes) -> None:
    assert file.seek(0, os.SEEK_END) == SIZE
    assert file.read(1) == b""
    file.seek(SIZE - 3)
    assert file.read(4096) == data[-3:]
    assert file.seek(10 * SIZE) == 10 * SIZE
    assert file.read(1) == b""
    assert file.readall() == b""
    assert file.readinto(bytearray(10)) == 0
    assert file.pread(10, 10 * SIZE) == b""
    assert file.pread(10, SIZE - 4) == data[-4:]
    assert file.tell() == 10 * SIZE


def test_a_position_before_the_start_is_refused(file: Any) -> None:
    file.seek(5)
    for offset, whence in ((-1, os.SEEK_SET), (-6, os.SEEK_CUR), (-SIZE - 1, os.SEEK_END)):
        with pytest.raises((ValueError, OSError)):
            file.seek(offset, whence)
    with pytest.raises(ValueError):
        file.seek(0, 17)
    assert file.tell() == 5


def test_a_negative_offset_of_pread_is_refused(file: Any) -> None:
    with pytest.raises((ValueError, OSError, qcow2snap.Qcow2SnapError)):
        file.pread(10, -1)


@pytest.mark.parametrize(
    "new_buffer",
    [
        bytearray,
        lambda length: memoryview(bytearray(length)),
        lambda length: memoryview(bytearray(2 * length))[length:],
        lambda length: memoryview(bytearray(length)).cast("I"),
        lambda length: memoryview(bytearray(length)).cast("B", (length // 16, 16)),
    ],
    ids=["bytearray", "memoryview", "slice", "integers", "matrix"],
)
def test_readinto_fills_any_buffer(file: Any, data: bytes, new_buffer: Callable[[int], Any]) -> None:
    buffer = new_buffer(8192)
    file.seek(100)
    assert file.readinto(buffer) == 8192
    assert bytes(buffer) == data[100:8292]


def test_readinto_refuses_what_cannot_be_written(file: Any) -> None:
    with pytest.raises((TypeError, BufferError, ValueError)):
        file.readinto(b"12345678")


def test_lines_and_iteration_work_as_in_any_file(file: Any, data: bytes) -> None:
    buffered = io.BufferedReader(file)
    assert buffered.readline() == b"000000000000000\n"
    assert next(iter(buffered)) == b"000000000000001\n"
    assert buffered.peek(4)[:4] == b"0000"
    buffered.detach()


def test_a_buffered_reader_reads_the_same(file: Any, data: bytes) -> None:
    buffered = io.BufferedReader(file, 1 << 16)
    assert buffered.read(10) == data[:10]
    buffered.seek(SIZE // 3)
    assert buffered.read(100_000) == data[SIZE // 3 : SIZE // 3 + 100_000]
    buffered.seek(-7, os.SEEK_END)
    assert buffered.read() == data[-7:]
    buffered.detach()


def test_copyfileobj_and_file_digest_take_it(file: Any, data: bytes, tmp_path: Path) -> None:
    with (tmp_path / "copy").open("wb") as out:
        shutil.copyfileobj(file, out)
    assert (tmp_path / "copy").read_bytes() == data
    file.seek(0)
    assert hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(data).digest()


def test_a_closed_file_says_so(image: Image) -> None:
    with qcow2snap.open(image.path) as opened:
        file = opened.snapshot("s").open()
        file.close()
        file.close()
        assert file.closed
        for use in (lambda: file.read(1), file.readall, lambda: file.readinto(bytearray(1)), lambda: file.seek(0)):
            with pytest.raises(ValueError, match="closed"):
                use()
        with pytest.raises(ValueError, match="closed"):
            file.tell()
        with pytest.raises(ValueError, match="closed"):
            file.pread(1, 0)  # type: ignore[attr-defined]
        with opened.snapshot("s").open() as other:  # closing one leaves the others, and the image
            assert other.read(1) == b"0"


def test_a_file_of_a_closed_image_is_an_error_not_other_bytes(image: Image) -> None:
    opened = qcow2snap.open(image.path)
    file = opened.snapshot("s").open()
    file.seek(950_000)
    opened.close()
    with open(image.path.with_name("decoy"), "wb+"):  # takes the number of the file that was closed
        with pytest.raises((qcow2snap.Qcow2SnapError, ValueError)):
            file.read(4096)
        file.close()


def test_the_vm_state_is_a_file_too(library: Library) -> None:
    (expected,) = (s for s in library.images["demo"].snapshots if s.vm_state_size)
    with qcow2snap.open(library.path("demo")) as opened:
        snapshot = opened.snapshot("before-upgrade")
        with snapshot.open_vm_state() as state:
            assert state.seek(0, os.SEEK_END) == snapshot.vm_state_size == expected.vm_state_size
            state.seek(0)
            assert hashlib.file_digest(state, "sha256").hexdigest() == expected.vm_state_sha256  # type: ignore[arg-type]
            state.seek(0)
            assert state.read(4) == b"QEVM"


# Threads


def test_threads_that_share_an_image_each_read_right(image: Image, data: bytes) -> None:
    disk = image.active.read()

    def check(seed: int) -> None:
        chance = random.Random(seed)
        with opened.snapshot("s").open() as old, opened.active.open() as new:
            for _ in range(150):
                offset, length = chance.randrange(SIZE), chance.choice([1, 512, 4096, 10_000])
                old.seek(offset)
                assert old.read(length) == data[offset : offset + length]
                new.seek(offset)
                assert new.read(length) == disk[offset : offset + length]

    with qcow2snap.open(image.path) as opened, ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(8)))


def test_threads_that_share_a_file_read_at_offsets_without_minding_each_other(file: Any, data: bytes) -> None:
    def check(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(200):
            offset, length = chance.randrange(SIZE), chance.choice([1, 512, 4096, 10_000])
            assert file.pread(length, offset) == data[offset : offset + length]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(8)))
    assert file.tell() == 0


def test_threads_that_share_a_file_never_get_the_same_piece_twice(file: Any, data: bytes) -> None:
    """Each read takes its range and moves on in one step."""

    def take() -> list[bytes]:
        pieces = []
        while piece := file.read(4096):
            pieces.append(piece)
        return pieces

    with ThreadPoolExecutor(6) as pool:
        taken = [piece for future in [pool.submit(take) for _ in range(6)] for piece in future.result()]
    assert sorted(taken) == sorted(data[offset : offset + 4096] for offset in range(0, SIZE, 4096))
