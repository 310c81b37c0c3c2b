"""Random images, made by qemu-img and qemu-io in steps that hypothesis chooses, are read as QEMU reads them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.differential import judge
from tests.support import Image

KIB = 1 << 10
SECTOR = 512
SCALE = 64  # offsets and lengths are drawn as parts of the disk, whatever size it has by then

CHANGES = ("write", "write", "fill", "zero", "unmap", "discard", "compress", "compress")
EVENTS = ("snapshot", "snapshot", "snapshot", "savevm", "delete", "revert", "nothing")


@dataclass(frozen=True)
class Step:
    """One change of an image: what, where, and how much of the disk, in parts of SCALE."""

    kind: str
    start: int
    length: int

    def apply(self, image: Image, size: int, cluster: int) -> int:
        """Do it, and return the size that the disk has then."""
        offset = self.start * size // SCALE // SECTOR * SECTOR
        length = min(max(SECTOR, self.length * size // SCALE // SECTOR * SECTOR), size - offset)
        if self.kind == "snapshot":
            image.snapshot(f"s{self.start}")
        elif self.kind == "savevm":
            image.savevm(f"vm{image.taken}", memory={0x1000: self.length})
        elif self.kind in ("delete", "revert"):
            return self._choose(image, size)
        elif self.kind == "resize":
            return self._resize(image, size)
        elif self.kind == "nothing" or length <= 0:
            pass
        elif self.kind == "write":
            image.write(offset, length)
        elif self.kind == "fill":
            image.write(offset, length, self.length)
        elif self.kind == "compress":
            start = offset // cluster * cluster
            image.write(start, min(-(-length // cluster) * cluster, size - start), compressed=True)
        elif self.kind == "discard":
            image.discard(offset, length)
        else:
            image.write_zeroes(offset, length, unmap=self.kind == "unmap")
        return size

    def _choose(self, image: Image, size: int) -> int:
        if not image.references:
            return size
        chosen = image.references[self.start % len(image.references)]
        if self.kind == "delete":
            image.delete(chosen.name.decode())
        elif image.attempt(lambda trial: trial.revert(chosen.id)):
            return chosen.size
        return size

    def _resize(self, image: Image, size: int) -> int:
        """QEMU refuses this for version 2 with snapshots, and at times where a backing file would show."""
        wanted = max(SECTOR, size * (self.length + 1) // (SCALE // 2) // SECTOR * SECTOR)
        return wanted if image.attempt(lambda trial: trial.resize(wanted)) else size


@dataclass(frozen=True)
class Plan:
    """Everything that makes an image what it is."""

    cluster: int
    clusters: int
    options: dict[str, Any]
    backing: str
    steps: list[Step]

    def build(self, directory: Path) -> Image:
        size = self.cluster * self.clusters
        base = self._backing(directory, size)
        image = Image.create(directory / "disk.qcow2", size, cluster_size=self.cluster, **base, **self.options)
        image.tolerant = True
        for step in self.steps:
            size = step.apply(image, size, self.cluster)
        return image

    def _backing(self, directory: Path, size: int) -> dict[str, Any]:
        if self.backing == "none":
            return {}
        longer = self.backing.endswith("longer")
        length = size * 2 if longer else size * 5 // 8 // SECTOR * SECTOR
        if self.backing.startswith("raw"):
            raw = directory / "base.raw"
            raw.write_bytes(b"".join(b"base %010d\n" % number for number in range(length // 16)))
            return {"backing": raw, "backing_fmt": "raw"}
        length = max(length, 8 * KIB)
        base = Image.create(directory / "base.qcow2", length, cluster_size=1 * KIB)
        base.write(0, length // 2 // SECTOR * SECTOR).write_zeroes(length // 4 // SECTOR * SECTOR, 4 * SECTOR)
        return {"backing": base}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """An image of one of the families that QEMU can make, and what is done to it."""
    extended = draw(st.booleans())
    version_2 = not extended and draw(st.integers(0, 3)) == 0
    cluster = draw(st.sampled_from([16 * KIB, 64 * KIB] if extended else [512, 4 * KIB, 64 * KIB]))
    options: dict[str, Any] = {"compat": "0.10" if version_2 else "1.1"}
    if not version_2:
        options["extended_l2"] = extended
        options["refcount_bits"] = draw(st.sampled_from([16, 8, 64]))
        options["compression_type"] = draw(st.sampled_from(["zlib", "zstd"]))
        options["lazy_refcounts"] = draw(st.booleans())
    backing = draw(st.sampled_from(["none", "none", "raw shorter", "raw longer", "qcow2 shorter", "qcow2 longer"]))
    if backing == "none":
        options["preallocation"] = draw(st.sampled_from(["off", "off", "off", "metadata", "falloc"]))
    steps = [step for epoch in draw(st.lists(epochs(), min_size=1, max_size=6)) for step in epoch]
    return Plan(cluster, draw(st.integers(1, 80 if cluster < 16 * KIB else 24)), options, backing, steps)


def epochs() -> st.SearchStrategy[list[Step]]:
    """What happens between two snapshots: some changes, the event, and the disk may get another size."""
    part = st.integers(0, SCALE - 1)
    changes = st.lists(st.builds(Step, st.sampled_from(CHANGES), part, part), min_size=1, max_size=6)
    event = st.builds(Step, st.sampled_from(EVENTS), part, part)
    resize = st.builds(Step, st.sampled_from(["nothing", "resize"]), part, part)
    return st.builds(lambda *parts: [*parts[0], *parts[1:]], changes, event, resize)


def agrees(plan: Plan) -> None:
    """List, maps, contents, VM states and differences of one image."""
    with tempfile.TemporaryDirectory() as directory:
        image = plan.build(Path(directory))
        judge.lists_agree(image.path)
        judge.maps_agree(image.path)
        left_out = judge.snapshot_maps_agree(image.path)
        assert not left_out or plan.backing != "none"
        judge.image_holds(image)
        judge.diffs_agree(image.path, [image.active.read(), *(reference.read() for reference in image.references)])


EXAMPLES = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@settings(EXAMPLES, max_examples=60, derandomize=True)
@given(plans())
def test_a_random_image_is_read_as_qemu_reads_it(plan: Plan) -> None:
    agrees(plan)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(EXAMPLES, max_examples=600, phases=[Phase.generate, Phase.shrink])
@given(plans())
def test_many_random_images_are_read_as_qemu_reads_them(plan: Plan) -> None:
    agrees(plan)
