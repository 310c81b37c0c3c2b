"""Short reads past the driver give what the driver gives, and are left to it wherever there is doubt."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcow2snap.block.node import Extent, FileError
from qcow2snap.nbd import file_map as module
from qcow2snap.nbd.file_map import FileMap
from tests.nbd.support import NewNode, PatchworkNode, ZeroNode
from tests.nbd.test_transmission import RUNS


def pread(files: FileMap, offset: int, length: int) -> bytes:
    """As the server reads: from the map if it is at hand there, else from the node."""
    buffer = bytearray(length)
    if not files.read(offset, memoryview(buffer)):
        files._node.preadv(offset, [buffer])
    return bytes(buffer)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=RUNS.map(lambda runs: runs * 3), seed=st.integers(0, 99))
def test_short_reads_are_those_of_the_node(tmp_path: Path, runs: list[tuple[str, int]], seed: int) -> None:
    node = PatchworkNode(tmp_path / "node", [run for run in runs if run[0] != "bad"] or [("file", 1)])
    files, pick = FileMap(node), random.Random(seed)
    for _ in range(30):
        offset = pick.randrange(node.size)
        length = min(pick.choice([1, 512, 4096, 32767]), node.size - offset)
        assert pread(files, offset, length) == node.content[offset : offset + length]
    node.close()


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file may be read directly."""

    def refuse(*arguments: object) -> int:
        raise AssertionError("read directly")

    monkeypatch.setattr(module.os, "preadv", refuse)


@pytest.mark.usefixtures("never")
def test_a_file_that_others_may_write_is_read_by_the_node(new_node: NewNode) -> None:
    node = new_node(("file", 1 << 16), stable=False)
    assert pread(FileMap(node), 5, 100) == node.content[5:105]


@pytest.mark.usefixtures("never")
def test_a_node_that_can_be_written_is_asked_each_time(new_node: NewNode) -> None:
    node = new_node(("file", 1 << 16))
    node.read_only = False
    assert pread(FileMap(node), 5, 100) == node.content[5:105]


@pytest.mark.usefixtures("never")
def test_a_ragged_window_is_left_to_the_node(new_node: NewNode) -> None:
    node = new_node(*[("file", 512), ("memory", 512)] * 200)
    assert pread(FileMap(node), 5, 100) == node.content[5:105]


def test_damage_does_not_spread_to_its_neighbours(new_node: NewNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node = new_node(("file", 1 << 16), ("bad", 4096), ("file", 1 << 16))

    def fail(offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        raise FileError("an L2 entry is damaged")

    monkeypatch.setattr(node, "block_status", fail)
    files = FileMap(node)
    assert pread(files, 5, 100) == node.content[5:105]
    with pytest.raises(FileError, match="damaged"):
        pread(files, (1 << 16) + 7, 1)


def test_a_file_that_ends_early_is_read_by_the_node(new_node: NewNode) -> None:
    node = new_node(("file", 1 << 16))
    files = FileMap(node)
    assert pread(files, 0, 4096) == node.content[:4096]
    os.truncate(node.filename, 512 + 2048)
    assert pread(files, 0, 4096) == node.content[:4096]


def test_what_is_remembered_is_bounded(new_node: NewNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 4096)
    monkeypatch.setattr(module, "MAX_EXTENTS", 100)
    node = new_node(("file", 1 << 20))
    files = FileMap(node)
    for _ in range(2):
        for offset in range(0, node.size, 4096):
            assert pread(files, offset, 99) == node.content[offset : offset + 99]
            assert len(files._windows) <= 6


def test_zeros_are_remembered_too(new_node: NewNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node = new_node(("file", 4096), ("zero", 1 << 16))
    files = FileMap(node)
    assert pread(files, 0, 1) == node.content[:1]
    monkeypatch.setattr(node, "preadv", None)
    buffer = bytearray(b"x" * 5000)
    assert files.read(8192, memoryview(buffer))
    assert buffer == bytes(5000)


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EIO])
def test_what_has_to_be_waited_for_is_not_at_hand(
    new_node: NewNode, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    node = new_node(("file", 1 << 16))
    files = FileMap(node)
    flags = []

    def refuse(fd: int, buffers: list[memoryview], offset: int, given: int = 0) -> int:
        flags.append(given)
        raise OSError(error, "not now")

    monkeypatch.setattr(module.os, "preadv", refuse)
    assert not files.read(0, memoryview(bytearray(9)))
    assert not files.is_at_hand(node, 512)
    assert flags == [os.RWF_NOWAIT] * 2


def test_a_file_system_without_nowait_is_read_all_the_same(new_node: NewNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node = new_node(("file", 1 << 16))
    files = FileMap(node)
    preadv = os.preadv

    def refuse(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "no such flag here")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(module.os, "preadv", refuse)
    buffer = bytearray(9)
    assert files.read(5, memoryview(buffer))
    assert buffer == node.content[5:14]
    assert files.is_at_hand(node, 512)


def test_a_node_that_is_confirmed_may_have_files_that_others_write(new_node: NewNode) -> None:
    node = new_node(("file", 1 << 16), stable=False)
    node.must_confirm = True
    buffer = bytearray(9)
    assert FileMap(node).read(5, memoryview(buffer))
    assert buffer == node.content[5:14]


def test_of_a_node_whose_ranges_may_become_unreadable_nothing_is_remembered() -> None:
    node = ZeroNode(module.WINDOW)
    node.status_may_change = True
    assert not FileMap(node).read(0, memoryview(bytearray(4096)))
    assert not FileMap(node).extents(0, 4096)


def test_all_maps_together_are_bounded(new_node: NewNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EXTENTS_IN_ALL", 100)
    monkeypatch.setattr(module, "MAX_EXTENTS", 50)
    node = new_node(*[("file", 4096), ("memory", 4096)] * 10)
    maps = [FileMap(node) for _ in range(30)]
    for each in maps * 2:
        assert pread(each, 4000, 200) == node.content[4000:4200]
        assert sum(len(window.starts) for one in maps for window in one._windows.values()) <= 100
        assert each._windows, "the one that is in use stays"


def test_what_lies_in_files_is_fetched_ahead_without_the_driver(
    new_node: NewNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = new_node(("file", 1 << 16), ("zero", 1 << 16), ("memory", 1 << 16))
    files = FileMap(node)
    advised, asked = [], []
    monkeypatch.setattr(module.os, "posix_fadvise", lambda fd, offset, length, advice: advised.append((offset, length)))
    monkeypatch.setattr(node, "prefetch", lambda offset, length: asked.append((offset, length)))
    files.prefetch(4096, 512)
    files.prefetch((1 << 16) - 10, 20)
    assert (advised, asked) == ([(512 + 4096, 512), (512 + (1 << 16) - 10, 10)], [])
    files.prefetch(1 << 17, 9)
    assert asked == [(1 << 17, 9)]
    assert len(advised) == 2


def test_a_read_may_wait_where_it_is_told_to(new_node: NewNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node = new_node(("file", 1 << 16))
    flags = []
    preadv = os.preadv

    def watch(fd: int, buffers: list[memoryview], offset: int, given: int = 0) -> int:
        flags.append(given)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(module.os, "preadv", watch)
    assert FileMap(node).read(0, memoryview(bytearray(9)), wait=True)
    assert flags == [0]
