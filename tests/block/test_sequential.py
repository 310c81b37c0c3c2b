"""Images written from their first guest byte to their last, with clusters of every kind: QEMU finds them sound."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcow2snap.block.qcow2.creating.create_options import made
from qcow2snap.block.qcow2.creating.sequential import SequentialWriter
from tests.support import qemu_img

KINDS = ["skip", "data", "preallocated", "compressed"]

steps = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 460)), max_size=40)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    steps=steps,
    bits=st.sampled_from(["1", "2", "8", "16", "64"]),
    layout=st.sampled_from(["cluster_size=512", "cluster_size=4k", "cluster_size=16k,extended_l2=on"]),
)
def test_any_sequence_gives_a_sound_image(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]], bits: str, layout: str
) -> None:
    directory = tmp_path_factory.mktemp("sequential")
    options = dict(pair.split("=") for pair in f"{layout},refcount_bits={bits}".split(","))
    cluster_size = made(0, options).cluster_size
    expected = directory / "expected"
    with (directory / "image").open("wb+") as image, expected.open("wb+") as raw:
        clusters = sum(count for _, count, _ in steps)
        writer = SequentialWriter(image.fileno(), made(clusters * cluster_size, options))
        raw.truncate(clusters * cluster_size)
        position = 0
        for number, (kind, count, size) in enumerate(steps):
            if kind == "compressed":
                for index in range(count):
                    # Bytes that do not compress, as many as the test wants, then zeros.
                    cluster = os.urandom(min(size, cluster_size - 80)).ljust(cluster_size, b"\0")
                    codec = zlib.compressobj(1, zlib.DEFLATED, -12)
                    data = codec.compress(cluster) + codec.flush()
                    offset = position + index * cluster_size
                    if len(data) < cluster_size:
                        os.pwrite(image.fileno(), data, writer.allocate_compressed(offset, len(data)))
                    else:
                        os.pwrite(image.fileno(), cluster, writer.allocate(offset, cluster_size))
                    os.pwrite(raw.fileno(), cluster, offset)
            elif kind != "skip":
                data = bytes([number + 1]) * (count * cluster_size)
                host = writer.allocate(position, len(data), holds_data=kind == "data")
                if kind == "data":
                    os.pwrite(image.fileno(), data, host)
                    os.pwrite(raw.fileno(), data, position)
            position += count * cluster_size
        writer.finish()
    qemu_img("check", directory / "image")
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", directory / "image", expected).stdout


def test_nothing_is_an_image_before_the_header_is_written(tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb+") as image:
        writer = SequentialWriter(image.fileno(), made(1 << 30))
        for offset in range(0, 1 << 30, 1 << 25):
            writer.allocate(offset, 1 << 16)
        assert os.pread(image.fileno(), 512, 0).strip(b"\0") == b""
        assert os.fstat(image.fileno()).st_size > 0
        writer.finish()
        assert os.pread(image.fileno(), 4, 0) == b"QFI\xfb"


def test_an_image_in_place_of_another_wipes_its_header_first(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with path.open("rb+") as image:
        SequentialWriter(image.fileno(), made(1 << 20), in_place=True)
        assert os.pread(image.fileno(), 512, 0).strip(b"\0") == b""
