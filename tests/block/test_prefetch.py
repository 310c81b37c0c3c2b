"""What is asked for ahead: it is there sooner, is the same, and failing is the reader's to hear of, not the asker's."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path

import pytest

from qcow2snap.block import graph, pool
from qcow2snap.block.node import ImageFormatError, OutOfRange
from qcow2snap.block.qcow2 import compressed
from tests.conftest import NewImage

CLUSTER = 65536


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of the thread that decompressed, each time that one did."""
    threads: list[str] = []
    plain = compressed.deflate_decompress

    def decompress(data: bytes | memoryview, cluster_size: int) -> bytes:
        threads.append(threading.current_thread().name)
        return plain(data, cluster_size)

    monkeypatch.setattr(compressed, "deflate_decompress", decompress)
    return threads


def compressed_image(new_image: NewImage, clusters: int) -> Path:
    image = new_image(clusters * CLUSTER)
    for number in range(clusters):
        image.write(number * CLUSTER, CLUSTER, number + 1, compressed=True)
    path: Path = image.path
    return path


def wait_for_pool() -> None:
    """Until all that was submitted is done."""
    count = pool.thread_pool().size
    barrier = threading.Barrier(count + 1)
    for _ in range(count):
        pool.thread_pool().submit(partial(barrier.wait, 20))
    barrier.wait(20)


def test_compressed_clusters_are_decompressed_ahead_once_by_the_pool(new_image: NewImage, counted: list[str]) -> None:
    node = graph.open_image(str(compressed_image(new_image, 8)))
    node.prefetch(0, 8 * CLUSTER)
    wait_for_pool()
    assert len(counted) == 8
    assert all(name.startswith("ahead") for name in counted)
    whole = node.pread(0, 8 * CLUSTER)
    assert [whole[number * CLUSTER] for number in range(8)] == list(range(1, 9))
    assert [node.pread(number * CLUSTER + 7, 1) for number in range(8)] == [bytes([n]) for n in range(1, 9)]
    assert len(counted) == 8
    node.close()


def test_what_the_pool_has_not_begun_is_taken_by_the_reader(
    new_image: NewImage, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = graph.open_image(str(compressed_image(new_image, 3)))
    busy = threading.Event()
    one = pool.ThreadPool(1)
    monkeypatch.setattr(compressed, "thread_pool", lambda: one)
    one.submit(partial(busy.wait, 20))
    node.prefetch(0, 3 * CLUSTER)
    assert node.pread(CLUSTER, 4) == bytes([2]) * 4
    assert counted == [threading.current_thread().name]
    busy.set()
    assert node.pread(0, 1) + node.pread(2 * CLUSTER, 1) == bytes([1, 3])
    assert len(counted) == 3
    node.close()


def test_a_hint_never_takes_more_than_half_of_the_cache(new_image: NewImage, counted: list[str]) -> None:
    path = compressed_image(new_image, 16)
    node = graph.open_image(str(path), graph.OpenOptions(cluster_cache_size=8 * CLUSTER))
    node.prefetch(0, 16 * CLUSTER)
    wait_for_pool()
    assert len(counted) == 4
    node.close()


def test_damage_is_told_to_the_reader_not_to_who_asks_ahead(new_image: NewImage) -> None:
    path = compressed_image(new_image, 2)
    node = graph.open_image(str(path))
    host_offset, length = node._epoch.image.compressed.host_range(next(node.view(None).mappings(CLUSTER, 1)).host)
    with path.open("r+b") as file:
        file.seek(host_offset)
        file.write(b"\xff" * length)
    node.prefetch(0, 2 * CLUSTER)
    wait_for_pool()
    assert node.pread(0, CLUSTER) == b"\x01" * CLUSTER
    with pytest.raises(ImageFormatError, match="QCOW2-CMP"):
        node.pread(CLUSTER, 1)
    node.close()


def test_closing_waits_for_what_is_being_read(new_image: NewImage) -> None:
    path = compressed_image(new_image, 8)
    for _ in range(20):
        node = graph.open_image(str(path))
        fd = node.file.fileno()
        node.prefetch(0, 8 * CLUSTER)
        node.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_child_of_a_fork_makes_a_pool_of_its_own(new_image: NewImage) -> None:
    node = graph.open_image(str(compressed_image(new_image, 4)))
    node.prefetch(0, CLUSTER)
    wait_for_pool()
    child = os.fork()
    if child == 0:  # whatever happens, this must not return into pytest
        try:
            node.prefetch(0, 4 * CLUSTER)
            os._exit(0 if node.pread(3 * CLUSTER, 1) == b"\x04" else 1)
        except BaseException:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    node.close()


def test_pieces_of_a_compressed_cluster_are_those_of_the_whole(new_image: NewImage) -> None:
    image = new_image(3 * CLUSTER + 512)
    image.write(0, 2 * CLUSTER, compressed=True)  # no two lines are alike
    image.write(2 * CLUSTER, CLUSTER).write(3 * CLUSTER, 512, compressed=True)
    image.snapshot("before").write(0, CLUSTER)
    node = graph.open_image(str(image.path))
    for view in node.view(None), node.view(node.find_snapshot("before")):
        whole = view.pread(0, view.size)
        for offset in range(0, view.size, 1536):  # some within the cluster of the piece before, some beyond
            length = min(1536, view.size - offset)
            halves = bytearray(length // 2), bytearray(length - length // 2)
            view.preadv(offset, halves)
            assert view.pread(offset, length) == b"".join(halves) == whole[offset : offset + length]
        with pytest.raises(OutOfRange):
            view.pread(view.size - 512, 513)
    node.close()
