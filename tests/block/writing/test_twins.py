"""The same done by us and by qemu-io to twin images, each going on with what the other wrote: their contents are equal.

qemu-img judges: its check finds neither errors nor leaks in what was closed, and it reads the same from both.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qcow2snap.block.graph import open_image, open_writable
from tests.support import qemu_img, qemu_io

SIZE = (384 << 10) + 512  # the last cluster is not whole


class Operation(NamedTuple):
    """What is done to a range of the disk."""

    what: str
    offset: int
    length: int
    fill: int

    def by_qemu(self) -> str:
        place = f"{self.offset} {self.length}"
        return {
            "write": f"write -P {self.fill} {place}",
            "zero": f"write -z {place}",
            "unmap": f"write -zu {place}",
            "discard": f"discard {place}",
            "flush": "flush",
        }[self.what]


def _range(pair: tuple[int, int]) -> tuple[int, int]:
    offset, length = pair
    return offset * 512, min(length * 512, SIZE - offset * 512)


RANGES = st.tuples(
    st.integers(0, SIZE // 512 - 1), st.one_of(st.integers(1, 16), st.sampled_from([8, 128, 300, 1000]))
).map(_range)
OPERATIONS = st.builds(
    lambda what, place, fill: Operation(what, *place, fill),
    st.sampled_from(["write", "write", "write", "zero", "unmap", "discard", "flush"]),
    RANGES,
    st.integers(1, 255),
)
TURNS = st.lists(st.lists(OPERATIONS, min_size=1, max_size=8), min_size=2, max_size=4)

# What both images are created with; "base" and "compressed" are how they begin.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "64k": (),
    "4k": ("cluster_size=4k",),
    "512": ("cluster_size=512,refcount_bits=64",),
    "2M": ("cluster_size=2M",),
    "narrow refcounts": ("cluster_size=4k,refcount_bits=4",),
    "extended L2": ("cluster_size=16k,extended_l2=on",),
    "version 2": ("cluster_size=4k,compat=0.10",),
    "lazy refcounts": ("cluster_size=4k,lazy_refcounts=on",),
    "data file": ("cluster_size=4k,data_file={name}.data",),
    "raw data file": ("cluster_size=4k,data_file={name}.data,data_file_raw=on",),
    "base": ("cluster_size=4k", "base"),
    "base of version 2": ("cluster_size=4k,compat=0.10", "base"),
    "base, extended L2": ("cluster_size=16k,extended_l2=on", "base"),
    "compressed": ("cluster_size=4k", "compressed"),
    "compressed, extended L2": ("cluster_size=16k,extended_l2=on", "compressed"),
    "zstd": ("cluster_size=4k,compression_type=zstd", "compressed"),
}


class Twins:
    """Two images that are to hold the same, and what their snapshots held."""

    def __init__(self, folder: Path, options: str = "", *how: str) -> None:
        self.folder = folder
        self.paths = [folder / "a.qcow2", folder / "b.qcow2"]
        self.snapshots: list[bytes] = []
        below = []
        if "base" in how:
            base = folder / "base.raw"
            base.write_bytes(random.Random(1).randbytes(SIZE - 70_000))
            below = ["-b", base, "-F", "raw"]
        for path in self.paths:
            given_options = ["-o", options.format(name=path)] if options else []
            qemu_img("create", "-q", "-f", "qcow2", *given_options, *below, path, str(SIZE))
            if "compressed" in how:
                source = folder / "source.raw"
                source.write_bytes(b"".join(bytes([n % 251]) * 700 for n in range(SIZE // 700 + 1))[:SIZE])
                qemu_img("convert", "-c", "-O", "qcow2", "-o", options, source, path)

    def turn(self, number: int, operations: list[Operation]) -> None:
        """Each image is the one's and the other's in turn."""
        ours, theirs = self.paths[number % 2], self.paths[1 - number % 2]
        qemu_io(theirs, *(operation.by_qemu() for operation in operations))
        node = open_writable(str(ours))
        try:
            for operation in operations:
                self.by_us(node, operation)
        finally:
            node.close()
        self.are_equal()

    def by_us(self, node: object, operation: Operation) -> None:
        what, offset, length, fill = operation
        if what == "write":
            node.pwritev(offset, [memoryview(bytes([fill]) * length)])  # type: ignore[attr-defined]
        elif what == "discard":
            node.pdiscard(offset, length)  # type: ignore[attr-defined]
        elif what == "flush":
            node.flush()  # type: ignore[attr-defined]
        else:
            node.pwrite_zeroes(offset, length, may_unmap=what == "unmap")  # type: ignore[attr-defined]

    def are_equal(self) -> None:
        for path in self.paths:
            qemu_img("check", "-q", path)  # fails for leaks, too
        qemu_img("compare", "-q", *self.paths)

    def snapshot(self, number: int) -> None:
        self.snapshots.append(self.content())
        for path in self.paths:
            qemu_img("snapshot", "-c", f"s{number}", path)

    def content(self) -> bytes:
        raw = self.folder / "content.raw"
        qemu_img("convert", "-O", "raw", self.paths[0], raw)
        return raw.read_bytes()

    def snapshots_are_kept(self) -> None:
        for path in self.paths:
            node = open_image(str(path))
            try:
                for info, expected in zip(node.snapshots(), self.snapshots, strict=True):
                    assert node.view(info).pread(0, info.size) == expected
            finally:
                node.close()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(
    max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(turns=TURNS, with_snapshots=st.booleans())
def test_twins_stay_equal(layout: str, turns: list[list[Operation]], with_snapshots: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        twins = Twins(Path(folder), *LAYOUTS[layout])
        for number, operations in enumerate(turns):
            twins.turn(number, operations)
            if with_snapshots and "data file" not in layout:  # QEMU makes none of those
                twins.snapshot(number)
        twins.snapshots_are_kept()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_is_what_was_written_before_anything_is_in_the_file(layout: str, tmp_path: Path) -> None:
    path = Twins(tmp_path, *LAYOUTS[layout]).paths[0]
    chosen = random.Random(3)
    node = open_writable(str(path))
    try:
        expected = bytearray(node.pread(0, SIZE))
        for _ in range(150):
            offset = chosen.randrange(SIZE)
            length = min(chosen.choice([1, 513, 4096, 50_000]), SIZE - offset)
            if chosen.random() < 0.7:
                data = chosen.randbytes(length)
                node.pwritev(offset, [memoryview(data[:100]), bytearray(), memoryview(data[100:])])
            else:
                data = bytes(length)
                node.pwrite_zeroes(offset, length, may_unmap=chosen.random() < 0.5)
            expected[offset : offset + length] = data
            start = chosen.randrange(SIZE - 10_000)
            assert node.pread(start, 10_000) == expected[start : start + 10_000]
            for extent in node.block_status(start, 10_000):
                assert extent.must_read or not any(expected[extent.offset : extent.end])
    finally:
        node.close()
    assert qemu_img("check", "-q", path, check=False).returncode == 0
