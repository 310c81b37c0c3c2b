"""Compressing clusters: from the bytes of a cluster to what an L2 entry describes. Called from any number of threads.

libdeflate at zlib's usual level takes a third of zlib's time, and gives a sixth less: it uses deflate's whole window of
32 KiB, QEMU one of 4 KiB. QEMU reads both, as it inflates a cluster in one piece.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from formats.qcow2 import CompressionType

Compress = Callable[[memoryview], bytes]

_DEFLATE_LEVEL = 6  # zlib's default, which QEMU takes
_ZSTD_LEVEL = 3  # likewise

_thread = threading.local()


def compressor(kind: CompressionType) -> Compress:
    """What compresses a cluster; the same bytes always give the same result."""
    return _zstd if kind == CompressionType.ZSTD else _deflate


def _deflate(cluster: memoryview) -> bytes:
    import deflate

    return bytes(deflate.deflate_compress(cluster, _DEFLATE_LEVEL))


def _zstd(cluster: memoryview) -> bytes:
    import zstandard

    try:
        codec = _thread.zstd
    except AttributeError:
        codec = _thread.zstd = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    compressed: bytes = codec.compress(cluster)
    return compressed
