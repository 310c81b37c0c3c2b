"""Compressed clusters: the fast decompressors give what the plain ones give, and refuse what is damaged or a bomb."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qcow2snap.block.qcow2 import compressed
from tests.support.memory import memory_limit

CLUSTER = 65536
Decompress = Callable[[bytes, int], bytes]
PAIRS = {
    "deflate": (compressed.deflate_decompress, compressed.deflate_decompress_slowly),
    "zstd": (compressed.zstd_decompress, compressed.zstd_decompress_slowly),
}


def cluster(seed: int) -> bytes:
    choose = random.Random(seed)
    return b"".join(choose.randbytes(64) * choose.randrange(1, 40) for _ in range(200))[:CLUSTER].ljust(CLUSTER, b"x")


def deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-12)  # QEMU's window
    return stream.compress(data) + stream.flush()


def zstd_as_qemu(data: bytes) -> bytes:
    stream = zstandard.ZstdCompressor().compressobj()  # streamed: the frame does not state its size
    return stream.compress(data) + stream.flush()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"deflate": deflate, "zstd": zstd_as_qemu}


@pytest.mark.parametrize("kind", PAIRS)
@given(seed=st.integers(0, 2**32), rest=st.binary(max_size=511))
def test_bytes_after_the_stream_do_not_matter(kind: str, seed: int, rest: bytes) -> None:
    data = cluster(seed)
    for decompress in PAIRS[kind]:
        assert decompress(COMPRESS[kind](data) + rest, CLUSTER) == data


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
            outcomes.append(decompress(damaged, CLUSTER))
        except ValueError:
            outcomes.append(b"")
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_stream_that_holds_more_than_a_cluster_is_read_up_to_it(kind: str) -> None:
    data = cluster(1)
    for decompress in PAIRS[kind]:
        assert decompress(COMPRESS[kind](data + b"more" * 1000), CLUSTER) == data


@pytest.mark.parametrize("kind", PAIRS)
def test_a_stream_that_holds_less_than_a_cluster_is_refused(kind: str) -> None:
    for decompress in PAIRS[kind]:
        with pytest.raises(ValueError, match="ends after"):
            decompress(COMPRESS[kind](b"x" * (CLUSTER - 1)), CLUSTER)


def test_a_cluster_may_be_several_zstd_frames() -> None:
    data = cluster(2)
    frames = zstd_as_qemu(data[:1000]) + zstd_as_qemu(data[1000:])
    for decompress in PAIRS["zstd"]:
        assert decompress(frames, CLUSTER) == data


def test_a_zstd_frame_that_states_a_gigabyte_does_not_get_it() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    with memory_limit(64 << 20):
        assert compressed.zstd_decompress(bomb, CLUSTER) == bytes(CLUSTER)
