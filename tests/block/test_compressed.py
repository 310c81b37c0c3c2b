"""Compressed clusters: fast decompressors give what plain ones do, parts what wholes do, to one reader or many."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qcow2snap.block import graph
from qcow2snap.block.node import OutOfRange
from qcow2snap.block.qcow2 import compressed
from tests.conftest import NewImage
from tests.support.memory import memory_limit

CLUSTER = 65536
Decompress = Callable[[bytes | memoryview, memoryview], None]
PAIRS: dict[str, tuple[Decompress, Decompress]] = {
    "deflate": (compressed.deflate_decompress, compressed.deflate_decompress_slowly),
    "zstd": (compressed.zstd_decompress, compressed.zstd_decompress_slowly),
    "zstd, streamed": (compressed.zstd_decompress, compressed.zstd_decompress_slowly),
}


def cluster(seed: int) -> bytes:
    choose = random.Random(seed)
    return b"".join(choose.randbytes(64) * choose.randrange(1, 40) for _ in range(200))[:CLUSTER].ljust(CLUSTER, b"x")


def decompressed(decompress: Decompress, stream: bytes) -> bytes:
    content = bytearray(CLUSTER)
    decompress(stream, memoryview(content))
    return bytes(content)


def deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-12)  # QEMU's window
    return stream.compress(data) + stream.flush()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)  # as QEMU: the frame states its size


def zstd_streamed(data: bytes) -> bytes:
    stream = zstandard.ZstdCompressor().compressobj()  # it does not
    return stream.compress(data) + stream.flush()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"deflate": deflate, "zstd": zstd, "zstd, streamed": zstd_streamed}


@pytest.mark.parametrize("kind", PAIRS)
@given(seed=st.integers(0, 2**32), rest=st.binary(max_size=511))
def test_bytes_after_the_stream_do_not_matter(kind: str, seed: int, rest: bytes) -> None:
    data = cluster(seed)
    for decompress in PAIRS[kind]:
        assert decompressed(decompress, COMPRESS[kind](data) + rest) == data


@pytest.mark.parametrize("kind", PAIRS)
@given(seed=st.integers(0, 2**32), at=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_streams_are_refused_by_both_or_read_alike(
    kind: str, seed: int, at: float, bit: int, cut: bool
) -> None:
    stream = bytearray(COMPRESS[kind](cluster(seed)))
    place = int(at * (len(stream) - 1))
    stream[place] ^= 1 << bit
    damaged = bytes(stream[:place] if cut else stream)
    outcomes = []
    for decompress in PAIRS[kind]:
        try:
            outcomes.append(decompressed(decompress, damaged))
        except ValueError:
            outcomes.append(b"")
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_stream_that_holds_more_than_a_cluster_is_read_up_to_it(kind: str) -> None:
    data = cluster(1)
    for decompress in PAIRS[kind]:
        assert decompressed(decompress, COMPRESS[kind](data + b"more" * 1000)) == data


@pytest.mark.parametrize("kind", PAIRS)
def test_a_stream_that_holds_less_than_a_cluster_is_refused(kind: str) -> None:
    for decompress in PAIRS[kind]:
        with pytest.raises(ValueError, match="ends after"):
            decompressed(decompress, COMPRESS[kind](b"x" * (CLUSTER - 1)))


def test_a_cluster_may_be_several_zstd_frames() -> None:
    data = cluster(2)
    frames = zstd(data[:1000]) + zstd(data[1000:])
    for decompress in PAIRS["zstd"]:
        assert decompressed(decompress, frames) == data


def test_a_zstd_frame_that_states_a_gigabyte_does_not_get_it() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    with memory_limit(64 << 20):
        assert decompressed(compressed.zstd_decompress, bomb) == bytes(CLUSTER)


def test_of_several_who_want_a_part_of_a_cluster_one_decompresses_it(
    new_image: NewImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = graph.open_image(str(new_image(CLUSTER).write(0, CLUSTER, 7, compressed=True).path))
    times = []

    def slowly(data: bytes | memoryview, cluster: memoryview) -> None:
        times.append(time.sleep(0.1))
        compressed.deflate_decompress_slowly(data, cluster)

    monkeypatch.setattr(compressed, "deflate_decompress", slowly)
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda number: node.pread(number * 512, 512), range(4))) == {bytes([7]) * 512}
    assert len(times) == 1
    node.close()


def test_whole_clusters_are_the_same_in_one_buffer_and_in_several(new_image: NewImage) -> None:
    image = new_image(4 * CLUSTER)
    for number in range(4):
        image.write(number * CLUSTER, CLUSTER, number + 1, compressed=True)
    node = graph.open_image(str(image.path))
    buffers = bytearray(100), bytearray(CLUSTER), bytearray(2 * CLUSTER), bytearray(CLUSTER - 100)
    node.preadv(0, buffers)
    assert b"".join(buffers) == node.pread(0, 4 * CLUSTER) == b"".join(bytes([n]) * CLUSTER for n in (1, 2, 3, 4))
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
